"""The licence: the original's, or what the publisher says of it; never made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from awq_hf.model_cards import make_card
from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.licence import check_licence
from awq_hf.model_cards.missing import missing

from .conftest import COMMIT, report, write_json

ACME: dict[str, Any] = {"license": "other", "license_name": "acme", "license_link": "LICENSE"}
ACME_LINKED = {**ACME, "license_link": "https://huggingface.co/acme/Base/blob/main/LICENSE"}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.model_cards.plots.draw", lambda _facts: {})  # which takes time


def write_base(directory: Path, local: bool = False, **metadata: Any) -> None:
    base = {"name": "my-finetune" if local else "acme/Base", "revision": None if local else COMMIT, "local": local, "metadata": metadata}
    write_json(directory / "report.json", report(base_model=base))


def licence(directory: Path, *arguments: str | None) -> dict[str, Any]:
    """Of the card, which is left in the directory."""
    (directory / "README.md").write_bytes(make_card(directory, *arguments)["README.md"])
    return gather(directory).licence


def test_of_the_original_unless_something_else_is_said(full: Path) -> None:
    write_base(full, **ACME)
    assert licence(full) == licence(full, None, None, "other") == ACME_LINKED
    assert licence(full, None, None, "MIT") == {"license": "mit"}  # neither name nor link are of that one


@pytest.mark.parametrize("local", [True, False])
def test_what_was_said_is_remembered(local: bool, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.base_model._from_hub", lambda *_: "")
    write_base(full, local)
    assert licence(full) == {}
    assert any("the licence" in what and how == f"awq-hf card {full} --license ID" for what, how in missing(gather(full)))
    assert licence(full, "me/x", None, "llama3.2") == licence(full, "me/x") == {"license": "llama3.2"}
    assert not any("licence" in what for what, _ in missing(gather(full)))
    assert gather(full, base_model="acme/Another").licence == {}  # whose licence may be another
    (full / "README.md").write_text((full / "README.md").read_text().replace("llama3.2", "mit"))  # by a person: no card of ours
    assert gather(full).licence == {}


def test_one_that_the_hub_has_no_id_for(full: Path) -> None:
    write_base(full, local=True)
    assert licence(full, None, None, "other") == {"license": "other"}
    assert any(what == "what the licence is called" for what, _ in missing(gather(full)))
    (full / "LICENSE").write_text("Do what you like.")
    assert licence(full, None, None, "other") == {"license": "other", "license_link": "LICENSE"}
    assert licence(full, None, None, "mit") == {"license": "mit"}


@pytest.mark.parametrize("given", ["", "mit licence", "-x", "https://x", "a\nb", "x" * 65])
def test_what_cannot_be_an_id(given: str, full: Path) -> None:
    with pytest.raises(ValueError, match="is not the id of a licence; give one of the Hub's, such as apache-2.0"):
        make_card(full, license=given)


def test_ids_are_written_as_the_hub_does() -> None:
    assert (check_licence("Apache-2.0"), check_licence("cc-by-nc-4.0"), check_licence(None)) == ("apache-2.0", "cc-by-nc-4.0", None)
