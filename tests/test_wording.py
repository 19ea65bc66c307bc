"""Options in messages: Python's way to a Python program, the command line's on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from awq_hf import cli
from awq_hf.cli.common import as_option
from awq_hf.wording import option, spelled

Run = Callable[..., Any]


def test_each_has_its_way() -> None:
    assert (option("seq_len"), option("seq_len", 5), option("revision", "a b")) == ("seq_len", "seq_len=5", "revision='a b'")
    with pytest.raises(KeyError), spelled(as_option):
        assert (option("seq_len"), option("seq_len", 5), option("revision", "a b")) == ("--seq-len", "--seq-len 5", "--revision 'a b'")
        assert option("modules_to_not_convert", ["gate", "layers.0."]) == "--skip gate --skip layers.0."
        assert (option("overwrite", True), option("zero_point", False), option("search", False)) == (
            "--overwrite", "--symmetric", "--no-search",
        )  # fmt: skip
        raise KeyError
    assert option("device_map", 0) == "device_map=0"  # after an error as well


def test_the_command_line_has_every_option_that_messages_name() -> None:
    """Names are read from the source, so that a new one is seen."""
    root = Path(__file__).parents[1]
    sources = [path.read_text() for folder in ("awq_hf", "exporters", "model_cards") for path in (root / folder).rglob("*.py")]
    named = {name for source in sources for name in re.findall(r"\boption\([\"'](\w+)[\"']", source)}
    assert len(named) > 15
    named.remove("config")  # of many options: a command says which of them was given
    commands = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    known = {word for command in commands for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    assert {as_option(name, *[False] * (name == "search")) for name in named} <= known


WRONG: dict[tuple[str, ...], str] = {  # arguments of `awq-hf quantize MODEL OUT` -> what the message says; more in test_bad_input.py
    ("--group-size", "256"): "Or leave these layers in float: --skip",
    ("--override", "nothing=8"): "--override: 'nothing' is in no layer's name",
    ("--device", "tpu"): "--device tpu is not a device; give",
    ("--skip", "layers"): "is left to quantize; shorten --skip",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_quantize_names_its_own_options(arguments: tuple[str, str], run: Run, llama_dir: Path, demo_dir: Path, tmp_path: Path) -> None:
    done = run("quantize", llama_dir, tmp_path / "out", "--calibration", demo_dir / "calibration.txt", "--group-size", 32, *arguments)
    assert done.refused(WRONG[arguments]), done.err
    assert not re.search(r"modules_to_not_convert|\b\w+=[\['\d]", done.err), done.err
