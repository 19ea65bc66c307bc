"""Text from outside stays text: a card full of hostile values has the structure of one with harmless values."""

from __future__ import annotations

import ast
import json
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from awq_hf.model_cards import make_card
from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.markdown import code, escape, fenced, python, shell
from awq_hf.model_cards.metadata import card_data
from awq_hf.model_cards.plots import LOSS_PLOT
from awq_hf.model_cards.render import render

from .conftest import evaluation, row, write_json

HOSTILE = (
    "](javascript:alert(1))", "![x](https://evil.example/pixel.png)", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "a | b | c", "line\n\n# heading\n- item", "\r\n---\nlicense: mit\n---\n", "{{ 7 * 7 }} {% include '/etc/passwd' %} {# x #}",
    "```\ncode\n```", "`tick` ``", "</details>", "<!-- -->", "&lt;b&gt; &copy;", "*bold* _it_ ~~no~~ **b**", "$$x$$ $y$",
    "1. one", "- one", "+ one", "# one", "> one", "===", "[ref]: https://evil.example", "[^1]",
    "https://evil.example www.evil.example", "a\\", "\u202egnp.exe", "null #", "'", '"', "'; rm -rf ~; '", "$(id)",
    "!!python/object/apply:os.system [id]", "key: value # comment", "<a@b.example>", "<https://evil.example>", "\x00\x1b[31m",
)  # fmt: skip
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def structure(card: str) -> list[str]:
    """Kinds of all elements, with addresses and HTML as they are; runs of text and of code are one text."""
    found: list[str] = []

    def walk(tokens: list[Token]) -> None:
        for token in tokens:
            if token.type in ("text", "text_special", "code_inline", "softbreak", "entity"):
                if found[-1:] != ["text"]:
                    found.append("text")
            elif token.type == "inline":
                walk(token.children or [])
            else:
                kept = token.content if token.type.startswith("html") and "sha256" not in token.content else ""
                found.append(f"{token.type} {kept} {token.attrs.get('href', '')} {token.attrs.get('src', '')}")

    walk(PARSER.parse(card.split("\n---\n", 1)[1]))
    return found


def poison(directory: Path, value: str) -> None:
    """Put the value wherever a person or another program could have put one."""
    path = directory / "report.json"
    said: dict[str, Any] = json.loads(path.read_text())
    metadata = {"license": value, "license_name": value, "license_link": value, "language": [value], "pipeline_tag": value, "tags": [value]}
    said["base_model"] = {"name": value, "revision": value, "local": False, "metadata": metadata}
    said["calibration"].update(source=value, sha256=value)
    said["layers"][0].update(name=f"model.layers.0.{value}", fallback=value, dead_channels=1)
    said["left_in_float"] = {f"x{value}": value}
    said["notes"], said["recipe"]["overrides"] = [value], [[value, None]]
    said["recipe"]["rounding"] = value
    said["versions"], said["machine"] = {value: value}, {"platform": value, "device": value}
    write_json(path, said)
    rows = [row("awq-hf", ["."], 0.01, 23.0, 0.9, text=value, sha256=value), row(f"x{value}", [], 0.02, 23.0, 0.9, runtime=value)]
    write_json(directory / "evaluation.json", {**evaluation(*rows), "date": value})
    (directory / "recipe.yaml").write_text(f"calibration: {value}\n", encoding="utf-8")


def card_with(value: str, directory: Path) -> str:
    poison(directory, value)
    return render(gather(directory, "acme/Tiny-AWQ"), {LOSS_PLOT})


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_the_structure_is_that_of_harmless_values(value: str, awq_only: Path) -> None:
    expected = structure(card_with("harm less", awq_only))
    hostile = card_with(value, awq_only)
    assert structure(hostile) == expected
    assert ModelCard(hostile).data.to_dict() == card_data(gather(awq_only, "acme/Tiny-AWQ")).to_dict()


def test_empty_values_break_nothing(awq_only: Path) -> None:
    assert ModelCard(card_with("", awq_only)).text.startswith("\n# ")


def test_plots_of_hostile_names_are_drawn(full: Path) -> None:
    said = json.loads((full / "report.json").read_text())
    said["layers"][0]["name"] = "model.layers.0.$\\frac{$x"
    write_json(full / "report.json", said)
    (full / "Tiny-Q6_K.gguf").rename(full / "$\\frac{$.gguf")
    assert len(make_card(full)) == 3


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_escaped_text_reads_as_it_was(value: str) -> None:
    for written in (escape(value), code(value)):
        html = PARSER.render(f"| {written} |\n|--|\n")
        cell = html.split("<th>")[1].split("</th>")[0]
        assert "<" not in cell.replace("<code>", "").replace("</code>", "") and html.count("<th>") == 1
        read = unescape(cell.replace("<code>", "").replace("</code>", ""))
        shown = "".join(c if c.isprintable() else " " for c in value)
        assert " ".join(read.split()) == " ".join(shown.split())


def test_code_blocks_end_where_they_should() -> None:
    (block,) = PARSER.parse(fenced("a\n```\nb\n````\n", "yaml"))
    assert (block.type, block.content) == ("fence", "a\n```\nb\n````\n")


def test_words_of_commands_and_python_are_one_word() -> None:
    for value in (value for value in HOSTILE if value.isprintable() and value.strip() == value and "  " not in value):
        assert shlex.split(f"run {shell(value)}") == ["run", value]
        assert ast.literal_eval(python(value)) == value


def test_file_names_that_no_command_holds_are_refused(full: Path) -> None:
    (full / "Tiny-Q6_K.gguf").rename(full / "a\nb.gguf")
    with pytest.raises(ValueError, match="holds characters that cannot be shown"):
        make_card(full)


def test_names_of_files_are_quoted(full: Path) -> None:
    (full / "Tiny-Q6_K.gguf").rename(full / "$(id) [x](y).gguf")
    text = make_card(full, "a/b")["README.md"].decode()
    assert "\\[x\\](y).gguf](https://huggingface.co/a/b/blob/main/%24%28id%29%20%5Bx%5D%28y%29.gguf)" in text
