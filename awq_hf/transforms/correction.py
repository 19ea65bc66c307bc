"""Correction: aim a layer at what the float model's layer would have put out, given the input it really gets.

Layers before this one are quantized, so its input is x = x0 + e. The weight closest to the float output,
min_T E|T x - W x0|^2 (a linear regression; GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629, use the same idea), is

    T = W - c W P (H + damp mean(diag H) I)^-1,    P = E[e x^T],  H = E[x x^T]

Where the output is added to a residual stream that lacks d of what it was in the float model (folding/residual.py), the layer can make up
for as much of that as its input tells of: min_T E|T x - W x0 - d|^2 adds

    + b C (H + damp mean(diag H) I)^-1,    C = E[d x^T]

Regressions overfit; so the strengths c and b in [0, 1] are those that the held-out slice likes best, in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from awq_hf.calibration.stats import Moments, cross_moment
from awq_hf.parallel import by_rows

DAMP = 0.01


class Corrected(NamedTuple):
    """target: the matrix to round, float32 [out, in]; strength: c above; residual: b, None where there is nothing to make up for."""

    target: Tensor
    strength: float
    residual: float | None


def corrected_target(weight: Tensor, train: Moments, held: Moments | None) -> Corrected:
    """What to round instead of `weight`, float32 [out, in]."""
    P, C = train.P, train.C  # noqa: N806
    nothing = Corrected(weight, 0.0, None if C is None else 0.0)
    if P is None:
        return nothing
    H = train.H  # noqa: N806
    damped = H.clone()
    damped.diagonal().add_(DAMP * H.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if bool(failed):
        return nothing
    solved = lambda moment: torch.cholesky_solve(moment.T, factor).T  # noqa: E731
    steps = [by_rows(lambda rows: -solved(weight[rows] @ P), weight)]  # [out, in] each
    if C is not None:
        steps.append(by_rows(lambda rows: solved(C[rows]), weight))
    strengths = [1.0] * len(steps) if held is None or held.P is None else _best_strengths(weight, steps, held)
    target = weight + sum(strength * step for strength, step in zip(strengths, steps, strict=True))
    return Corrected(target, strengths[0], None if C is None else strengths[1])


def _best_strengths(weight: Tensor, steps: list[Tensor], held: Moments) -> list[float]:
    """argmin over each c_i in [0, 1] of E|(W + sum_i c_i steps_i) x - W x0 - d|^2 on the held-out slice: a paraboloid in c."""
    H = held.H  # noqa: N806
    cross = cross_moment(weight, held)
    assert cross is not None

    def terms(rows: slice) -> tuple[Tensor, ...]:
        products = [step[rows] @ H for step in steps]
        curvatures = [(product * step[rows]).sum(1) for product in products for step in steps]
        return (*curvatures, *((cross[rows] * step[rows]).sum(1) for step in steps))

    sums = [float(each.sum(dtype=torch.float64)) for each in by_rows(terms, weight)]
    if len(steps) == 1:
        return [_lowest(*sums)]
    a, ab, _, b, slope_a, slope_b = sums  # f(x, y) = a x^2 + 2 ab x y + b y^2 + 2 slope_a x + 2 slope_b y
    f = lambda c: a * c[0] ** 2 + 2 * ab * c[0] * c[1] + b * c[1] ** 2 + 2 * (slope_a * c[0] + slope_b * c[1])  # noqa: E731
    edges = [(x, _lowest(b, slope_b + ab * x)) for x in (0.0, 1.0)] + [(_lowest(a, slope_a + ab * y), y) for y in (0.0, 1.0)]
    determinant = a * b - ab * ab
    inside = [((ab * slope_b - b * slope_a) / determinant, (ab * slope_a - a * slope_b) / determinant)] if determinant > 0 else []
    return list(min([(0.0, 0.0), *edges, *(c for c in inside if min(c) >= 0 and max(c) <= 1)], key=f))


def _lowest(curvature: float, slope: float) -> float:
    """argmin over c in [0, 1] of curvature c^2 + 2 slope c."""
    return min(1.0, max(0.0, -slope / curvature)) if curvature > 0 else 0.0
