"""How a model was made, in words: nothing that its report does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.render import render

from .conftest import COMMIT, report, write_json

FITTED = "Each layer is fitted to the inputs that it gets from the layers quantized before it"
CORRECTED = "14 of 14 layers aim at the float model's outputs in spite of the error in these inputs"
MENDING = "4 of 14 layers make up for the error that has gathered in the residual stream"


def made_of(directory: Path, recipe: dict[str, Any], base_model: str | None = None, **layer: Any) -> str:
    """The section, of a report with changes to the recipe and to all layers."""
    said = report()
    said["recipe"] |= recipe
    for each in said["layers"]:
        each |= layer
    write_json(directory / "report.json", said)
    return render(gather(directory, base_model=base_model), ()).split("## How it was made")[1].split("## How to reproduce")[0]


def test_the_method_is_all_of_it(full: Path) -> None:
    assert f"scales\n  - {FITTED}\n  - {CORRECTED}\n  - {MENDING}\n" in made_of(full, {})


@pytest.mark.parametrize(
    "recipe, layer, absent",
    [
        ({"correction": False}, {"correction": 0.0, "residual": None}, [CORRECTED, MENDING]),
        ({"residual": False}, {"residual": None}, [MENDING]),
        ({"stream": "float"}, {"correction": 0.0, "residual": None}, [FITTED, CORRECTED, MENDING]),
        ({}, {"correction": 0.0, "residual": 0.0}, [CORRECTED, MENDING]),  # asked for, and of no use to any layer
        ({"scale": None}, {}, ["AWQ's smoothing scales"]),
        ({"clip": None}, {}, ["clipping"]),
        ({"scales_for": "Q4_K"}, {}, ["descent on integers and scales"]),
    ],
)
def test_what_was_not_done_is_not_named(recipe: dict[str, Any], layer: dict[str, Any], absent: list[str], full: Path) -> None:
    whole, text = made_of(full, {}), made_of(full, recipe, **layer)
    for part in (FITTED, CORRECTED, MENDING, "AWQ's smoothing scales", "clipping", "descent on integers and scales"):
        assert part in whole and (part in text) == (part not in absent), part


def test_reports_of_old_say_nothing_of_it(full: Path) -> None:
    said = report()
    for strength in ("correction", "residual"):
        del said["recipe"][strength]
        for layer in said["layers"]:
            del layer[strength]
    write_json(full / "report.json", said)
    text = render(gather(full), ())
    assert FITTED in text and "aim at" not in text and "residual" not in text


def test_scales_for_a_type(full: Path) -> None:
    assert "with zero points; scales that GGUF's Q4\\_K holds exactly\n" in made_of(full, {"scales_for": "Q4_K"})


def test_the_commit_of_the_original(full: Path) -> None:
    link = f"[acme/Llama-2-Tiny at 0123456789ab](https://huggingface.co/acme/Llama-2-Tiny/tree/{COMMIT})"
    assert f"- From {link}\n" in made_of(full, {})
    assert "- From" not in made_of(full, {}, base_model="acme/Other")  # whose commit nobody knows
    base = json.loads((full / "report.json").read_text())["base_model"]
    for change in ({"revision": None}, {"local": True}):
        write_json(full / "report.json", report(base_model={**base, **change}))
        assert "- From" not in render(gather(full), ())


def test_it_is_reproduced_from_what_a_stranger_has(full: Path) -> None:
    """recipe.yaml names a directory by a name that is nowhere else."""
    again = lambda *arguments: render(gather(full, "a/b", *arguments), ()).split("## How to reproduce it")[1]  # noqa: E731
    assert "\nawq-hf quantize --recipe recipe.yaml OUT\n" in again() and f"its revision `{COMMIT}`" in again()
    write_json(full / "report.json", report(base_model={"name": "mine", "revision": None, "local": True, "metadata": {}}))
    assert "\nawq-hf quantize --recipe recipe.yaml MODEL OUT\n" in again() and "a directory that is not named here:\n" in again()
    text = again("me/mine")
    assert (
        "\nawq-hf quantize --recipe recipe.yaml me/mine OUT\n" in text and "default, of\n[me/mine](https://huggingface.co/me/mine):" in text
    )


def test_notes_are_sentences(full: Path) -> None:
    write_json(full / "report.json", report(notes=["only 6 of 8 were found", "model.layers.0 stays", "lm_head is tied", "vLLM refuses it"]))
    notes = render(gather(full), ()).split("## Notes and limitations")[1]
    assert "- Only 6 of 8 were found.\n- model.layers.0 stays.\n- lm\\_head is tied.\n- vLLM refuses it.\n" in notes
