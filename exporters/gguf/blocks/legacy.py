"""Blocks of 32 weights with one float16 scale, and a minimum in the _1 types: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Packing takes codes uint8 [blocks, 32] in 0..15 or 0..31 (int8 in Q8_0); weight = d * (code - 8 or 16), or d * code + m. An encoder takes
rows float32 [n, k] and an importance float32 [k] or None, and returns uint8 [n, bytes]; both as ggml's ggml_quantize_chunk does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_hf.exporters.gguf.blocks.search import AffineSearch, F, Floats, first_largest, first_smallest, symmetric_search

Bytes = NDArray[Any]  # uint8, which numpy's annotations lose in shifts

TRIALS = [F(-0.9) + F(0.05) * F(step) for step in range(37)]  # to be added to the number of levels


def as_bytes(*parts: NDArray[np.generic]) -> Bytes:
    """Lay parts [blocks, ...] of any dtype side by side: uint8 [blocks, bytes]."""
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)


def half(x: Floats) -> NDArray[np.float16]:
    """float16 [blocks, 1], little-endian as in the file."""
    return x.astype("<f2")[:, None]


def nibbles(codes: Bytes) -> Bytes:
    """Codes [..., 2n] to bytes [..., n]: the first half of the codes in the low nibbles, the second in the high ones."""
    n = codes.shape[-1] // 2
    return (codes[..., :n] & 15) | (codes[..., n:] << 4)


def fifth_bits(codes: Bytes) -> Bytes:
    """The fifth bits of codes [blocks, 32], bit j of a 32-bit integer for code j: uint8 [blocks, 4]."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def pack_q4_0(d: Floats, codes: Bytes) -> Bytes:
    return as_bytes(half(d), nibbles(codes))


def pack_q4_1(d: Floats, m: Floats, codes: Bytes) -> Bytes:
    return as_bytes(half(d), half(m), nibbles(codes))


def pack_q5_0(d: Floats, codes: Bytes) -> Bytes:
    return as_bytes(half(d), fifth_bits(codes), nibbles(codes))


def pack_q5_1(d: Floats, m: Floats, codes: Bytes) -> Bytes:
    return as_bytes(half(d), half(m), fifth_bits(codes), nibbles(codes))


def pack_q8_0(d: Floats, codes: NDArray[np.int8]) -> Bytes:
    return as_bytes(half(d), codes)


def _reciprocal(d: Floats) -> Floats:
    return np.where(d != 0, F(1) / d, F(0))


def _truncate(x: Floats) -> Bytes:
    """Towards zero. Infinite and undefined values, from scales without a reciprocal, become 0."""
    return np.where(np.isfinite(x), x, F(0)).astype(np.int8).view(np.uint8)


def _importance(rows: Floats, importance: Floats) -> Floats:
    """What ggml weighs squared errors by: importance * sqrt(mean square of the row + x^2). [n, k]."""
    squares = rows * rows
    mean = np.add.accumulate(squares, axis=1)[:, -1:] / F(rows.shape[1])  # a running sum: in order
    return importance * np.sqrt(mean + squares)


def columns(rows: Floats, width: int) -> Floats:
    """[n, k] -> [width, blocks], contiguous."""
    return np.ascontiguousarray(rows.reshape(-1, width).T)


def _encode_0(rows: Floats, importance: Floats | None, half_codes: int) -> tuple[Floats, Bytes]:
    """d and codes of the types without a minimum."""
    x = columns(rows, 32)
    if importance is not None:
        d, found = symmetric_search(x, columns(_importance(rows, importance), 32), half_codes)
        return d, found.T.astype(np.uint8)
    d = first_largest(x)[1] / F(-half_codes)
    codes = np.minimum(_truncate(x * _reciprocal(d) + F(half_codes + 0.5)), 2 * half_codes - 1)
    return d, codes.T


def _encode_1(rows: Floats, importance: Floats | None, top: int) -> tuple[Floats, Floats, Bytes]:
    """d, m and codes of the types with a minimum."""
    x = columns(rows, 32)
    if importance is not None:
        search = AffineSearch(x, columns(_importance(rows, importance), 32), top, [trial + F(top) for trial in TRIALS])
        return search.scale, -search.minimum, search.codes().T.astype(np.uint8)
    low = first_smallest(x)
    d = (x.max(axis=0) - low + F(0)) / F(top)  # never -0
    return d, low, np.minimum(_truncate((x - low) * _reciprocal(d) + F(0.5)), top).T


def encode_q4_0(rows: Floats, importance: Floats | None) -> Bytes:
    return pack_q4_0(*_encode_0(rows, importance, 8)).reshape(len(rows), -1)


def encode_q5_0(rows: Floats, importance: Floats | None) -> Bytes:
    return pack_q5_0(*_encode_0(rows, importance, 16)).reshape(len(rows), -1)


def encode_q4_1(rows: Floats, importance: Floats | None) -> Bytes:
    return pack_q4_1(*_encode_1(rows, importance, 15)).reshape(len(rows), -1)


def encode_q5_1(rows: Floats, importance: Floats | None) -> Bytes:
    return pack_q5_1(*_encode_1(rows, importance, 31)).reshape(len(rows), -1)


def encode_q8_0(rows: Floats, importance: Floats | None) -> Bytes:
    """Round to nearest, halves away from zero; the importance is not used."""
    x = rows.reshape(-1, 32)
    d = np.abs(x).max(axis=1) / F(127)
    scaled = x * _reciprocal(d)[:, None]
    codes = _truncate(scaled + np.copysign(F(0.49999997), scaled))  # 0.5 less one bit, or 0.49999997 would become 1
    return pack_q8_0(d, codes.view(np.int8)).reshape(len(rows), -1)
