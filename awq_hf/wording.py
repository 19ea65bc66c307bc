"""How messages call things: an option as Python does, or as the command line, whichever its reader uses; modules of all blocks as one;
a directory that holds no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Spelling = Callable[..., str]  # of (name, value), or of the name alone


def in_python(name: str, *value: Any) -> str:
    return f"{name}={value[0]!r}" if value else name


_spelling: Spelling = in_python


def option(name: str, *value: Any) -> str:
    """option("bits", 5) is bits=5, and on the command line --bits 5; without a value it is the name alone. name: Python's.

    For what a person reads while it happens. What is kept, as the notes of a report, names options as Python does.
    """
    return _spelling(name, *value)


@contextmanager
def spelled(spelling: Spelling) -> Iterator[None]:
    """Messages that are made in the block call options so."""
    global _spelling
    before, _spelling = _spelling, spelling
    try:
        yield
    finally:
        _spelling = before


def starred(name: str) -> str:
    """A module's name with * for every number, as all blocks have it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def no_model(name: str, directory: Path) -> str:
    """What to say of a directory without config.json. name: as its reader called it."""
    if not (directory / "adapter_config.json").is_file():
        return f"{name} holds no config.json; give the directory of a model as transformers saves it, or a Hub id"
    return (
        f"{name} holds an adapter and no model: merge it into the float model that it was trained on "
        f'(peft.AutoPeftModelForCausalLM.from_pretrained("{name}").merge_and_unload().save_pretrained("merged")), save the tokenizer '
        "there, and give that directory"
    )
