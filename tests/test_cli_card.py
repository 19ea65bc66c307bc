"""awq-hf card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def model(quantized_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_dir, tmp_path / "tiny-awq"))


def test_writes_the_card_and_says_what_is_missing(run: Run, model: Path) -> None:
    done = run("card", model)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"Written to {model}: README.md, images/loss-per-layer.png\n")
    assert f"awq-hf card {model} --base-model OWNER/NAME" in done.out and "the quality of the checkpoint" in done.out
    assert (model / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert (model / "images" / "loss-per-layer.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in model.rglob("*") if path.name.endswith(".partial")]


def test_json_and_options(run: Run, model: Path) -> None:
    result = json.loads(run("card", model, "--repo-id", "me/tiny", "--base-model", "acme/Tiny", "--json").out)
    assert (result["path"], result["files"]) == (str(model), ["README.md", "images/loss-per-layer.png"])
    assert all(set(each) == {"what", "how"} for each in result["missing"])
    text = (model / "README.md").read_text()
    assert "base_model: acme/Tiny\n" in text and "vllm serve me/tiny\n" in text


def test_a_card_that_a_person_edited_is_kept_unless_asked(run: Run, model: Path) -> None:
    readme = model / "README.md"
    assert run("card", model).status == run("card", model).status == 0  # its own card is replaced
    for text in ("# Mine\n", readme.read_text() + "An addition.\n"):
        readme.write_text(text)
        done = run("card", model)
        assert done.status == 1 and "it is kept: --overwrite replaces it" in done.err and readme.read_text() == text
    assert run("card", model, "--overwrite").status == 0 and "An addition" not in readme.read_text()


def test_refuses_what_is_no_model(run: Run, tmp_path: Path) -> None:
    done = run("card", tmp_path)
    assert done.status == 1 and "holds no model" in done.err and not [*tmp_path.iterdir()]
    assert "awq-hf card ./llama-awq --repo-id me/llama-awq" in run("card", "--help").out


def test_the_original_is_asked_for_its_licence_when_the_directory_had_none(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"acme/Tiny": "---\nlicense: mit\nlanguage: en\n---\n"}
    monkeypatch.setattr("awq_hf.base_model._from_hub", lambda name, commit: cards.get(name, ""))
    assert "licence" not in run("card", model, "--repo-id", "me/tiny", "--base-model", "acme/Tiny").out
    head = (model / "README.md").read_text()[:400]
    assert "license: mit\n" in head and "language: en\n" in head
    assert "licence" not in run("card", model, "--repo-id", "me/tiny").out  # as a push makes the card: the id is remembered
    assert "base_model: acme/Tiny\n" in (model / "README.md").read_text()
    assert f"awq-hf card {model} --license ID\n" in run("card", model, "--base-model", "acme/Other").out


def test_a_licence_that_only_the_publisher_knows(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.base_model._from_hub", lambda *_: "")
    assert run("card", model, "--license", "not one").refused("--license 'not one' is not the id of a licence", "apache-2.0")
    assert (
        "the licence" not in run("card", model, "--license", "Apache-2.0").out
        and "license: apache-2.0\n" in (model / "README.md").read_text()
    )
    assert run("card", model, "--repo-id", "me/tiny").status == 0  # as a push makes the card
    assert "license: apache-2.0\n" in (model / "README.md").read_text()


def test_a_repository_has_an_owner(run: Run, model: Path) -> None:
    done = run("card", model, "--repo-id", "tiny")
    assert done.status == 1 and "--repo-id tiny has no owner" in done.err and not (model / "README.md").exists()
