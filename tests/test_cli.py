"""The command line: results, exit statuses, and errors that are one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from awq_hf import AwqLinear, demo

QUICK = ["--samples", "2", "--seq-len", "32"]
PLAIN = [*QUICK, "--rounding", "nearest"]


Run = Callable[..., Any]


@pytest.fixture
def model(two_blocks: Path) -> Path:
    return two_blocks


def is_one_error(result: Any, *parts: str) -> bool:
    """Status 1; on stderr one "error: ..." with these parts, however the lines are broken, and no traceback; nothing on stdout."""
    squeezed = "".join(result.err.split())
    return (
        result.status == 1
        and result.out == ""
        and result.err.startswith("error: ")
        and "Traceback" not in result.err
        and all("".join(part.split()) in squeezed for part in parts)
    )


# quantize


def test_quantize(run: Run, model: Path, demo_dir: Path, tmp_path: Path) -> None:
    options = [
        "--bits",
        3,
        "--group-size",
        64,
        "--symmetric",
        "--calibration",
        demo_dir / "calibration.txt",
        "--seed",
        4,
        "--skip",
        "o_proj",
    ]
    result = run("quantize", model, tmp_path / "out", *QUICK, *options, "--device", "cpu", "--dtype", "float32")
    assert result.status == 0, result.err
    assert "12 layers quantized to 3 bits" in result.out and "awq-hf eval" in result.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = config["quantization_config"]
    assert (stored["bits"], stored["group_size"], stored["zero_point"], stored["version"]) == (3, 64, False, "awq_hf")
    assert config["dtype"] == "float32"
    recipe = json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]
    assert (recipe["seed"], recipe["samples"], recipe["seq_len"], recipe["skip"]) == (4, 2, 32, ["o_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, AwqLinear) for module in loaded.modules()) == 12


def test_quantize_prints_the_report_as_json(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("quantize", model, tmp_path / "out", *PLAIN, "--json")
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(result.out) == {**report, "output": str(tmp_path / "out"), "exports": []}


def test_calibration_from_records(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text(json.dumps({"text": "The state of our Union. " * 40, "id": 1}))
    result = run("quantize", model, tmp_path / "out", *PLAIN, "--calibration", tmp_path / "notes.jsonl")
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["source"] == "notes.jsonl"
    (tmp_path / "notes.jsonl").write_text('{"text": \n')
    broken = run("quantize", model, tmp_path / "other", *PLAIN, "--calibration", tmp_path / "notes.jsonl")
    assert is_one_error(broken, "notes.jsonl', line 1, is not JSON") and not (tmp_path / "other").exists()


# demo


def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    assert is_one_error(run("demo", "--out", tmp_path.parent), "exists")
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(arguments))
    assert run("demo", "--out", tmp_path / "out", "--bits", 2).status == run("demo").status == 0
    assert [call[:3] for call in calls] == [(tmp_path / "out", 2, 128), (Path("awq-hf-demo"), 4, 128)]


# Wrong usage: status 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["quantize", "model"],
        ["quantize", "model", "out", "--bits", "four"],
        ["quantize", "model", "out", "--no-such-option"],
        ["eval"],
        ["no-such-command"],
        [],
    ],
)
def test_wrong_usage(arguments: list[str], run: Run) -> None:
    assert run(*arguments).status == 2


@pytest.mark.parametrize("command", [[], ["quantize"], ["eval"], ["demo"]])
def test_help(command: list[str], run: Run) -> None:
    for flag in ("--help", "-h"):
        result = run(*command, flag)
        assert result.status == 0 and "Usage" in result.out
    if command:
        assert "awq-hf " + command[0] in result.out.split("Example")[1]


# Failure: status 1 and one sentence


def test_values_that_do_not_exist(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert is_one_error(run("quantize", model, out, "--bits", 5), "--bits 5 is not supported", "[2, 3, 4, 8]")
    assert is_one_error(run("quantize", model, out, "--group-size", 100), "--group-size 100")
    assert is_one_error(run("quantize", model, out, "--rounding", "floor"), "--rounding floor", "['nearest', 'gptq', 'descent']")
    assert is_one_error(run("quantize", model, out, *PLAIN, "--dtype", "float17"), "float17")
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_does_not_exist(run: Run, model: Path, tmp_path: Path) -> None:
    assert is_one_error(run("quantize", model, tmp_path / "out", *PLAIN, "--device", "cuda"), "cuda")


@pytest.mark.parametrize("name", ["missing.txt", "notes [v2].txt", "[/b].txt"])
def test_files_that_do_not_exist_are_named_as_they_are(name: str, run: Run, model: Path, tmp_path: Path) -> None:
    assert is_one_error(run("quantize", model, tmp_path / "out", "--calibration", tmp_path / name), name)
    assert is_one_error(run("eval", model, "--text", tmp_path / name), name)


def test_an_output_directory_with_brackets(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("quantize", model, tmp_path / "model [awq]", *PLAIN)
    assert result.status == 0 and "model[awq]" in "".join(result.out.split())


def test_a_model_that_does_not_exist(run: Run, tmp_path: Path) -> None:
    assert is_one_error(run("quantize", tmp_path / "nowhere", tmp_path / "out"), "nowhere")
    assert is_one_error(run("eval", tmp_path, "--text", tmp_path), "config.json")


@pytest.mark.parametrize("command", ["quantize", "inspect", "eval"])
def test_a_file_that_is_given_as_a_model(command: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    output = [tmp_path / "out"] if command == "quantize" else []
    assert is_one_error(run(command, tmp_path / "model.safetensors", *output), "is a file; give the directory")
    how = f"awq-hf eval {tmp_path} --reference MODEL --save" if command == "eval" else "give the directory"
    assert is_one_error(run(command, tmp_path / "model.gguf", *output), how)


def test_an_output_directory_that_exists_is_left_alone(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert is_one_error(run("quantize", model, tmp_path), "exists and is not an empty directory")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("exception", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_nothing(
    exception: BaseException, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Any, directory: str, *_args: Any, **_kwargs: Any) -> None:
        (Path(directory) / "config.json").write_text("half")
        raise exception

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    result = run("quantize", model, tmp_path / "out", *PLAIN)
    assert result.status in (1, 130) and "Traceback" not in result.err and list(tmp_path.iterdir()) == []
    assert ("no space left" if isinstance(exception, OSError) else "nothing was written") in result.err


def test_debug_shows_the_traceback(run: Run, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--bits 5"):
        run("--debug", "quantize", model, tmp_path / "out", "--bits", 5)


def test_as_a_program(model: Path, tmp_path: Path) -> None:
    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-c", "from awq_hf.cli import main; main()", *map(str, arguments)]
        return subprocess.run(start, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})

    (tmp_path / "out").write_text("mine")
    failed = program("quantize", model, "out")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: out exists and is not an empty directory; choose another name or remove it\n"
    traced = program("--debug", "quantize", model, "out")
    assert traced.returncode == 1 and "Traceback (most recent call last)" in traced.stderr
