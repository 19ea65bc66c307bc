"""`awq-hf demo`: the model that comes with the package, quantized, measured, saved and loaded, without a network."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from awq_hf import AwqLinear, demo
from awq_hf.measure import bits_per_weight


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def quick(two_blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", two_blocks)
    monkeypatch.setattr(demo, "SAMPLES", 2)
    monkeypatch.setattr(demo, "SEQ_LEN", 32)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 640)


def test_goes_the_whole_way(quick: None, console: Console, tmp_path: Path) -> None:
    bits, group_size = 3, 64
    demo.run(tmp_path / "out", bits, group_size, console)
    said = text_of(console)
    for part in (f"{bits} bits", f"group_size={group_size}", "14 layers", "plain rounding", "640 tokens", "equal to the last bit"):
        assert part in said, part
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, AwqLinear) for module in model.modules()) == 14
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["spec"] == {"bits": bits, "group_size": group_size, "symmetric": False}
    assert report["calibration"]["source"] == "calibration.txt"


def test_refuses_a_directory_that_exists_before_it_says_anything(console: Console, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        demo.run(tmp_path, 4, 128, console)
    assert text_of(console) == "" and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL)
    assert bits_per_weight(model) == 16
    import awq_hf

    config = awq_hf.AwqConfig.plain_rounding(group_size=64, calibration=[torch.arange(64)], samples=1, seq_len=64)
    assert bits_per_weight(awq_hf.quantize(model, config)) == pytest.approx(4 + (16 + 4) / 64)


def test_evaluation_and_calibration_text_do_not_overlap() -> None:
    """No paragraph of the evaluation text is in the calibration text."""
    digests = [
        {hashlib.sha256(p.encode()).digest() for p in path.read_text(encoding="utf-8").split("\n") if len(p) > 80}
        for path in (demo.CALIBRATION, demo.EVALUATION)
    ]
    assert min(map(len, digests)) > 100 and not digests[0] & digests[1]
