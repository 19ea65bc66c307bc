"""Codes for sixteen unevenly spaced values: IQ4_NL (blocks of 32, one scale) and IQ4_XS (superblocks of 256, eight 6-bit scales).

weight = (d * scale) * VALUES[code]; scale is 1 in IQ4_NL. Packing takes d float32 [blocks], scales int8 [blocks, 8] in -32..31,
codes uint8 [blocks, 32 or 256]. Encoders: as in legacy.py. Source: ggml, quantize_row_iq4_nl_impl.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awq_hf.exporters.gguf.blocks.legacy import Bytes, as_bytes, columns, half, nibbles
from awq_hf.exporters.gguf.blocks.search import EPS, F, Floats, first_largest, nearest, ordered_sum

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F)
# Midpoints between values are multiples of 1/2, so the nearest value depends on floor(2 x) alone: tables for floor(2 x) in -256..255.
CODE_OF = np.searchsorted((VALUES[:-1] + VALUES[1:]), np.arange(-256, 256), side="right").astype(np.uint8)
VALUE_OF = VALUES[CODE_OF]


def pack_iq4_nl(d: Floats, codes: Bytes) -> Bytes:
    return as_bytes(half(d), nibbles(codes))


def pack_iq4_xs(d: Floats, scales: NDArray[np.int8], codes: Bytes) -> Bytes:
    s = (scales + 32).astype(np.uint8)
    high = ((s >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
    low = (s[:, 0::2] & 15) | (s[:, 1::2] << 4)
    return as_bytes(half(d), high.astype("<u2")[:, None], low, nibbles(codes.reshape(-1, 8, 32)).reshape(-1, 128))


def _index(x: Floats) -> NDArray[np.intp]:
    """Where the tables hold the value nearest to x."""
    return np.floor(np.clip(x * F(2), F(-256), F(255))).astype(np.intp) + 256


def _search(x: Floats, weights: Floats) -> Floats:
    """Scales with x ~ scale * VALUES[code] of least weighted error. x, weights: [32, columns]; scales: [columns]."""
    magnitude, extreme = first_largest(x)
    zero = magnitude < EPS
    extreme = np.where(zero, F(1), extreme)

    def moments(inverse: Floats) -> tuple[Floats, Floats]:
        values = VALUE_OF[_index(inverse * x)]
        weighted = weights * values
        return ordered_sum(weighted * x), ordered_sum(weighted * values)

    along, square = moments(1 / (-extreme / VALUES[0]))
    scale = np.where(square > 0, along / square, F(0))
    best = scale * along
    for step in range(-7, 8):
        along, square = moments((F(step) + VALUES[0]) / extreme)
        better = (square > 0) & (along * along > best * square)
        scale = np.where(better, along / square, scale)
        best = np.where(better, scale * along, best)
    return np.where(zero, F(0), scale)


def _weights(rows: Floats, importance: Floats | None, width: int) -> Floats:
    """Weights of squared errors, [32, sub-blocks]; `width` weights share a mean square."""
    squares = (rows * rows).reshape(-1, width)
    if importance is None:
        return columns(squares, 32)
    mean = np.add.accumulate(squares, axis=1)[:, -1:] * F(2 / width)
    return columns(importance * np.sqrt(mean + squares).reshape(rows.shape), 32)


def encode_iq4_nl(rows: Floats, importance: Floats | None) -> Bytes:
    x = columns(rows, 32)
    d = _search(x, _weights(rows, importance, 32))
    codes = CODE_OF[_index(np.where(d != 0, 1 / d, F(0)) * x)]
    return pack_iq4_nl(d, codes.T).reshape(len(rows), -1)


def encode_iq4_xs(rows: Floats, importance: Floats | None) -> Bytes:
    x = columns(rows, 32)
    found = _search(x, _weights(rows, importance, 256)).reshape(-1, 8)
    d = -first_largest(np.ascontiguousarray(found.T))[1] / F(32)
    scales = np.clip(nearest(np.where(d != 0, 1 / d, F(0))[:, None] * found), -32, 31).astype(np.int8)
    step = (d[:, None] * scales).reshape(-1)
    codes = CODE_OF[_index(np.where(step != 0, 1 / step, F(0)) * x)]
    return pack_iq4_xs(d, scales, codes.T.reshape(-1, 256)).reshape(len(rows), -1)
