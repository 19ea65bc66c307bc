"""Correction: aim a layer at what the float model's layer would have put out, given the input it really gets.

Layers before this one are quantized, so its input is x = x0 + e. The weight closest to the float output,
min_T E|T x - W x0|^2 (a linear regression; GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629, use the same idea), is

    T = W - c W P (H + damp mean(diag H) I)^-1,    P = E[e x^T],  H = E[x x^T]

Regressions overfit; so the strength c in [0, 1] is the one that the held-out slice likes best, in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq_hf.calibration.stats import Moments
from awq_hf.parallel import by_rows

DAMP = 0.01


def corrected_target(weight: Tensor, train: Moments, held: Moments | None) -> tuple[Tensor, float]:
    """The matrix to round instead of `weight` (float32 [out, in]), and the strength c that was chosen."""
    if train.P is None:
        return weight, 0.0
    H = train.H  # noqa: N806
    damped = H.clone()
    damped.diagonal().add_(DAMP * H.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if bool(failed):
        return weight, 0.0
    P = train.P  # noqa: N806
    step = by_rows(lambda rows: -torch.cholesky_solve((weight[rows] @ P).T, factor).T, weight)  # [out, in]
    strength = 1.0 if held is None or held.P is None else _best_strength(weight, step, held)
    return weight + strength * step, strength


def _best_strength(weight: Tensor, step: Tensor, held: Moments) -> float:
    """argmin over c in [0, 1] of E|(W + c step) x - W x0|^2 on the held-out slice: a parabola in c."""
    assert held.P is not None
    H, P = held.H, held.P  # noqa: N806
    terms = lambda rows: ((step[rows] @ H * step[rows]).sum(1), (step[rows] @ P.T * weight[rows]).sum(1))  # noqa: E731
    curvature, slope = (float(each.sum(dtype=torch.float64)) for each in by_rows(terms, weight))
    return min(1.0, max(0.0, -slope / curvature)) if curvature > 0 else 0.0
