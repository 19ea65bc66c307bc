"""Second moments of the inputs of Linears: the one statistic that the scale search, clipping and rounding read.

A Linear W whose weight becomes W' and whose input becomes x (it was x0 in the float model) has an output error of
E|W' x - W x0|^2. With D = W' - W, e = x - x0, and the expectation over calibration tokens, it expands exactly to

    tr(D H D^T) + 2 tr(D P^T W^T) + tr(W R W^T),    H = E[x x^T],  P = E[e x^T],  R = E[e e^T]

so that no activation is kept, and a candidate costs out * in^2 whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awq_hf.parallel import by_rows, in_parallel, row_pieces

ROWS_OF_MOMENTS = 256  # of [in, in] that one thread sums at a time


@dataclass
class Moments:
    """H, P and R above, as sums over tokens in float32 [in, in]. P and R stay None while the input has no error (x = x0)."""

    tokens: int = 0
    xx: Tensor | None = None
    ex: Tensor | None = None
    ee: Tensor | None = None

    def add(self, x: Tensor, x0: Tensor | None = None, want_ee: bool = False) -> None:
        """Count tokens in: x and x0 [tokens, in], any float dtype; x0 None where the streams are the same."""
        x = x.to(torch.float32)
        self.tokens += x.shape[0]
        self.xx = _accumulate(self.xx, x, x)
        if x0 is not None:
            e = x - x0.to(torch.float32)
            self.ex = _accumulate(self.ex, e, x)
            if want_ee:
                self.ee = _accumulate(self.ee, e, e)

    @property
    def H(self) -> Tensor:  # noqa: N802  (the papers' letter)
        """E[x x^T], float32 [in, in]."""
        if self.xx is None:
            raise RuntimeError("no calibration token reached this layer")
        return self.xx / self.tokens

    @property
    def P(self) -> Tensor | None:  # noqa: N802
        """E[e x^T], float32 [in, in], or None where e = 0."""
        return None if self.ex is None else self.ex / self.tokens

    @property
    def R(self) -> Tensor | None:  # noqa: N802
        """E[e e^T], float32 [in, in], or None where e = 0 or it was not asked for."""
        return None if self.ee is None else self.ee / self.tokens

    def scaled(self, scales: Tensor) -> Moments:
        """The moments of x / scales: what the folded Linear sees. scales: [in]."""
        outer = scales[:, None] * scales
        divide = lambda t: None if t is None else t / outer  # noqa: E731
        return Moments(self.tokens, divide(self.xx), divide(self.ex), divide(self.ee))


def _accumulate(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a^T b, [in, in], in place."""
    total = a.new_zeros(a.shape[1], b.shape[1]) if total is None else total
    in_parallel(lambda rows: total[rows].addmm_(a[:, rows].T, b), row_pieces(total, ROWS_OF_MOMENTS))
    return total


class OutputError:
    """E|W' x - W x0|^2 of every output channel for many W' of one W: what they share is computed once.

    weight: W, float32 [out, in].
    """

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        self.weight, self.H = weight, moments.H
        P, R = moments.P, moments.R  # noqa: N806
        self.cross = None if P is None else by_rows(lambda rows: weight[rows] @ P, weight)  # [out, in]; tr(D P^T W^T) = sum(D * (W P))
        self.constant = None if R is None else by_rows(lambda rows: ((weight[rows] @ R) * weight[rows]).sum(1), weight)  # [out]

    def __call__(self, changed: Tensor) -> Tensor:
        """changed: W', float32 [out, in] -> float32 [out]."""

        def piece(rows: slice) -> Tensor:
            d = changed[rows] - self.weight[rows]
            error = ((d @ self.H) * d).sum(1)
            return error if self.cross is None else error + 2 * (d * self.cross[rows]).sum(1)

        error: Tensor = by_rows(piece, changed)
        return error if self.constant is None else error + self.constant


def output_error(weight: Tensor, changed: Tensor, moments: Moments) -> Tensor:
    """E|changed x - weight x0|^2 of every output channel: [out, in], [out, in] -> float32 [out]."""
    return OutputError(weight, moments)(changed)


def output_energy(weight: Tensor, moments: Moments) -> Tensor:
    """E|weight x|^2 of every output channel: float32 [out]. The yardstick of a relative error."""
    H = moments.H  # noqa: N806
    return by_rows(lambda rows: ((weight[rows] @ H) * weight[rows]).sum(1), weight)
