"""What a kernel is asked for: a Linear's shape, how its weight is stored, and what comes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """y [m, n] = x [m, k] W^T with W in groups of k / groups columns."""

    m: int
    n: int
    k: int
    groups: int  # of a row, unpadded
    dtype: torch.dtype  # of x
    device: str = "cuda"
    bits: int = 4
    scales: torch.dtype = torch.float16
