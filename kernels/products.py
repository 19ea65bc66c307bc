"""Products of half-precision matrices on CPUs that have no instructions for them: in float32, each result rounded once.

torch multiplies bfloat16 and float16 with oneDNN where a CPU can, and in scalar loops where it cannot. With AVX2 alone, [1024, 1024] times
[1024, 2816] took 6 times as long in bfloat16 as in float32 as x W^T, and 190 times as x W. No CPU that was measured is faster in float16.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

PIECE = 1 << 22  # elements of an operand that are float32 at a time: 16 MB


@cache
def _has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU. torch asks itself the same; builds without oneDNN do not know the question."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices of `dtype` are multiplied there."""
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not _has_bfloat16())
    return torch.float32 if slow and device.type == "cpu" else dtype


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [m, k] and [k, n] of one dtype, in `computed_in`; returns that dtype, before it is rounded."""
    dtype = computed_in(a.dtype, a.device)
    (m, k), n = a.shape, b.shape[1]
    if dtype == a.dtype or max(m, n) * k <= PIECE:
        return a.to(dtype) @ b.to(dtype)
    step = max(64, PIECE // max(k, 1))
    y = torch.empty(m, n, dtype=dtype, device=a.device)
    for columns in (slice(start, start + step) for start in range(0, n, step)):
        right = b[:, columns].to(dtype)
        for start in range(0, m, step):
            torch.mm(a[start : start + step].to(dtype), right, out=y[start : start + step, columns])
    return y
