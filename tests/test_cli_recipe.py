"""`awq-hf quantize --recipe`: a run is repeated, changed, or refused for what the file lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., Any]


@pytest.fixture
def model(two_blocks: Path, demo_dir: Path, tmp_path: Path) -> Path:
    """In a folder where the text to calibrate on is, too."""
    shutil.copyfile(demo_dir / "calibration.txt", tmp_path / "calibration.txt")
    return Path(shutil.copytree(two_blocks, tmp_path / "model"))


def test_a_recipe_repeats_the_run(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    options = [
        "--bits",
        3,
        "--group-size",
        64,
        "--symmetric",
        "--skip",
        "o_proj",
        "--override",
        "down_proj=8",
        "--override",
        "layers.0=float",
    ]
    calibration = ["--calibration", tmp_path / "calibration.txt", "--seed", 5, "--samples", 4, "--seq-len", 32]
    assert run("quantize", model, first, *options, *calibration, "--dtype", "float32", "--export", "gptq").status == 0
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    expected = {"model": "./model", "dtype": "float32", "export": ["gptq"], "bits": 3, "group_size": 64, "zero_point": False}
    overrides = {"down_proj": {"bits": 8}, "layers.0": None}
    expected |= {"modules_to_not_convert": ["o_proj"], "overrides": overrides, "calibration": "calibration.txt"}
    assert recipe == {**expected, "samples": 4, "seq_len": 32, "seed": 5}
    monkeypatch.chdir(tmp_path)  # where both the model and the text are
    assert run("quantize", "--recipe", first / "recipe.yaml", second).status == 0
    for file in ("model.safetensors", "config.json", "recipe.yaml", "gptq/model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    changed = run("quantize", "--recipe", first / "recipe.yaml", model, third, "--bits", 4, "--seed", 0)
    assert changed.status == 0, changed.err
    kept = {key: value for key, value in recipe.items() if key not in ("bits", "seed")}
    assert yaml.safe_load((third / "recipe.yaml").read_text()) == kept
    report = json.loads((third / "report.json").read_text())["recipe"]
    assert (report["spec"]["bits"], report["spec"]["group_size"], report["seed"]) == (4, 64, 0)


def test_a_recipe_of_one_model_for_another(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its revision and base model are the first one's."""
    asked: list[dict[str, Any]] = []

    def check_model(model: str, options: dict[str, Any]) -> None:
        asked.append({"model": model, **options})
        raise ValueError("that is enough")

    monkeypatch.setattr("awq_hf.api.check_model", check_model)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: me/model\nrevision: abc\nbase_model: me/base\nshrinkage: 0\n")
    for words in (["me/model"], [], ["me/other"], ["me/other", "--revision", "v2"]):
        assert run("quantize", "--recipe", recipe, *words[:1], tmp_path / "out", *words[1:]).refused("that is enough")
    revisions = [{"revision": "abc"}, {"revision": "abc"}, {}, {"revision": "v2"}]
    assert asked == [{"model": f"me/{name}", **where} for name, where in zip(("model", "model", "other", "other"), revisions, strict=True)]


def test_recipes_that_lack_what_is_needed(run: Run, no_work: None, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("bits = 3\n")
    assert run("quantize", "--recipe", recipe, tmp_path / "out").status == 2
    recipe.write_text(f'model = "{model}"\n')
    assert run("quantize", "--recipe", recipe).status == 2
    recipe.write_text(f'model = "{model}"\nbit = 3\n')
    assert run("quantize", "--recipe", recipe, tmp_path / "out").refused("no option 'bit'; did you mean bits?")
    recipe.write_text('model = "./elsewhere"\n')  # a directory, which is not asked of the Hub
    assert run("quantize", "--recipe", recipe, tmp_path / "out").refused("a directory ./elsewhere, which is not here; give it")
    assert run("quantize", "--recipe", tmp_path / "none.yaml", model, tmp_path / "out").refused("there is no recipe")
