"""Superblocks of 256 weights whose sub-blocks have a scale and a minimum: Q2_K (16 of 16), Q4_K and Q5_K (8 of 32).

weight = (d * scale) * code - (dmin * minimum), d and dmin float16, scale and minimum integers of 4 (Q2_K) or 6 bits. Packing takes
d, dmin float32 [blocks], scales, minimums uint8 [blocks, sub-blocks], codes uint8 [blocks, 256]. Encoders: as in legacy.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from awq_hf.exporters.gguf.blocks.legacy import TRIALS, Bytes, as_bytes, columns, half
from awq_hf.exporters.gguf.blocks.search import AffineSearch, F, Floats, nearest, ordered_sum, positive_search

SUPER = 256


def quarters(codes: Bytes) -> Bytes:
    """2-bit codes [blocks, 256] -> [blocks, 64]: byte l of each 32 holds codes l, l + 32, l + 64, l + 96 of its half of the superblock."""
    c = codes.reshape(-1, 2, 4, 32)
    return (c[:, :, 0] | (c[:, :, 1] << 2) | (c[:, :, 2] << 4) | (c[:, :, 3] << 6)).reshape(-1, 64)


def six_bits(scales: Bytes, minimums: Bytes) -> Bytes:
    """8 + 8 integers of 6 bits -> [blocks, 12]: the first four of each whole, the others' low nibbles, their high bits above the first."""
    low = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    high = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    return np.concatenate([low, high, (scales[:, 4:] & 15) | (minimums[:, 4:] << 4)], axis=1)


def split_six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Inverse of `six_bits`."""
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (low & 15) | ((first >> 6) << 4)], axis=1)
    return scales, np.concatenate([second & 63, (low >> 4) | ((second >> 6) << 4)], axis=1)


def pack_q2_k(d: Floats, dmin: Floats, scales: Bytes, minimums: Bytes, codes: Bytes) -> Bytes:
    return as_bytes(scales | (minimums << 4), quarters(codes), half(d), half(dmin))


def pack_q4_k(d: Floats, dmin: Floats, scales: Bytes, minimums: Bytes, codes: Bytes) -> Bytes:
    c = codes.reshape(-1, 4, 2, 32)
    return as_bytes(half(d), half(dmin), six_bits(scales, minimums), (c[:, :, 0] | (c[:, :, 1] << 4)).reshape(-1, 128))


def pack_q5_k(d: Floats, dmin: Floats, scales: Bytes, minimums: Bytes, codes: Bytes) -> Bytes:
    fifth = np.packbits((codes >> 4).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    return as_bytes(half(d), half(dmin), six_bits(scales, minimums), fifth, pack_q4_k(d, dmin, scales, minimums, codes & 15)[:, 16:])


@dataclass(frozen=True)
class Family:
    """What tells the three types' encoders apart. trials: numbers of levels tried without importance."""

    width: int  # of a sub-block
    top: int  # the highest code
    top_scale: int
    trials: list[np.float32]
    sigma: float  # the block's mean square, times this, is added to x^2 in the importance


Q2_K = Family(16, 3, 15, [F(-0.5) + F(0.1) * F(step) for step in range(16)], 1)
Q4_K = Family(32, 15, 63, [F(-1) + F(0.1) * F(step) for step in range(21)], 2)
Q5_K = Family(32, 31, 63, [F(-0.5) + F(0.1) * F(step) for step in range(16)], 2)


def importance_weights(rows: Floats, importance: Floats, width: int, sigma: float) -> Floats:
    """ggml's weights of squared errors: importance * sqrt(sigma * mean square of the superblock + x^2). [width, sub-blocks]."""
    squares = (rows * rows).reshape(-1, SUPER)
    mean = F(sigma) * np.add.accumulate(squares, axis=1)[:, -1:] / F(SUPER)
    roots = np.sqrt(mean + squares).reshape(rows.shape)
    return columns(importance * roots, width)


def _plain_weights(x: Floats, family: Family) -> Floats:
    if family is Q2_K:
        return np.abs(x)
    return np.sqrt(ordered_sum(x * x) / F(32)) + np.abs(x)


def _plain_codes(values: Floats, top: int) -> tuple[Floats, Bytes]:
    """The largest of each superblock's values [blocks, sub-blocks] becomes `top`: (unit [blocks], codes)."""
    largest = values.max(axis=1)
    largest = np.where(largest > 0, largest, F(0))
    inverse = np.where(largest > 0, F(top) / largest, F(0))
    return largest / F(top), np.minimum((nearest(inverse[:, None] * values) & 0xFF), top).astype(np.uint8)


def _as_stored(scales: Bytes, minimums: Bytes, family: Family) -> tuple[Bytes, Bytes]:
    """What is read back of codes that `positive_search` may have left above the highest: bits that overlap their neighbours'."""
    if family is Q2_K:
        both = scales | (minimums << 4)
        return both & 15, both >> 4
    if family is Q5_K:
        return np.minimum(scales, 63), np.minimum(minimums, 63)
    return split_six_bits(six_bits(scales, minimums))


def _encode(rows: Floats, importance: Floats | None, family: Family) -> tuple[Floats, Floats, Bytes, Bytes, Bytes]:
    x = columns(rows, family.width)
    subs = SUPER // family.width
    if importance is None:
        trials = [trial + F(family.top) for trial in family.trials]
        search = AffineSearch(x, _plain_weights(x, family), family.top, trials, absolute=family is Q2_K)
        d, scales = _plain_codes(search.scale.reshape(-1, subs), family.top_scale)
        dmin, minimums = _plain_codes(search.minimum.reshape(-1, subs), family.top_scale)
    else:
        weights = importance_weights(rows, importance, family.width, family.sigma)
        search = AffineSearch(x, weights, family.top, [trial + F(family.top) for trial in TRIALS])
        sums = columns(ordered_sum(weights), subs)
        d, found_scales = positive_search(columns(search.scale, subs), sums, family.top_scale)
        dmin, found_minimums = positive_search(columns(search.minimum, subs), sums, family.top_scale)
        scales, minimums = _as_stored(found_scales.T.astype(np.uint8), found_minimums.T.astype(np.uint8), family)
    step = (half(d).astype(F) * scales).reshape(-1)
    offset = (half(dmin).astype(F) * minimums).reshape(-1)
    codes: Floats = np.clip(nearest((x + offset) / step), 0, family.top)
    if not step.all():  # sub-blocks without a scale keep the codes of the search, which mean nothing
        codes = np.where(step != 0, codes, search.codes())
    return d, dmin, scales, minimums, codes.T.astype(np.uint8).reshape(-1, SUPER)


def encode_q2_k(rows: Floats, importance: Floats | None) -> Bytes:
    return pack_q2_k(*_encode(rows, importance, Q2_K)).reshape(len(rows), -1)


def encode_q4_k(rows: Floats, importance: Floats | None) -> Bytes:
    return pack_q4_k(*_encode(rows, importance, Q4_K)).reshape(len(rows), -1)


def encode_q5_k(rows: Floats, importance: Floats | None) -> Bytes:
    return pack_q5_k(*_encode(rows, importance, Q5_K)).reshape(len(rows), -1)
