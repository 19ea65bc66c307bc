"""An option that would be of no use is refused, by its name on the command line, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import awq_hf

Run = Callable[..., Any]
KEPT = "a quantized checkpoint keeps its codes"


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("awq_hf.to_gguf.export", "awq_hf.to_gguf.load_float", "awq_hf.to_gguf.plan_tensors", "awq_hf.export"):
        monkeypatch.setattr(work, lambda *_args, **_options: pytest.fail("the work was begun"))


@pytest.mark.parametrize(
    "options, refusal",
    [
        (["--target-bpw", 4.5, "--type", "Q4_K"], "--target-bpw 4.5 chooses the types itself, so --type Q4_K would be of no use"),
        (["--no-search", "--calibration", "notes.txt"], "--calibration is about the search of a float model, and there is none here: --no"),
        (["--no-search", "--target-bpw", 4.5], "--target-bpw is about the search"),
        (["--imatrix", "a.dat", "--samples", 3], "--samples is about the search of a float model, and there is none here: --imatrix takes"),
        (["--imatrix", "a.dat", "--type", "f16"], "--type F16 weighs nothing by importance, so --imatrix would be of no use; leave it out"),
        (["--type", "bf16", "--seed", 1], "--seed is about the search of a float model, and there is none here: --type BF16 needs none"),
        (["--type", "Q8_0", "--save-imatrix", "a.dat"], "--save-imatrix is about the search"),
        (["--type", "Q8_0", "--device", "cpu"], "--device is about the search of a float model"),
        (["--revision", "v2"], "--revision v2 is of a Hub id, and"),
    ],
)
def test_export_of_a_float_model(options: list[object], refusal: str, run: Run, no_export: None, demo_dir: Path, tmp_path: Path) -> None:
    assert run("export", "gguf", demo_dir / "model", tmp_path / "a.gguf", *options).refused(refusal, "leave")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", [["--seq-len", 64], ["--no-search"], ["--target-bpw", 4.5], ["--device", "cpu"], ["--save-imatrix", "x"]]
)
def test_export_of_a_quantized_model(option: list[object], run: Run, no_export: None, quantized_dir: Path, tmp_path: Path) -> None:
    done = run("export", "gguf", quantized_dir, tmp_path / "a.gguf", *option)
    assert done.refused(f"{option[0]} is about the search of a float model, and there is none here: {KEPT}; leave {option[0]} out")


@pytest.mark.parametrize(
    "option",
    [["--samples", 128], ["--seed", 0], ["--device", "cpu"], ["--no-search"], ["--exact"], ["--type", "Q4_K"], ["--target-bpw", 4]],
)
@pytest.mark.parametrize("target", ["gptq", "dense"])
def test_options_of_gguf_for_another_target(
    target: str, option: list[object], run: Run, no_export: None, quantized_dir: Path, tmp_path: Path
) -> None:
    """Those with the value of the default as well: whoever gives it expects something of it."""
    refusal = f"{option[0]} is an option of the target gguf, not of {target}; leave it out"
    assert run("export", target, quantized_dir, tmp_path / "out", *option).refused(refusal)


def test_quantize(run: Run, no_work: None, llama_dir: Path, tmp_path: Path) -> None:
    done = run("quantize", llama_dir, tmp_path / "out", "--revision", "main")
    assert done.refused(f"--revision main is of a Hub id, and {llama_dir} is a directory, which has none; leave it out")


@pytest.mark.parametrize("option", [["--bits", 4], ["--skip", "o_proj"], ["--rounding", "gptq"], ["--symmetric"]])
def test_inspect(option: list[object], run: Run, quantized_dir: Path) -> None:
    done = run("inspect", quantized_dir, *option)
    assert done.refused(f"{option[0]} is about quantizing a float model, and {quantized_dir} is quantized already; leave it out")
    assert run("inspect", quantized_dir, "--revision", "main").refused("--revision main is of a Hub id")


def test_eval(run: Run, monkeypatch: pytest.MonkeyPatch, demo_dir: Path) -> None:
    """--max-tokens 0 is no default."""
    original = demo_dir / "model"
    monkeypatch.setattr("awq_hf.measure.load_float", lambda *_args, **_options: pytest.fail("the work was begun"))
    assert run("eval", original, "--reference", original, "--save", "--max-tokens", 0, "--device", "cpu").refused("--max-tokens 0")


def test_in_python(quantized_dir: Path, demo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"^config is about the search of a float model, and there is none here: {KEPT}; leave config out$"
    ):
        awq_hf.export(quantized_dir, "gguf", tmp_path / "a.gguf", config=awq_hf.AwqConfig())
    with pytest.raises(ValueError, match="^target_bpw=4.5 chooses the types itself, so type='Q4_K' would be of no use; leave one out$"):
        awq_hf.export(demo_dir / "model", "gguf", tmp_path / "a.gguf", target_bpw=4.5, type="Q4_K")
