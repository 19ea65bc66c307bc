"""What a GGUF file is called: by its original, one rule whichever command writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import awq_hf
from awq_hf.exporters.gguf.names import file_name, model_name
from awq_hf.exporters.opening import open_checkpoint


@pytest.fixture
def checkpoint(quantized_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_dir, tmp_path / "OUT"))


def name_of(path: Path) -> str:
    return file_name(open_checkpoint(path), "Q4_K_S")


@pytest.mark.parametrize("original, expected", [("maker/Tiny-1B", "Tiny-1B-AWQ-Q4_K_S.gguf"), ("run-17", "run-17-AWQ-Q4_K_S.gguf")])
def test_a_checkpoint_is_called_as_its_original(original: str, expected: str, checkpoint: Path) -> None:
    report = json.loads((checkpoint / "report.json").read_text())
    (checkpoint / "report.json").write_text(json.dumps({**report, "base_model": {"name": original, "revision": None, "local": True}}))
    assert name_of(checkpoint) == expected


@pytest.mark.parametrize("broken", ["{", "[]", "{}", '{"base_model": 3}', None])
def test_without_a_report_as_its_directory(broken: str | None, checkpoint: Path) -> None:
    (checkpoint / "report.json").unlink()
    if broken is not None:
        (checkpoint / "report.json").write_text(broken)
    assert name_of(checkpoint) == "OUT-AWQ-Q4_K_S.gguf"


def test_a_name_that_says_awq_is_not_said_twice(checkpoint: Path) -> None:
    (checkpoint / "report.json").unlink()
    assert name_of(checkpoint.rename(checkpoint.with_name("Mistral-7B-v0.1-AWQ"))) == "Mistral-7B-v0.1-AWQ-Q4_K_S.gguf"
    assert name_of(checkpoint.with_name("Mistral-7B-v0.1-AWQ").rename(checkpoint.with_name("hawqeye"))) == "hawqeye-AWQ-Q4_K_S.gguf"


def test_float_weights_of_the_hub(llama_dir: Path, tmp_path: Path) -> None:
    snapshot = shutil.copytree(llama_dir, tmp_path / "models--maker--Tiny-1B" / "snapshots" / ("0" * 40))
    assert file_name(open_checkpoint(snapshot), "Q4_K_M") == "Tiny-1B-Q4_K_M.gguf"


def test_a_model_in_memory(llama_dir: Path, small_config: object) -> None:
    model = awq_hf.quantize(str(llama_dir), small_config())  # type: ignore[operator]
    assert model_name(open_checkpoint(model)) == "float"
    assert file_name(open_checkpoint(model), "Q4_K_S") == "float-AWQ-Q4_K_S.gguf"
