"""Rounding to the nearest code: q = round(w / s) + z."""

from __future__ import annotations

from torch import Tensor

from awq_hf.affine import Grid, quantize
from awq_hf.parallel import by_rows


def round_to_nearest(weight: Tensor, grid: Grid, _H: Tensor, _shrinkage: float = 0.0) -> tuple[Tensor, Grid]:  # noqa: N803
    return by_rows(lambda rows: quantize(weight[rows], grid.rows(rows)), weight), grid
