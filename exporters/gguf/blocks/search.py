"""The searches for scales inside ggml's quantizers, for many sub-blocks at once and with ggml's results bit for bit.

Every array is float32 and lies [weights of a sub-block, sub-blocks], so that numpy works across sub-blocks while each sum runs over the
weights of one sub-block in their order, as the C code's does. No operation is fused: ggml's builds for x86-64 have no FMA here.
Source: ggml, src/ggml-quants.c (make_qkx2_quants, make_qkx3_quants, make_qx_quants, make_q3_quants, make_qp_quants).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

F = np.float32
EPS = F(1e-15)  # sub-blocks whose weights are all smaller are zero
MAGIC = F(1.5 * 2**23)  # x + MAGIC holds the integer nearest to x in its low 23 bits
REACH = 4194303  # the largest integer of which that is true


def nearest(x: Floats) -> Integers:
    """The nearest integer, halves to even; and what ggml gets for values beyond REACH, infinities and NaN."""
    return ((x + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


def ordered_sum(x: Floats) -> Floats:
    """Sum over the first axis, first to last, rounded at every step (one column alone would be summed pairwise)."""
    total: Floats = np.add.reduce(x, axis=0) if x.shape[1] > 1 else np.add.accumulate(x, axis=0)[-1]
    return total


def first_largest(x: Floats) -> tuple[Floats, Floats]:
    """The largest magnitude of each column, and the first value that has it, with its sign; never -0."""
    magnitudes = np.abs(x)
    index = magnitudes.argmax(axis=0)[None]
    return np.take_along_axis(magnitudes, index, 0)[0], np.take_along_axis(x, index, 0)[0] + F(0)


def first_smallest(x: Floats) -> Floats:
    """The smallest value of each column; of zeros the first, with its sign, which becomes the sign of a stored minimum."""
    smallest: Floats = x.min(axis=0)
    zero = smallest == 0
    if zero.any():
        index = (x == 0).argmax(axis=0)[None]
        smallest = np.where(zero, np.take_along_axis(x, index, 0)[0], smallest)
    return smallest


def pick(mask: NDArray[np.bool_], one: Floats | np.float32, other: Floats | np.float32) -> Floats:
    chosen: Floats = np.where(mask, one, other)  # numpy's annotations lose the dtype
    return chosen


class AffineSearch:
    """Scales and minimums with x ~ scale * code - minimum, code in 0..top, minimum >= 0, of least weighted error.

    x, weights: [n, columns]. trials: the numbers of levels to spread each range over, float32. absolute: errors are |x|, not squared.
    Results: scale, minimum: [columns].
    """

    def __init__(self, x: Floats, weights: Floats, top: int, trials: Sequence[np.float32], absolute: bool = False) -> None:
        self.x, self.weights, self.top, self.absolute = x, weights, F(top), absolute
        self.lowest, self.highest = first_smallest(x), x.max(axis=0)
        low = pick(self.lowest > 0, F(0), self.lowest)
        self.flat = self.highest <= low
        self._buffer, self._product = np.empty_like(x), np.empty_like(x)
        inverse = self._inverse(self.top, low)
        scale = pick(self.flat, F(0), F(1) / inverse)
        codes = self._codes_into(np.empty_like(x), low, inverse)
        error = self._error(codes, scale, low)
        used = inverse, low  # what the codes of the best so far come from
        sum_w, sum_x = ordered_sum(weights), ordered_sum(weights * x)
        for trial in trials:
            inverse = self._inverse(trial, low)
            self._codes_into(codes, low, inverse)
            sum_l, sum_l2, sum_xl = self._moments(codes)
            determinant = sum_w * sum_l2 - sum_l * sum_l
            new_scale = np.divide(sum_w * sum_xl - sum_x * sum_l, determinant)
            new_low = np.divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
            positive = new_low > 0
            new_scale = pick(positive, sum_xl / sum_l2, new_scale)
            new_low = pick(positive, F(0), new_low)
            new_error = self._error(codes, new_scale, new_low)
            better = (determinant > 0) & (new_error < error)  # false for flat columns
            used = pick(better, inverse, used[0]), pick(better, low, used[1])
            scale, low, error = pick(better, new_scale, scale), pick(better, new_low, low), pick(better, new_error, error)
        self.scale, self.minimum, self._used = scale, -low, used

    def codes(self) -> Floats:
        """The codes that the search ended with, before scales were rounded."""
        inverse, low = self._used
        return self._codes_into(np.empty_like(self.x), low, inverse)

    def _inverse(self, levels: np.float32, low: Floats) -> Floats:
        return pick(self.flat, F(0), levels / (self.highest - low))

    def _codes_into(self, out: Floats, low: Floats, inverse: Floats) -> Floats:
        np.multiply(np.subtract(self.x, low, out=out), inverse, out=out)
        farthest = np.abs(inverse) * np.maximum(self.highest - low, low - self.lowest)
        if farthest.max() < REACH:  # false for NaN
            np.rint(out, out=out)
        else:  # denormal or infinite ranges
            out[:] = nearest(out)
        return np.clip(out, F(0), self.top, out=out)

    def _moments(self, codes: Floats) -> tuple[Floats, Floats, Floats]:
        """Weighted sums of the codes, their squares, and their products with x."""
        wl = np.multiply(self.weights, codes, out=self._buffer)
        first = ordered_sum(wl)
        second = ordered_sum(np.multiply(wl, codes, out=self._product))
        return first, second, ordered_sum(np.multiply(wl, self.x, out=self._product))

    def _error(self, codes: Floats, scale: Floats, low: Floats) -> Floats:
        difference = np.multiply(codes, scale, out=self._buffer)
        difference += low
        difference -= self.x
        np.abs(difference, out=difference) if self.absolute else np.multiply(difference, difference, out=difference)
        return ordered_sum(np.multiply(difference, self.weights, out=difference))


def symmetric_search(x: Floats, weights: Floats, half: int) -> tuple[Floats, Integers]:
    """Scales with x ~ scale * (code - half), code in 0..2 half - 1, of least weighted error; and the codes. Codes of zero columns are 0."""
    magnitude, extreme = first_largest(x)
    zero = magnitude < EPS
    extreme = pick(zero, F(1), extreme)
    weighted = weights * x
    codes, product = np.empty_like(x), np.empty_like(x)

    def moments(inverse: Floats) -> tuple[Floats, Floats]:
        np.rint(np.multiply(x, inverse, out=codes), out=codes)
        np.clip(codes, F(-half), F(half - 1), out=codes)
        along = ordered_sum(np.multiply(weighted, codes, out=product))
        np.multiply(weights, codes, out=product)
        return along, ordered_sum(np.multiply(product, codes, out=product))

    used = F(-half) / extreme
    along, square = moments(used)
    scale = pick(square != 0, along / square, F(0))
    best = scale * along
    for step in [*range(-9, 0), *range(1, 10)]:
        inverse = -(F(half) + F(0.1) * F(step)) / extreme
        along, square = moments(inverse)
        better = (square > 0) & (along * along > best * square)
        used = pick(better, inverse, used)
        scale = pick(better, along / square, scale)
        best = pick(better, scale * along, best)
    moments(used)
    return pick(zero, F(0), scale), np.where(zero, 0, codes.astype(np.int32) + half)


def descended_search(x: Floats, half: int) -> tuple[Floats, Integers]:
    """As `symmetric_search` with weights x^2, but from the plain rounding each code moves in turn while that helps, five times round."""
    magnitude, extreme = first_largest(x)
    zero = magnitude < EPS
    codes = np.clip(nearest(F(-half) / pick(zero, F(1), extreme) * x), -half, half - 1)
    weights = x * x
    along, square = ordered_sum(weights * x * codes.astype(F)), ordered_sum(weights * codes.astype(F) * codes.astype(F))
    for _ in range(5):
        along, square, changed = _descend(x, weights, codes, along, square, -half, half - 1, F(-np.inf))
        if not changed:
            break
    scale = pick(square > 0, along / square, F(0))
    return pick(zero, F(0), scale), np.where(zero, 0, codes + half)


def _descend(
    x: Floats, weights: Floats, codes: Integers, along: Floats, square: Floats, lowest: int, highest: int, floor: np.float32
) -> tuple[Floats, Floats, bool]:
    """Move each code in turn, in place, to where the others want it; return the sums that follow, and whether any moved.

    floor: a code is left alone unless the others' sum of squares is above it.
    """
    changed = False
    for i in range(len(x)):
        code, weighted = codes[i].astype(F), weights[i] * x[i]
        along_rest, square_rest = along - weighted * code, square - weights[i] * code * code
        wanted = np.clip(nearest(x[i] * square_rest / along_rest), lowest, highest)
        new = wanted.astype(F)
        new_along, new_square = along_rest + weighted * new, square_rest + weights[i] * new * new
        better = (along_rest > 0) & (square_rest > floor) & (wanted != codes[i])
        better &= (new_square > 0) & (new_along * new_along * square > along * along * new_square)
        codes[i] = np.where(better, wanted, codes[i])
        along, square = pick(better, new_along, along), pick(better, new_square, square)
        changed |= bool(better.any())
    return along, square, changed


def positive_search(x: Floats, weights: Floats, top: int) -> tuple[Floats, Integers]:
    """Scales with x ~ scale * code, code in 0..top, of least weighted error, and the codes: for the scales of a superblock's sub-blocks.

    x is not negative but by rounding errors, where a sub-block's importance is nearly all zero. ggml keeps such codes modulo 256.
    """
    highest = x.max(axis=0)
    zero = ~(highest >= EPS)
    highest = pick(zero, F(1), highest)
    used = F(top) / highest
    best = _spread_error(x, weights, nearest(used * x) & 0xFF, F(1) / used)
    for step in [*range(-4, 0), *range(1, 5)]:
        inverse = (F(0.1) * F(step) + F(top)) / highest
        error = _spread_error(x, weights, np.minimum(nearest(inverse * x), top), F(1) / inverse)
        used, best = pick(error < best, inverse, used), pick(error < best, error, best)
    codes = np.minimum(nearest(used * x), top)
    along, square = ordered_sum(weights * x * codes.astype(F)), ordered_sum(weights * codes.astype(F) * codes.astype(F))
    codes &= 0xFF
    for _ in range(5):
        along, square, changed = _descend(x, weights, codes, along, square, -REACH - 1, top, F(0))
        codes &= 0xFF
        if not changed:
            break
    scale = pick(square > 0, along / square, F(0))
    return pick(zero, F(0), scale), np.where(zero, 0, codes)


def _spread_error(x: Floats, weights: Floats, codes: Integers, scale: Floats) -> Floats:
    difference = x - scale * codes.astype(F)
    return ordered_sum(weights * difference * difference)
