"""The targets of an export. To add one: a module with export(checkpoint, path, bar, **options), and its line here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

GGUF = "gguf"  # has an interface of its own: exporters.gguf
TARGETS = {  # name -> module; imported when it is asked for
    "awq": "awq",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
    "dense": "dense",
}


def exporter(target: str, options: dict[str, Any]) -> Callable[..., None]:
    """The function that writes `target`. Raises ValueError for a target that does not exist, TypeError for options it does not have."""
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}; choose one of {', '.join([*TARGETS, GGUF])}")
    export: Callable[..., None] = importlib.import_module(f"awq_hf.exporters.{TARGETS[target]}").export
    known = list(inspect.signature(export).parameters)[3:]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"the target {target} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return export
