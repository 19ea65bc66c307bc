"""Linears that share an input, from float weights to codes, and the verdict of the held-out slice on each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from awq_hf.affine import Grid, choose_grid, dequantize
from awq_hf.calibration.stats import Moments, OutputError, output_energy
from awq_hf.recipe import Recipe
from awq_hf.representable import representable
from awq_hf.rounding import ROUNDERS, Rounder
from awq_hf.rounding.descent import codes_by_descent
from awq_hf.rounding.gptq import RoundingFailed
from awq_hf.spec import QuantSpec
from awq_hf.transforms.awq_clip import search_clip
from awq_hf.transforms.correction import Corrected, corrected_target

Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Rounded:
    """A weight's codes [out, in] and the grid they are on; clip: mean ratio of its steps to unclipped ones.

    correction, residual: its strengths (transforms/correction.py).
    rounding: what made the codes; fallback: why it is not what the recipe asks for, or None.
    """

    codes: Tensor
    grid: Grid
    rounding: str
    clip: float = 1.0
    correction: float = 0.0
    residual: float | None = None
    fallback: str | None = None

    def dequantized(self) -> Tensor:
        return dequantize(self.codes, self.grid)


def round_together(weights: list[Tensor], spec: QuantSpec, recipe: Recipe, train: Moments, held: Moments, timed: Timed) -> list[Rounded]:
    """Round weights that share an input, each float32 [out, in], as one matrix."""
    corrected = [Corrected(weight, 0.0, None) for weight in weights]
    if recipe.correction:
        with timed("correction"):
            corrected = [corrected_target(w, train, held) for w in weights]
    target, H = torch.cat([each.target for each in corrected]), train.H  # noqa: N806
    unclipped = start = choose_grid(target, spec)
    if recipe.clip is not None:
        with timed("clip search"):
            start = search_clip(target, H, spec, recipe.clip)
    start = _storable(start, target, recipe)
    method, failure = recipe.rounding, None
    with timed("rounding"):
        try:
            codes, grid = _rounder(recipe)(target, start, H, recipe.shrinkage)
        except RoundingFailed as error:
            method, failure = "nearest", str(error)
            codes, grid = ROUNDERS[method](target, start, H, recipe.shrinkage)
    rounded, row = [], 0
    for aim, strength, residual in corrected:
        rows = slice(row, row := row + len(aim))
        clip = float((start.scales[rows] / unclipped.scales[rows]).mean())
        rounded.append(Rounded(codes[rows], grid.rows(rows), method, clip, strength, residual, failure))
    return rounded


def _storable(grid: Grid, weight: Tensor, recipe: Recipe) -> Grid:
    """The grid with scales that the recipe's GGUF type holds exactly, where it names one."""
    if recipe.scales_for is None:
        return grid
    assert isinstance(grid.spec, QuantSpec)
    scales = representable(grid.scales, grid.zero_points, grid.spec, weight.shape[1], recipe.scales_for)
    return replace(grid, scales=scales)


def _rounder(recipe: Recipe) -> Rounder:
    """The recipe's rounding; scales that were chosen to be representable stay as they are."""
    if recipe.scales_for is not None and recipe.rounding == "descent":
        return lambda weight, grid, H, shrinkage: (codes_by_descent(weight, grid, H, shrinkage), grid)  # noqa: N803
    return ROUNDERS[recipe.rounding]


def best_of(
    found: Rounded, weight: Tensor, plain: float, error_of: OutputError, H: Tensor, recipe: Recipe  # noqa: N803
) -> tuple[Rounded, Tensor]:  # fmt: skip
    """`found`, unless plain rounding is better on the held-out slice: then simpler roundings take over, row by row.

    weight: float32 [out, in], uncorrected; plain: plain rounding's error; returns also the error of each row, [out].
    """
    errors = error_of(found.dequantized())
    loss = float(errors.sum())
    if loss <= plain:
        return found, errors
    spec = found.grid.spec
    assert isinstance(spec, QuantSpec)
    grids = [choose_grid(weight, spec)]
    if recipe.clip is not None:
        grids.append(search_clip(weight, H, spec, recipe.clip))
    codes, grid = found.codes, found.grid
    for simpler_grid in (_storable(each, weight, recipe) for each in grids):
        simpler, _ = ROUNDERS["nearest"](weight, simpler_grid, H, recipe.shrinkage)
        row_errors = error_of(dequantize(simpler, simpler_grid))
        better = (row_errors < errors)[:, None]  # output channels are independent of each other
        codes = torch.where(better, simpler, codes)
        pick = lambda a, b, better=better: torch.where(better, a, b)  # noqa: E731
        grid = Grid(pick(simpler_grid.scales, grid.scales), pick(simpler_grid.zero_points, grid.zero_points), grid.spec)
        errors = torch.minimum(row_errors, errors)
    lost = f"{found.rounding} lost to plain rounding on the held-out slice ({loss / max(plain, 1e-30):.2%} of its error)"
    return replace(found, codes=codes, grid=grid, rounding="the best of each row", fallback=lost), errors


class Judged(NamedTuple):
    """What was made of a weight, and errors on the held-out slice: plain rounding's, its own, and the output's energy."""

    best: Rounded
    plain: float
    loss: float
    energy: float


def judge(found: Rounded, weight: Tensor, plain: Tensor, train: Moments, held: Moments, recipe: Recipe) -> Judged:
    """weight: folded, float32 [out, in]; plain: the original weight, rounded to nearest, then folded."""
    error_of = OutputError(weight, held)
    loss_plain = float(error_of(plain).sum())
    best, errors = best_of(found, weight, loss_plain, error_of, train.H, recipe)
    return Judged(best, loss_plain, float(errors.sum()), float(output_energy(weight, held).sum()))
