"""Floating point as PTX rounds it: to nearest, ties to even, once. Floats are held as the bits that registers hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def widen_bf16(bits: Array) -> Array:
    """uint16 bits of bfloat16 -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: Array) -> Array:
    """float32 -> uint16 bits of bfloat16."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _towards_odd(nearest: Array, bits: Array, error: Array) -> Array:
    """A result rounded to nearest -> to odd: where it is inexact and even, its neighbour on the side of the exact value. Rounding that
    again, to a format of two bits less, is rounding once. bits: of nearest; error: exact - nearest, or one of its sign."""
    wrong = (error != 0) & (bits & 1 == 0) & np.isfinite(nearest)
    step = np.where((error > 0) != np.signbit(nearest), 1, -1)  # away from zero or to it
    return np.where(wrong, bits + step.astype(bits.dtype), bits).view(nearest.dtype)


def _sum_to_odd(a: Array, b: Array) -> Array:
    """a + b of float64, rounded to odd. The error is Knuth's two-sum's."""
    total = a + b
    part = total - a
    return _towards_odd(total, total.view(np.int64), (a - (total - part)) + (b - part))


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """The product of two float32 is exact in float64."""
    return _sum_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(np.float32)


def fma_f16(a: Array, b: Array, c: Array) -> Array:
    return _sum_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(np.float16)


def fma_bf16(a: Array, b: Array, c: Array) -> Array:
    """Of uint16 bits."""
    wide = [widen_bf16(bits).astype(np.float64) for bits in (a, b, c)]
    exact = _sum_to_odd(wide[0] * wide[1], wide[2])
    nearest = exact.astype(np.float32)
    return to_bf16(_towards_odd(nearest, nearest.view(np.int32), exact - nearest))


def halves(words: Array) -> tuple[Array, Array]:
    """uint32 [lanes] -> uint16 [lanes] twice, the low one first."""
    pairs = words.view(np.uint16).reshape(-1, 2)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


def word(low: Array, high: Array) -> Array:
    """Inverse of `halves`."""
    return np.stack((low.view(np.uint16), high.view(np.uint16)), -1).view(np.uint32)[:, 0]


def fma_f16x2(a: Array, b: Array, c: Array) -> Array:
    return word(*(fma_f16(*(part.view(np.float16) for part in parts)) for parts in zip(halves(a), halves(b), halves(c), strict=True)))


def fma_bf16x2(a: Array, b: Array, c: Array) -> Array:
    return word(*(fma_bf16(*parts) for parts in zip(halves(a), halves(b), halves(c), strict=True)))
