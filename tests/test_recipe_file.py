"""recipe.yaml: what is written is what was chosen, and repeats the run; what cannot be meant is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import awq_hf
from awq_hf import AwqConfig
from awq_hf.recipe_file import IN_PYTHON, OPTIONS, RECIPE_NAME, Run, read_recipe, write_recipe

HERE = {"name": "model", "revision": None, "local": True}


def written(path: Path, config: AwqConfig, run: Run | None = None, **base_model: Any) -> dict[str, Any]:
    content = yaml.safe_load(write_recipe(path, {**HERE, **base_model}, config, run or Run()).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def recipe(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_options_are_those_of_the_config_and_of_a_run() -> None:
    assert set(OPTIONS) == {*inspect.signature(AwqConfig).parameters, *(field.name for field in fields(Run))} - {"version", "backend"}


def test_what_is_the_default_is_not_written(tmp_path: Path) -> None:
    assert written(tmp_path, AwqConfig()) == {"model": "./model"}
    assert [path.name for path in tmp_path.iterdir()] == [RECIPE_NAME]


def test_what_was_chosen_is_read_again(tmp_path: Path) -> None:
    overrides = {"down_proj": {"bits": 8, "group_size": 64}, "o_proj": None}
    config = AwqConfig(3, 64, False, ["gate"], overrides=overrides, samples=7, seq_len=9, clip=False, calibration="me/data:cfg:train")
    run = Run(dtype="float32", export=["gguf:Q4_K_M", "gptq"], measure=False, text="held.txt", push="me/secret", private=True)
    write_recipe(tmp_path, {"name": "me/model", "revision": "abc", "local": False}, config, run)
    assert read_recipe(tmp_path / RECIPE_NAME) == {
        "model": "me/model",
        "revision": "abc",
        "dtype": "float32",
        "export": ["gguf:Q4_K_M", "gptq"],
        "measure": False,
        "text": "held.txt",
        "bits": 3,
        "group_size": 64,
        "zero_point": False,
        "modules_to_not_convert": ["gate"],
        "overrides": overrides,
        "calibration": "me/data:cfg:train",
        "samples": 7,
        "seq_len": 9,
        "clip": False,
    }


def test_paths_of_this_machine_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "notes.txt").write_text("text")
    config = AwqConfig(calibration=secret / "notes.txt", tokenizer=str(secret))
    content = written(tmp_path, config, Run(text=str(secret / "gone.txt")))
    assert content == {"model": "./model", "text": "gone.txt", "calibration": "notes.txt", "tokenizer": "secret"}
    comment = (tmp_path / RECIPE_NAME).read_text().partition("model:")[0]
    assert "notes.txt is needed" in comment and str(tmp_path) not in comment and "directory" in comment
    monkeypatch.chdir(secret)
    assert written(tmp_path, AwqConfig(calibration="../secret/notes.txt"))["calibration"] == "notes.txt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert written(tmp_path, AwqConfig(calibration="~/secret/notes.txt"))["calibration"] == "notes.txt"


@pytest.mark.parametrize("calibration", [["a text"], [torch.tensor([1, 2])], torch.tensor([1, 2])])
def test_what_a_file_cannot_hold_is_not_replaced_by_a_default(calibration: Any, tmp_path: Path) -> None:
    assert written(tmp_path, AwqConfig(calibration=calibration), name="") == {"model": IN_PYTHON, "calibration": IN_PYTHON}
    with pytest.raises(ValueError, match="model was given in Python"):
        read_recipe(tmp_path / RECIPE_NAME)


def test_toml(tmp_path: Path) -> None:
    text = 'model = "me/model"\nexport = ["gptq"]\nprivate = true\n[overrides]\ndown_proj = {bits = 8}\n'
    expected = {"model": "me/model", "export": ["gptq"], "private": True, "overrides": {"down_proj": {"bits": 8}}}
    assert read_recipe(recipe(tmp_path, text, "mine.toml")) == expected
    assert read_recipe(recipe(tmp_path, "")) == {}


@pytest.mark.parametrize(
    "line, message",
    [
        ("bit: 4", "no option 'bit'; did you mean bits?"),
        ("group-size: 4", "did you mean group_size?"),
        ("skip: [a]", "a recipe calls it modules_to_not_convert"),
        ("symmetric: true", "a recipe calls it zero_point: false"),
        ("version: gemm", "no option 'version'"),
        ("bits: four", "bits is 'four', which is not a whole number"),
        ("bits: true", "bits is True, which is not a whole number"),
        ("bits: 4.0", "bits is 4.0, which is not a whole number"),
        ("zero_point: 1", "zero_point is 1, which is not true or false"),
        ("export: gguf", "export is 'gguf', which is not a list of text or null"),
        ("overrides: {a: 8}", "overrides is {'a': 8}, which is not a table like"),
        ("calibration: [a, b]", "calibration is ['a', 'b'], which is not text or null"),
        ("- bits", "is a list; a recipe is a table"),
        ("bits: [", "is not YAML"),
        ("bits: !!python/object:os.system 4", "is not YAML"),
        ("1: 2", "no option 1; there are: model, revision,"),
    ],
)
def test_what_cannot_be_meant(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read_recipe(recipe(tmp_path, line))
    assert "mine.yaml" in str(caught.value) and message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is not TOML"):
        read_recipe(recipe(tmp_path, "bits: 4", "mine.toml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="is not YAML"):
        read_recipe(tmp_path / "binary.yaml")


def test_quantize_writes_it(llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path) -> None:
    config = small_config(samples=2, rounding="nearest", bits=8)
    awq_hf.quantize(
        llama_dir, config, output_dir=tmp_path / "out", torch_dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    text = (tmp_path / "out" / RECIPE_NAME).read_text(encoding="utf-8")
    assert "attn_implementation" in text.partition("model:")[0]
    content = {"model": "./float", "dtype": "float32", "device": "cpu", "bits": 8, "group_size": 32, "calibration": IN_PYTHON}
    assert yaml.safe_load(text) == {**content, "samples": 2, "seq_len": 48, "rounding": "nearest"}
