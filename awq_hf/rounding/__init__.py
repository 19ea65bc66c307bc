"""Rounding methods: a weight and a grid in, integer codes on a (possibly refitted) grid out. One file per idea, one table."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from awq_hf.affine import Grid
from awq_hf.rounding.descent import round_by_descent
from awq_hf.rounding.gptq import round_by_gptq
from awq_hf.rounding.nearest import round_to_nearest

Rounder = Callable[[Tensor, Grid, Tensor, float], tuple[Tensor, Grid]]

# name -> function of (weight [out, in], grid, H [in, in], shrinkage of its correlations); each entry contains the one before it
ROUNDERS: dict[str, Rounder] = {
    "nearest": round_to_nearest,
    "gptq": round_by_gptq,
    "descent": round_by_descent,
}
