"""Bad input ends with one clear sentence, a status that is not 0, and nothing half-written."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import awq_hf

QUICK = ["--samples", "2", "--seq-len", "32", "--rounding", "nearest"]


Run = Callable[..., Any]


def is_one_sentence(result: Any, *parts: str) -> bool:
    text = " ".join(result.err.split())
    return result.status == 1 and text.startswith("error: ") and "Traceback" not in text and all(part in text for part in parts)


@pytest.fixture
def model(demo_dir: Path, tmp_path: Path) -> Path:
    """A copy of the demonstration model, to be damaged."""
    return Path(shutil.copytree(demo_dir / "model", tmp_path / "model"))


def change(model: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    how(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


UP = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--bits", "5"], ["--bits 5 is", "[2, 3, 4, 8]"]),
        (["--group-size", "100"], ["--group-size 100 is", "128"]),
        (["--rounding", "floor"], ["--rounding floor is", "descent"]),
        (["--samples", "0"], ["--samples 0 is too small"]),
        (["--seq-len", "100000"], ["--seq-len 100000 is", "at most 512"]),
        (["--override", "down_proj"], ["--override down_proj", "down_proj=8:64"]),
        (["--override", "down_proj=6"], ["--override: 'down_proj': --bits 6 is not supported"]),
        (["--override", "dwon_proj=8"], ["'dwon_proj' is in no layer's name"]),
        (["--override", "=8"], ["--override =8"]),
        (["--skip", "dwon_proj"], ["--skip: 'dwon_proj' is in no module's name", "did you mean 'down_proj'"]),
        (["--skip", ""], ["an empty string is part of every name"]),
        (["--device", "cuda:7"], ["--device cuda:7"]),
        (["--dtype", "int8"], ["--dtype int8"]),
    ],
)
def test_options(options: list[str], parts: list[str], run: Run, demo_dir: Path, tmp_path: Path) -> None:
    assert is_one_sentence(run("quantize", demo_dir / "model", tmp_path / "out", *options), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["holds no text"]),
        (b" \n\t\n", ["holds no text"]),
        (b"\x80\x81\xfe", ["not UTF-8"]),
        (b"word", ["too few"]),
        (None, ["does not exist"]),
    ],
)
def test_calibration(content: bytes | None, parts: list[str], run: Run, demo_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    if content is not None:
        text.write_bytes(content)
    assert is_one_sentence(run("quantize", demo_dir / "model", tmp_path / "out", "--calibration", text), "notes.txt", *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere/at/all", "../model", "a b"])
def test_model_names(name: str, run: Run, tmp_path: Path) -> None:
    assert is_one_sentence(run("quantize", name, tmp_path / "out"), "is not a directory")


def test_a_directory_that_holds_no_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert is_one_sentence(run("quantize", tmp_path / "empty", tmp_path / "out"), "holds no config.json")
    assert is_one_sentence(run("eval", tmp_path / "empty", "--text", __file__), "config")


def test_an_adapter_is_no_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for command in (["quantize", tmp_path / "lora", tmp_path / "out"], ["inspect", tmp_path / "lora"]):
        assert is_one_sentence(run(*command), "holds an adapter and no model: merge it", "merge_and_unload")
    assert is_one_sentence(run("export", "dense", tmp_path / "lora", tmp_path / "out"), "holds an adapter and no model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, run: Run, model: Path, tmp_path: Path) -> None:
    change(model, lambda tensors: tensors[UP][3].__setitem__(5, value))
    assert is_one_sentence(run("quantize", model, tmp_path / "out", *QUICK), "model.layers.2.mlp.up_proj.weight holds NaN or infinity")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_are_all_zero(run: Run, model: Path, tmp_path: Path) -> None:
    change(model, lambda tensors: tensors[UP].zero_())
    result = run("quantize", model, tmp_path / "out", *QUICK)
    assert is_one_sentence(
        result, "model.layers.2.mlp.up_proj.weight is zero throughout", "if this is meant, --skip model.layers.2.mlp.up_proj"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert run("quantize", model, tmp_path / "out", *QUICK, "--skip", UP.removesuffix(".weight")).status == 0, "where it is meant"


def test_a_dead_channel_is_said_and_does_no_harm(model: Path, tiny_config: dict[str, Any]) -> None:
    change(model, lambda tensors: tensors[UP][:3].zero_())
    quantized = awq_hf.quantize(model, awq_hf.AwqConfig(**tiny_config))
    dead = {layer.name: layer.dead_channels for layer in quantized.awq_report.layers if layer.dead_channels}
    assert dead == {"model.layers.2.mlp.down_proj": 3}
    assert "1 layer has input channels that are zero for every calibration token" in quantized.awq_report.summary()
    assert not any(layer.loss > layer.loss_plain for layer in quantized.awq_report.layers)


@pytest.fixture
def tiny_config(demo_dir: Path) -> dict[str, Any]:
    return dict(calibration=demo_dir / "calibration.txt", samples=4, seq_len=64)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-100]), ["model.safetensors"]),
    "junk": (lambda m: (m / "model.safetensors").write_bytes(b"junk" * 1000), ["model.safetensors"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["model.safetensors"]),
    "config that is no JSON": (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
    "unknown architecture": (lambda m: (m / "config.json").write_text('{"model_type": "lama"}'), ["lama"]),
    "another size": (lambda m: change(m, lambda t: t.__setitem__(UP, torch.zeros(8, 8))), ["model.layers.2.mlp.up_proj.weight"]),
    "a layer is missing": (lambda m: change(m, lambda t: t.pop(UP)), ["model.layers.2.mlp.up_proj.weight is missing"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(damage: str, run: Run, model: Path, tmp_path: Path) -> None:
    how, parts = DAMAGE[damage]
    how(model)
    assert is_one_sentence(run("quantize", model, tmp_path / "out", *QUICK), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_pickled_checkpoint_is_not_opened(run: Run, quantized_dir: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(quantized_dir, tmp_path / "m"))
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin is not a safetensors file"):
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "made up"])
def test_a_model_that_another_method_quantized(method: str, run: Run, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4}}))
    assert is_one_sentence(run("quantize", model, tmp_path / "out", *QUICK), method)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already(run: Run, quantized_dir: Path, tmp_path: Path) -> None:
    assert is_one_sentence(run("quantize", quantized_dir, tmp_path / "out", *QUICK), "quantized already")
    assert not (tmp_path / "out").exists()


def test_a_name_below_a_file(run: Run, demo_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_one_sentence(run("quantize", demo_dir / "model", tmp_path / "file" / "out", *QUICK), "cannot be written to")


def test_a_folder_that_cannot_be_written_to_is_tried_before_any_work(
    run: Run, demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("awq_hf.output.tempfile.mkdtemp", refuse)
    monkeypatch.setattr("awq_hf.api.check_model", None)
    assert is_one_sentence(run("quantize", demo_dir / "model", tmp_path / "out"), "Read-only file system", "cannot be written to")


def test_a_full_disk_is_said_before_any_work(run: Run, demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.hf_quantizer.quantize_model", None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("awq_hf.preflight.shutil.disk_usage", lambda _: usage._replace(free=1_000_000))
    assert is_one_sentence(run("quantize", demo_dir / "model", tmp_path / "out", *QUICK), "has 1.0 MB free, and the result takes 2.3 MB")
    assert list(tmp_path.iterdir()) == []


def test_control_c_leaves_nothing(demo_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from awq_hf.cli import main; main()", "quantize", str(demo_dir / "model"), str(tmp_path / "out")]
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which background jobs of a shell do not
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heeds)
    assert process.stderr is not None
    seen = b""
    while b"Quantizing" not in seen:
        seen += (part := os.read(process.stderr.fileno(), 4096))
        assert part, seen
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and b"interrupted; nothing was written" in rest and b"Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
