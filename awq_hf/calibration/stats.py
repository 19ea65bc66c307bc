"""Second moments of the inputs of Linears: the one statistic that the scale search, clipping and rounding read.

A Linear W whose weight becomes W' and whose input becomes x (it was x0 in the float model) has an output error of
E|W' x - W x0|^2. With D = W' - W, e = x - x0, and the expectation over calibration tokens, it expands exactly to

    tr(D H D^T) + 2 tr(D P^T W^T) + tr(W R W^T),    H = E[x x^T],  P = E[e x^T],  R = E[e e^T]

so that no activation is kept, and a candidate costs out * in^2 whatever the number of tokens.

Where the output is added to a residual stream that is r by now and was r0 in the float model, it may as well make up for what that lacks,
d = r0 - r. The error of the sum, E|W' x - W x0 - d|^2, has three more terms:

    - 2 tr(D C^T) - 2 tr(W K^T) + sum S,    C = E[d x^T],  K = E[d e^T],  S = E[d^2] of each channel
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq_hf.parallel import by_rows, in_parallel, row_pieces

ROWS_OF_MOMENTS = 256  # of [in, in] that one thread sums at a time


class Moments:
    """H, P and R above, float32 [in, in]. P and R are None while the input has no error (x = x0). C and K [out, in] and S [out] are there
    if the output is to make up for something.

    Sums while tokens are added; the first read divides them in place, since these matrices are the largest of a run.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._divided = False

    def add(self, x: Tensor, x0: Tensor | None = None, want_ee: bool = False, d: Tensor | None = None) -> None:
        """Count tokens in: x and x0 [tokens, in], any float dtype; x0 None where the streams are the same. want_ee: R, K and S are needed.

        d: what the residual stream lacks, float32 [tokens, out], always or never.
        """
        if self._divided:
            raise RuntimeError("the moments have been read; no tokens can be added")
        x = x.to(torch.float32)
        self.tokens += x.shape[0]
        self._accumulate("H", x, x)
        if x0 is not None:
            e = x - x0.to(torch.float32)
            self._accumulate("P", e, x)
            if want_ee:
                self._accumulate("R", e, e)
            if d is not None:
                self._accumulate("C", d, x)
            if d is not None and want_ee:
                self._accumulate("K", d, e)
                self._sums["S"] = self._sums.get("S", 0) + d.square().sum(0)

    def _accumulate(self, name: str, a: Tensor, b: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = a.new_zeros(a.shape[1], b.shape[1])
        total = self._sums[name]
        in_parallel(lambda rows: total[rows].addmm_(a[:, rows].T, b), row_pieces(total, ROWS_OF_MOMENTS))

    def _mean(self, name: str) -> Tensor | None:
        if not self._divided:
            for total in self._sums.values():
                total.div_(self.tokens)
            self._divided = True
        return self._sums.get(name)

    @property
    def H(self) -> Tensor:  # noqa: N802  (the papers' letter)
        """E[x x^T]"""
        if not self.tokens:
            raise RuntimeError("no calibration token reached this layer")
        H = self._mean("H")  # noqa: N806
        assert H is not None
        return H

    @property
    def P(self) -> Tensor | None:  # noqa: N802
        """E[e x^T], or None where e = 0."""
        return self._mean("P")

    @property
    def R(self) -> Tensor | None:  # noqa: N802
        """E[e e^T], or None where e = 0 or it was not asked for."""
        return self._mean("R")

    @property
    def C(self) -> Tensor | None:  # noqa: N802
        """E[d x^T], or None where the output makes up for nothing."""
        return self._mean("C")

    @property
    def K(self) -> Tensor | None:  # noqa: N802
        """E[d e^T], or None where the output makes up for nothing or it was not asked for."""
        return self._mean("K")

    @property
    def S(self) -> Tensor | None:  # noqa: N802
        """E[d^2] of each channel, or None as K."""
        return self._mean("S")

    def scaled(self, scales: Tensor) -> Moments:
        """The moments H, P and R of x / scales: what the folded Linear sees. scales: [in]."""
        outer = scales[:, None] * scales
        result = Moments()
        result.tokens, result._divided = self.tokens, self._divided
        result._sums = {name: total / outer for name, total in self._sums.items()}
        return result

    def with_white_noise(self, share: float) -> Moments:
        """The moments of x with noise added that is alike in all channels, and has `share` of x's mean energy: H + share mean(diag H) I."""
        result = Moments()
        result.tokens, result._divided = self.tokens, True
        result._sums = {"H": self.H.clone()}
        result._sums["H"].diagonal().add_(share * self.H.diagonal().mean())
        return result

    def mixed(self, other: Moments, share: float) -> Moments:
        """share of these moments and the rest of `other`'s; these alone from a share of 1 on."""
        if share >= 1:
            return self
        result = Moments()
        result.tokens, result._divided = self.tokens + other.tokens, True
        for name in other._sums:
            rest = other._mean(name)
            own = self._mean(name) if self.tokens else None
            assert rest is not None
            result._sums[name] = rest if own is None else share * own + (1 - share) * rest
        return result


def cross_moment(weight: Tensor, moments: Moments) -> Tensor | None:
    """W P - C: E[(W e - d) x^T], float32 [out, in], what the output error before any rounding has to do with x; None without an error."""
    P, C = moments.P, moments.C  # noqa: N806
    if P is None:
        return None
    cross: Tensor = by_rows(lambda rows: weight[rows] @ P if C is None else weight[rows] @ P - C[rows], weight)
    return cross


class OutputError:
    """E|W' x - W x0|^2, or E|W' x - W x0 - d|^2, of every output channel for many W' of one W: what they share is computed once.

    weight: W, float32 [out, in].
    """

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        self.weight, self.H = weight, moments.H
        R, K, S = moments.R, moments.K, moments.S  # noqa: N806
        self.cross = cross_moment(weight, moments)  # tr(D P^T W^T) - tr(D C^T) = sum(D * (W P - C))
        self.constant = None if R is None else by_rows(lambda rows: ((weight[rows] @ R) * weight[rows]).sum(1), weight)  # [out]
        if self.constant is not None and K is not None and S is not None:
            self.constant += S - 2 * (weight * K).sum(1)

    def __call__(self, changed: Tensor) -> Tensor:
        """changed: W', float32 [out, in] -> float32 [out]."""

        def piece(rows: slice) -> Tensor:
            d = changed[rows] - self.weight[rows]
            error = ((d @ self.H) * d).sum(1)
            return error if self.cross is None else error + 2 * (d * self.cross[rows]).sum(1)

        error: Tensor = by_rows(piece, changed)
        return error if self.constant is None else error + self.constant


def output_error(weight: Tensor, changed: Tensor, moments: Moments) -> Tensor:
    """E|changed x - weight x0|^2, or E|changed x - weight x0 - d|^2, of every output channel: [out, in], [out, in] -> float32 [out]."""
    return OutputError(weight, moments)(changed)


def output_energy(weight: Tensor, moments: Moments) -> Tensor:
    """E|weight x|^2 of every output channel: float32 [out]. The yardstick of a relative error."""
    H = moments.H  # noqa: N806
    return by_rows(lambda rows: ((weight[rows] @ H) * weight[rows]).sum(1), weight)
