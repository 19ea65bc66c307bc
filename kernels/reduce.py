"""y = sum over splits of the workspace + bias, in float32 and in the order of the splits: what makes split-K give the same bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .jit import jit, launch, tl

SIZE = 512  # values of a program
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


@jit(varying=("splits",))
def reduce_kernel(workspace, bias, y, size, n, splits, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    ok = at < size
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(workspace + split * size + at, mask=ok, other=0)
    if HAS_BIAS:
        total += tl.load(bias + at % n, mask=ok, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=ok)


def reduce(workspace: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Fills y [m, n] from workspace, float32 [splits, m, n], and bias, [n] or None. Returns y."""
    size, n = y.numel(), y.shape[1]
    launch(
        reduce_kernel[(-(-size // SIZE),)],
        *(workspace, bias if bias is not None else y, y, size, n, workspace.shape[0]),
        **{"HAS_BIAS": bias is not None, "SIZE": SIZE, **OPTIONS},
    )
    return y
