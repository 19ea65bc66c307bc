"""GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1) on a grid that is fixed beforehand.

Columns are rounded one after the other, and the error of each is spread over those still to come:

    q_j = round(w_j),   err = (w_j - q_j) / U_jj,   W_:,j+1: -= err U_j,j+1:        H^-1 = U^T U

Columns are taken in the order of decreasing diag H ("act-order"). Since scales are chosen per group beforehand, the
order leaves no trace in the result: no g_idx is needed.

What is fitted to the correlations of one text's channels should hold for others. So they can be shrunk towards none, as in Ledoit and Wolf
(A well-conditioned estimator for large-dimensional covariance matrices, 2004): (1 - c) H + c diag(H) for a shrinkage c in [0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awq_hf.affine import Grid
from awq_hf.parallel import by_rows

DAMP = 0.01  # of mean(diag H), added to the diagonal
BLOCK = 128  # columns between two updates of the rest of the matrix


class RoundingFailed(ArithmeticError):
    """The statistic is not usable (not positive definite even when damped, or not finite)."""


def damping(H: Tensor, shrinkage: float = 0.0) -> Tensor:  # noqa: N803
    """What is added to the diagonal of H, [in], so that it is shrunk, but for a factor of 1 - c, and can be inverted.

    DAMP mean(diag H) + c / (1 - c) diag H; 1 for a channel that is always zero.
    """
    diagonal = H.diagonal()
    return torch.where(diagonal == 0, 1.0, DAMP * diagonal.mean() + shrinkage / (1 - shrinkage) * diagonal)


def inverse_factor(H: Tensor, damp: Tensor, order: Tensor) -> Tensor:  # noqa: N803
    """U upper triangular with (H + diag damp)^-1 = U^T U, rows and columns of H taken in `order`. Raises RoundingFailed."""
    permuted = H[order[:, None], order]
    permuted.diagonal().add_(damp[order])
    L, failed = torch.linalg.cholesky_ex(permuted)  # noqa: N806
    del permuted  # these are the largest matrices of a run
    if not bool(failed):
        inverse = torch.cholesky_inverse(L)
        del L
        U, failed = torch.linalg.cholesky_ex(inverse, upper=True)  # noqa: N806
        if not bool(failed) and bool(torch.isfinite(U).all()):
            return U
    raise RoundingFailed("the second moment of the layer's input is not positive definite")


@dataclass(frozen=True)
class Prepared:
    """What the rows of a weight share: H [in, in], the damping of its diagonal [in], columns by decreasing diag H, and their factor U."""

    H: Tensor
    damp: Tensor
    order: Tensor
    U: Tensor

    @classmethod
    def of(cls, H: Tensor, shrinkage: float) -> Prepared:  # noqa: N803
        damp = damping(H, shrinkage)
        order = (H.diagonal() + damp).argsort(descending=True, stable=True)
        return cls(H, damp, order, inverse_factor(H, damp, order))


def round_by_gptq(weight: Tensor, grid: Grid, H: Tensor, shrinkage: float = 0.0) -> tuple[Tensor, Grid]:  # noqa: N803
    """Codes float32 [out, in] of weight [out, in] on `grid`, given H [in, in]. The grid is returned as it came."""
    prepared = Prepared.of(H, shrinkage)
    return by_rows(lambda rows: round_rows(weight[rows], grid.rows(rows), prepared), weight), grid


def round_rows(weight: Tensor, grid: Grid, prepared: Prepared) -> Tensor:
    """Codes float32 [out, in] of some rows: output channels are independent of each other."""
    order, U = prepared.order, prepared.U  # noqa: N806
    scales, zero_points = (t[:, order].T.contiguous() for t in grid.expand(weight.shape[1]))  # [in, out]: columns are contiguous
    W = weight[:, order].T.contiguous()  # noqa: N806
    Q = torch.empty_like(W)  # noqa: N806
    for start in range(0, len(W), BLOCK):
        stop = min(start + BLOCK, len(W))
        errors = _round_block(W[start:stop], Q[start:stop], scales[start:stop], zero_points[start:stop], U[start:stop, start:stop], grid)
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    codes = torch.empty_like(W)
    codes[order] = Q
    return codes.T.contiguous()


def _round_block(W: Tensor, Q: Tensor, scales: Tensor, zero_points: Tensor, U: Tensor, grid: Grid) -> Tensor:  # noqa: N803
    """Round the columns of one block in place (all [columns, out]); returns their errors [columns, out]."""
    errors = torch.empty_like(W)
    for j in range(len(W)):
        s, z = scales[j], zero_points[j]
        torch.clamp((W[j] / s).round_().add_(z), 0, grid.spec.max_code, out=Q[j])
        torch.div(W[j] - (Q[j] - z) * s, U[j, j], out=errors[j])
        W[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return errors
