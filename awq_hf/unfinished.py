"""A mark on models whose quantization broke off: some of their weights are changed, and nothing brings the originals back."""

from __future__ import annotations

from typing import Any

MARK = "_awq_hf_unfinished"


def begin(model: Any) -> None:
    """Say that from here on the model is neither what it was nor what it will be, until `end`."""
    setattr(model, MARK, True)


def end(model: Any) -> None:
    model.__dict__.pop(MARK, None)


def check_whole(model: Any) -> None:
    """Raise ValueError for a model that `begin` was said of, and never `end`."""
    if getattr(model, MARK, False):
        raise ValueError(
            f"a quantization of this {type(model).__name__} broke off and left it with some weights changed, which cannot be undone; "
            "load the model again"
        )
