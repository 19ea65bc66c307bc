"""What report.json says of the base model: the same from a directory, the cache and the Hub, and nothing that breaks a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

import awq_hf
from awq_hf import base_model

CARD = """---
license: other
license_name: my-licence
license_link: LICENSE
language: [en, no]
tags: [chat, 7]
pipeline_tag: {not: text}
base_model: me/pretrained
widget: [1, 2]
---
# A model
"""
METADATA = {
    "license": "other",
    "license_name": "my-licence",
    "license_link": "LICENSE",
    "language": ["en", "no"],
    "base_model": "me/pretrained",
}


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    expected = {"name": tmp_path.name, "revision": None, "local": True, "metadata": METADATA}
    assert base_model.describe(tmp_path) == expected
    assert str(tmp_path.parent) not in json.dumps(expected)


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"# no header",
        b"---\n: [\n---\n",
        b"---\n- a\n---\n",
        b"---\nlicense: [mit]\n---\n",
        b"---\nignore_metadata_errors: 1\n---",
        b"\xff\xfe\x00",
    ],
)
def test_cards_that_say_nothing(card: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert base_model.describe(tmp_path)["metadata"] == {}


def test_a_language_that_yaml_takes_for_a_boolean(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: no\n---\n")
    assert base_model.describe(tmp_path)["metadata"] == {"language": "no"}


def test_a_snapshot_in_the_cache_is_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert base_model.describe(snapshot) == {"name": "me/a--b", "revision": "0123abc", "local": False, "metadata": {}}


def test_made_in_memory() -> None:
    assert base_model.describe("") == {"name": "", "revision": None, "local": True, "metadata": {}}


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def get(url: str, **options: Any) -> Any:
        calls.append((url, options))
        return SimpleNamespace(status_code=200, text=CARD)

    monkeypatch.setattr(base_model, "get_session", lambda: SimpleNamespace(get=get))
    assert base_model.describe("me/model", "abc") == {"name": "me/model", "revision": "abc", "local": False, "metadata": {}}
    assert not calls  # offline, as all tests are
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert base_model.describe("me/model", "abc")["metadata"] == METADATA
    assert calls[0][0].endswith("/me/model/resolve/abc/README.md") and calls[0][1]["timeout"] <= 5


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base_model, "hf_hub_url", lambda *_args, **_options: "http://127.0.0.1:1/README.md")
    began = time.monotonic()
    assert base_model.describe("me/model")["metadata"] == {}
    assert time.monotonic() - began < base_model.TIMEOUT


def test_in_the_report(llama_dir: Path, tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    config = small_config(samples=2, rounding="nearest")
    assert awq_hf.quantize(llama_dir, config).awq_report.base_model == base_model.describe(llama_dir)
    assert awq_hf.quantize(tiny_llama(), config).awq_report.base_model["name"] == ""
