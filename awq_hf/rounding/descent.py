"""Coordinate descent on integers and scales, started from GPTQ.

The output error of a row, f = (w' - w) H (w' - w)^T with w' = (q - z) s, is a parabola in every single code and in every
scale, so each is moved to its best value while the others stay (QuantEase, arXiv 2309.01885, does so for the codes). With
R = (w' - w) H,

    code:   w'_j -> round(w'_j - R_j / H_jj)          scale:   s_g -> s_g - (R_g u_g) / (u_g H_gg u_g),   u = q - z

Each step lowers f or leaves it, so the result is never worse than GPTQ's on the statistic. A scale is rounded to float16
before it is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq_hf.affine import MAX_SCALE, MIN_SCALE, Grid, dequantize
from awq_hf.parallel import by_rows
from awq_hf.rounding.gptq import BLOCK, Prepared, round_rows

SWEEPS = 3


def round_by_descent(weight: Tensor, grid: Grid, H: Tensor, shrinkage: float = 0.0, sweeps: int = SWEEPS) -> tuple[Tensor, Grid]:  # noqa: N803
    """Codes float32 [out, in] of weight [out, in], and the grid with refitted scales, given H [in, in]."""
    prepared = Prepared.of(H, shrinkage)

    def piece(rows: slice) -> tuple[Tensor, Tensor]:
        codes = round_rows(weight[rows], grid.rows(rows), prepared)
        return _descend(weight[rows], codes, grid.rows(rows), prepared, sweeps)

    codes, scales = by_rows(piece, weight)
    return codes, Grid(scales, grid.zero_points, grid.spec)


def codes_by_descent(weight: Tensor, grid: Grid, H: Tensor, shrinkage: float = 0.0, sweeps: int = SWEEPS) -> Tensor:  # noqa: N803
    """The same on a grid that stays as it is: codes float32 [out, in]."""
    return codes_on_grid(weight, grid, Prepared.of(H, shrinkage), sweeps)


def codes_on_grid(weight: Tensor, grid: Grid, prepared: Prepared, sweeps: int = SWEEPS) -> Tensor:
    """The same for one of several weights with the same H."""

    def piece(rows: slice) -> Tensor:
        codes = round_rows(weight[rows], grid.rows(rows), prepared)
        return _descend(weight[rows], codes, grid.rows(rows), prepared, sweeps, refit=False)[0]

    return by_rows(piece, weight)


def _descend(weight: Tensor, codes: Tensor, grid: Grid, prepared: Prepared, sweeps: int, refit: bool = True) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, groups] after at most `sweeps` passes over all columns. refit: move scales as well."""
    H = prepared.H  # noqa: N806
    D = (dequantize(codes, grid) - weight).T.contiguous()  # noqa: N806  [in, out]: w' - w
    Q, scales, zero_points = codes.T.contiguous(), grid.scales.T.clone(), grid.zero_points.T.contiguous()  # noqa: N806
    width = len(Q) // len(scales)
    for _ in range(sweeps):
        before = Q.clone()
        for g in range(len(scales)):
            group = slice(g * width, (g + 1) * width)
            inner = H[group, group] + torch.diag(prepared.damp[group])  # [width, width]
            # [width, out]: only the group's own part of R is needed while it is worked on
            R = (H[group] @ D).addcmul_(prepared.damp[group, None], D[group])  # noqa: N806
            if refit:
                _refit_scale(Q[group], scales[g], zero_points[g], inner, R, D[group])
            for start in range(0, width, BLOCK):
                block = slice(start, min(start + BLOCK, width))
                _move_codes(Q[group][block], scales[g], inner[block], R, D[group][block], block, grid.spec.max_code)
        if torch.equal(before, Q):
            break
    return Q.T.contiguous(), scales.T.contiguous()


def _refit_scale(Q: Tensor, s: Tensor, z: Tensor, H: Tensor, R: Tensor, D: Tensor) -> None:  # noqa: N803
    """Move one group's scales s [out] to their best, in place, with R and D. Q, R, D: [width, out]; H: [width, width]."""
    u = Q - z
    uH = H @ u  # noqa: N806  [width, out]
    curvature = (uH * u).sum(0)  # u H_gg u^T of every row
    slope = (R * u).sum(0)
    moved = (s - slope / curvature.clamp(min=1e-30)).clamp(MIN_SCALE, MAX_SCALE).half().float()
    step = moved - s
    step = torch.where(2 * step * slope + step * step * curvature < 0, step, 0.0)
    s += step
    R.addcmul_(uH, step)
    D.addcmul_(u, step)


def _move_codes(Q: Tensor, s: Tensor, H: Tensor, R: Tensor, D: Tensor, block: slice, max_code: int) -> None:  # noqa: N803
    """Move the codes of some columns of a group, in place, with R [width, out] and D. Q, D: [columns, out]; H: [columns, width]."""
    inner = H[:, block]  # [columns, columns]
    r = R[block].clone()
    steps = torch.empty_like(Q)  # change of the dequantized weight
    inverse_diagonal = 1 / inner.diagonal()
    for j in range(len(Q)):
        moved = torch.clamp((Q[j] - r[j] * inverse_diagonal[j] / s).round_(), 0, max_code)
        torch.mul(moved - Q[j], s, out=steps[j])
        Q[j] = moved
        r[j + 1 :].addr_(inner[j, j + 1 :], steps[j])
    R.addmm_(H.T, steps)
    D.add_(steps)
