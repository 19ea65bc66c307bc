"""Superblocks of 256 weights whose 16 sub-blocks of 16 have a scale only: Q3_K and Q6_K.

weight = (d * scale) * (code - 4 or 32), d float16, scale a signed integer of 6 (Q3_K) or 8 bits. Packing takes d float32 [blocks],
scales int8 [blocks, 16], codes uint8 [blocks, 256]. Encoders: as in legacy.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awq_hf.exporters.gguf.blocks.k_affine import SUPER, importance_weights, quarters
from awq_hf.exporters.gguf.blocks.legacy import Bytes, as_bytes, columns, half
from awq_hf.exporters.gguf.blocks.search import (
    EPS,
    F,
    Floats,
    Integers,
    descended_search,
    first_largest,
    nearest,
    ordered_sum,
    symmetric_search,
)

Scales = NDArray[np.int8]


def pack_q3_k(d: Floats, scales: Scales, codes: Bytes) -> Bytes:
    s = (scales + 32).astype(np.uint8)  # [blocks, 16]
    low = (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4)
    h = (s >> 4).reshape(-1, 4, 4)
    high = h[:, 0] | (h[:, 1] << 2) | (h[:, 2] << 4) | (h[:, 3] << 6)
    third = np.packbits((codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    return as_bytes(third, quarters(codes & 3), low, high, half(d))


def pack_q6_k(d: Floats, scales: Scales, codes: Bytes) -> Bytes:
    c = codes.reshape(-1, 2, 4, 32)
    low = np.stack([(c[:, :, 0] & 15) | (c[:, :, 2] << 4), (c[:, :, 1] & 15) | (c[:, :, 3] << 4)], axis=2).reshape(-1, 128)
    return as_bytes(low, quarters(codes >> 4), scales, half(d))


def _rounded(x: Floats, d: Floats, scales: Scales, middle: int, searched: Integers) -> Bytes:
    """Codes [blocks, 256] for the scales as they are stored; sub-blocks without a scale keep the codes of the search."""
    step = (half(d).astype(F) * scales).reshape(-1)
    codes = np.clip(nearest(x / step), -middle, middle - 1) + middle
    return np.where(step != 0, codes, searched).T.astype(np.uint8).reshape(-1, SUPER)


def _largest_scale(scales: Floats, lowest: int) -> tuple[Floats, Floats]:
    """The scale of largest magnitude becomes `lowest`: (its magnitude, what to multiply scales by), both [blocks]."""
    magnitude, extreme = first_largest(np.ascontiguousarray(scales.T))
    return magnitude, np.where(extreme != 0, F(lowest) / extreme, F(0))


def encode_q3_k(rows: Floats, importance: Floats | None) -> Bytes:
    x = columns(rows, 16)
    if importance is None:
        found, searched = descended_search(x, 4)
        inverse = _largest_scale(found.reshape(-1, 16), -32)[1]
        scales = np.clip(nearest(inverse[:, None] * found.reshape(-1, 16)), -32, 31).astype(np.int8)
        d = np.where(inverse != 0, F(1) / inverse, F(0))
        scales[inverse == 0] = -32  # stored as zeros
    else:
        weights = importance_weights(rows, importance, 16, 2)
        found, searched = symmetric_search(x, weights, 4)
        d, codes_of_scales = symmetric_search(columns(found, 16), columns(ordered_sum(weights), 16), 32)
        scales = (codes_of_scales.T - 32).astype(np.int8)
    return pack_q3_k(d, scales, _rounded(x, d, scales, 4, searched)).reshape(len(rows), -1)


def encode_q6_k(rows: Floats, importance: Floats | None) -> Bytes:
    x = columns(rows, 16)
    weights = x * x if importance is None else np.tile(columns(importance, 16), (1, len(rows)))
    found, searched = symmetric_search(x, weights, 32)
    magnitude, inverse = _largest_scale(found.reshape(-1, 16), -128)
    scales = np.minimum(nearest(inverse[:, None] * found.reshape(-1, 16)), 127).astype(np.int8)
    d = F(1) / inverse
    packed = pack_q6_k(d, scales, _rounded(x, d, scales, 32, searched))
    packed[magnitude < EPS] = 0
    return packed.reshape(len(rows), -1)
