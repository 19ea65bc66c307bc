"""Triton where it is installed. Without it the kernels' modules import all the same, and only launching a kernel fails.

Kernels keep to what every release from OLDEST on compiles: 3.8 takes no chained comparison (a < b < c).
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import torch

from .installed import INTERPRETED, MISSING, TRITON

__all__ = ["INTERPRETED", "MISSING", "jit", "launch", "operand_dtype", "tl", "triton", "unfenced", "unusable"]

OLDEST = 3, 5  # before, tl.dot takes no fewer than 16 tokens
FENCED = 3, 7, 1

logger = logging.getLogger("awq_hf")

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


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])


def unusable() -> str | None:
    """Why the Triton that is here, if any, cannot compile the kernels, or None."""
    if triton is None:
        return MISSING
    if _version() < OLDEST:
        return f"the kernel needs triton {OLDEST[0]}.{OLDEST[1]} or newer, not {triton.__version__}: update torch, to 2.9 or newer"
    return None


@functools.cache
def unfenced() -> str | None:
    """Why tl.dot could read what shared memory held before, or None; a warning says it once.

    Tensor cores of sm_90 and newer read shared memory by another proxy than cp.async writes it, and the PTX ISA (async proxy) asks for a
    fence between them, which the compiler puts there from 3.7.1 on (triton-lang/triton#9610, pytorch/pytorch#181248).
    """
    if INTERPRETED or _version() >= FENCED or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return None
    reason = f"triton {triton.__version__} leaves out a fence that this GPU needs: update torch, to 2.13 or newer"
    logger.warning("%s. Until then several tokens are multiplied with the dequantized weight, which is slower", reason)
    return reason


def launch(kernel: Callable[..., Any], /, *arguments: Any, **constants: Any) -> None:
    """kernel, which has its grid, on the GPU that holds the first argument: Triton takes the current one, which need not be that."""
    with torch.cuda.device_of(arguments[0]):
        kernel(*arguments, **constants)


def operand_dtype(dtype: torch.dtype) -> str:
    """What tl.dot multiplies for activations of `dtype`: the same, but float32 where the interpreter's bfloat16 arithmetic is garbage."""
    name = str(dtype).removeprefix("torch.")
    return "float32" if INTERPRETED and name == "bfloat16" else name
