"""A run that broke goes on, and ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import awq_hf
from awq_hf import resume
from awq_hf.block import BlockWork
from awq_hf.report import Report

TOKENS = list(torch.randint(3, 90, (6, 64), generator=torch.Generator().manual_seed(0)))
OPTIONS: dict[str, Any] = dict(group_size=32, calibration=TOKENS, samples=6, seq_len=64)
FILES = ("model.safetensors", "config.json")
MIXED = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, max_position_embeddings=128,
)  # fmt: skip


@pytest.fixture(params=["dense", "experts"])
def model(request: pytest.FixtureRequest, tiny_llama: Callable[..., Any], random_model: Callable[..., Any], tmp_path: Path) -> Path:
    made = tiny_llama(torch.float16, num_hidden_layers=3) if request.param == "dense" else random_model(Qwen3MoeConfig(**MIXED))
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Broken(RuntimeError):
    pass


def broken_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the work on the next block fail."""
    usual, done = BlockWork.choose_scales, list[str]()

    def choose_scales(self: BlockWork) -> None:
        if len(done) == blocks:
            raise Broken
        done.append(self.name)
        usual(self)

    monkeypatch.setattr(BlockWork, "choose_scales", choose_scales)


@pytest.mark.parametrize("stream", ["quantized", "float"])
def test_the_result_is_that_of_a_run_that_nothing_interrupted(
    model: Path, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(OPTIONS, stream=stream, correction=stream == "quantized")
    whole = awq_hf.quantize(model, awq_hf.AwqConfig(**options), output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        broken_after(2, patch)
        awq_hf.quantize(model, awq_hf.AwqConfig(**options), output_dir=tmp_path / "out", resume=True)
    kept = sorted(path.name for path in (tmp_path / "out.progress").iterdir())
    assert kept == ["block-00000.safetensors", "block-00001.safetensors", "run.json"] and not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        broken_after(1, patch)  # the last one alone is worked on
        resumed = awq_hf.quantize(model, awq_hf.AwqConfig(**options), output_dir=tmp_path / "out", resume=True)
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert resumed.awq_report.layers == whole.awq_report.layers
    assert (resumed.awq_report.left_in_float, resumed.awq_report.notes) == (whole.awq_report.left_in_float, whole.awq_report.notes)
    assert not (tmp_path / "out.progress").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_blocks_of_another_run_are_not_taken(tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    float_model = tiny_llama()
    float_model.save_pretrained(tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        broken_after(1, patch)
        awq_hf.quantize(tmp_path / "model", awq_hf.AwqConfig(**OPTIONS), output_dir=tmp_path / "out", resume=True)
    with pytest.raises(
        ValueError, match=r"out\.progress holds blocks of another run \(recipe\.spec\.bits was 4 and is 3\); .*remove the directory"
    ):
        awq_hf.quantize(tmp_path / "model", awq_hf.AwqConfig(**{**OPTIONS, "bits": 3}), output_dir=tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match=r"another run \(calibration\.sha256 was"):
        awq_hf.quantize(
            tmp_path / "model", awq_hf.AwqConfig(**{**OPTIONS, "calibration": TOKENS[::-1]}), output_dir=tmp_path / "out", resume=True
        )
    float_model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    float_model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"block-00000\.safetensors was made of other weights than model\.layers\.0 has now"):
        awq_hf.quantize(tmp_path / "model", awq_hf.AwqConfig(**OPTIONS), output_dir=tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    again = lambda: awq_hf.quantize(tmp_path / "model", awq_hf.AwqConfig(**OPTIONS), output_dir=tmp_path / "out", resume=True)  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(Broken):
        broken_after(1, patch)
        again()
    (tmp_path / "out.progress" / "block-00000.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"block-00000\.safetensors is damaged .*remove it"):
        again()
    (tmp_path / "out.progress" / "run.json").write_text("")
    with pytest.raises(ValueError, match=r"run\.json is damaged .*remove .*out\.progress to begin anew"):
        again()


def test_a_place_is_needed(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="give output_dir"):
        awq_hf.quantize(tiny_llama(), awq_hf.AwqConfig(**OPTIONS), resume=True)


def test_half_a_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while a block is written leaves nothing that would be taken for one."""

    def fail(_tensors: Any, path: Path, **_about: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(resume, "save_file", fail)
    monkeypatch.setattr(resume, "_state", lambda _work: {})
    kept = resume.KeptBlocks(tmp_path / "progress", {})
    report = Report({}, {})
    with pytest.raises(OSError, match="no space"):
        kept.save(0, "", None, report)  # type: ignore[arg-type]
    assert kept.restore(0, "", None, report) is False  # type: ignore[arg-type]
