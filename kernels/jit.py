"""Triton where it is installed. Without it the kernels' modules import all the same, and only launching a kernel fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .installed import INTERPRETED, MISSING, TRITON

__all__ = ["INTERPRETED", "MISSING", "jit", "launch", "operand_dtype", "tl", "triton", "unusable"]

OLDEST = 3, 5  # before, tl.dot takes no fewer than 16 tokens

if TRITON:
    import triton
    import triton.language as tl
else:
    triton = tl = None


class _Missing:
    """Stands in for a kernel where triton is missing."""

    def __getitem__(self, grid: object) -> Any:
        raise ImportError(MISSING)


def jit(*, varying: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Any]:
    """Decorates a kernel. varying: integers that differ from call to call; no variant is compiled for those that are multiples of 16."""
    return lambda function: _Missing() if triton is None else triton.jit(function, do_not_specialize=varying)


def unusable() -> str | None:
    """Why the Triton that is here, if any, cannot compile the kernels, or None."""
    if triton is None:
        return MISSING
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"the kernel needs triton {OLDEST[0]}.{OLDEST[1]} or newer, not {triton.__version__}: update torch, to 2.9 or newer"
    return None


def launch(kernel: Callable[..., Any], /, *arguments: Any, **constants: Any) -> None:
    """kernel, which has its grid, on the GPU that holds the first argument: Triton takes the current one, which need not be that."""
    with torch.cuda.device_of(arguments[0]):
        kernel(*arguments, **constants)


def operand_dtype(dtype: torch.dtype) -> str:
    """What tl.dot multiplies for activations of `dtype`: the same, but float32 where the interpreter's bfloat16 arithmetic is garbage."""
    name = str(dtype).removeprefix("torch.")
    return "float32" if INTERPRETED and name == "bfloat16" else name
