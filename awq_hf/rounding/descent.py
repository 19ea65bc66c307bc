"""Coordinate descent on integers and scales, started from GPTQ.

The output error of a row, f = (w' - w) H (w' - w)^T with w' = (q - z) s, is a parabola in every single code and in every
scale, so each is moved to its best value while the others stay (QuantEase, arXiv 2309.01885, does so for the codes). With
R = (w' - w) H kept up to date,

    code:   w'_j -> round(w'_j - R_j / H_jj)          scale:   s_g -> s_g - (R_g u_g) / (u_g H_gg u_g),   u = q - z

Each step lowers f or leaves it, so the result is never worse than GPTQ's on the statistic. A scale is rounded to float16
before it is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq_hf.affine import MAX_SCALE, MIN_SCALE, Grid, dequantize
from awq_hf.rounding.gptq import BLOCK, damped, round_by_gptq
from awq_hf.rounding.threads import one_thread_if_small

SWEEPS = 3


def round_by_descent(weight: Tensor, grid: Grid, H: Tensor, sweeps: int = SWEEPS) -> tuple[Tensor, Grid]:  # noqa: N803
    """Codes float32 [out, in] of weight [out, in], and the grid with refitted scales, given H [in, in]."""
    codes, grid = round_by_gptq(weight, grid, H)
    H = damped(H)  # noqa: N806
    R = ((dequantize(codes, grid) - weight) @ H).T.contiguous()  # noqa: N806  [in, out]
    Q, scales, zero_points = codes.T.contiguous(), grid.scales.T.clone(), grid.zero_points.T.contiguous()  # noqa: N806
    width = len(Q) // len(scales)
    for _ in range(sweeps):
        before = Q.clone()
        for g in range(len(scales)):
            group = slice(g * width, (g + 1) * width)
            _refit_scale(Q[group], scales[g], zero_points[g], H[group], R, group)
            for start in range(group.start, group.stop, BLOCK):
                block = slice(start, min(start + BLOCK, group.stop))
                _move_codes(Q[block], scales[g], zero_points[g], H[block], R, block, grid.spec.max_code)
        if torch.equal(before, Q):
            break
    return Q.T.contiguous(), Grid(scales.T.contiguous(), grid.zero_points, grid.spec)


def _refit_scale(Q: Tensor, s: Tensor, z: Tensor, H: Tensor, R: Tensor, group: slice) -> None:  # noqa: N803
    """Move one group's scales [out] to their best, in place, and update R [in, out]. Q: [width, out]; H: [width, in]."""
    u = Q - z
    uH = H.T @ u  # noqa: N806  [in, out]
    curvature = (uH[group] * u).sum(0)  # u H_gg u^T of every row
    slope = (R[group] * u).sum(0)
    moved = (s - slope / curvature.clamp(min=1e-30)).clamp(MIN_SCALE, MAX_SCALE).half().float()
    step = moved - s
    step = torch.where(2 * step * slope + step * step * curvature < 0, step, 0.0)
    s += step
    R.addcmul_(uH, step)


def _move_codes(Q: Tensor, s: Tensor, z: Tensor, H: Tensor, R: Tensor, block: slice, max_code: int) -> None:  # noqa: N803
    """Move the codes of some columns of one group, in place, and update R [in, out]. Q: [columns, out]; H: [columns, in]."""
    inner = H[:, block]  # [columns, columns]
    r = R[block].clone()
    steps = torch.empty_like(Q)  # change of the dequantized weight
    inverse_diagonal = 1 / inner.diagonal()
    with one_thread_if_small(Q):
        for j in range(len(Q)):
            moved = torch.clamp((Q[j] - r[j] * inverse_diagonal[j] / s).round_(), 0, max_code)
            torch.mul(moved - Q[j], s, out=steps[j])
            Q[j] = moved
            r[j + 1 :].addr_(inner[j, j + 1 :], steps[j])
    R.addmm_(H.T, steps)
