"""What blocks say beside their codes: the steps that codes count, and the same blocks with other codes.

Of all types whose values are evenly spaced, weight = step * code - offset, where the step and the offset hold for `width` weights. Rounding
that looks at more than one weight at a time chooses codes for steps that an encoder has chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from awq_hf.exporters.gguf.blocks import k_affine, k_symmetric, legacy
from awq_hf.exporters.gguf.blocks.legacy import Bytes
from awq_hf.exporters.gguf.blocks.search import F, Floats


class Steps(NamedTuple):
    """steps, offsets: float32 [rows, in / width]; codes run from 0 to top."""

    steps: Floats
    offsets: Floats
    top: int


class _Kind(NamedTuple):
    """width, top: as in Steps; middle: the code of zero, None for types with minimums; header(blocks uint8 [blocks, bytes]) -> what `pack`
    takes before the codes: d and integer scales, and the same for minimums.
    """

    width: int
    top: int
    middle: int | None
    header: Callable[[Bytes], tuple[Any, ...]]
    pack: Callable[..., Bytes]


def _half(data: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(data[:, at : at + 2]).view("<f2")[:, 0].astype(F)


def _shared(at: int, scales: Callable[[Bytes], tuple[Bytes, Bytes]]) -> Callable[[Bytes], tuple[Any, ...]]:
    return lambda data: (_half(data, at), _half(data, at + 2), *scales(data))


def _q3_scales(data: Bytes) -> Bytes:
    low, high = data[:, 96:104], data[:, 104:108]
    whole = np.concatenate([low & 15, low >> 4], axis=1) | (np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1) << 4)
    return (whole.astype(np.int16) - 32).astype(np.int8)


KINDS = {
    Type.Q4_0: _Kind(32, 15, 8, lambda data: (_half(data, 0),), legacy.pack_q4_0),
    Type.Q4_1: _Kind(32, 15, None, lambda data: (_half(data, 0), _half(data, 2)), legacy.pack_q4_1),
    Type.Q5_0: _Kind(32, 31, 16, lambda data: (_half(data, 0),), legacy.pack_q5_0),
    Type.Q5_1: _Kind(32, 31, None, lambda data: (_half(data, 0), _half(data, 2)), legacy.pack_q5_1),
    Type.Q8_0: _Kind(32, 255, 128, lambda data: (_half(data, 0),), lambda d, codes: legacy.pack_q8_0(d, (codes ^ 128).view(np.int8))),
    Type.Q2_K: _Kind(16, 3, None, _shared(80, lambda data: (data[:, :16] & 15, data[:, :16] >> 4)), k_affine.pack_q2_k),
    Type.Q4_K: _Kind(32, 15, None, _shared(0, lambda data: k_affine.split_six_bits(data[:, 4:16])), k_affine.pack_q4_k),
    Type.Q5_K: _Kind(32, 31, None, _shared(0, lambda data: k_affine.split_six_bits(data[:, 4:16])), k_affine.pack_q5_k),
    Type.Q3_K: _Kind(16, 7, 4, lambda data: (_half(data, 108), _q3_scales(data)), k_symmetric.pack_q3_k),
    Type.Q6_K: _Kind(16, 63, 32, lambda data: (_half(data, 208), data[:, 192:208].view(np.int8)), k_symmetric.pack_q6_k),
}


def _blocks(rows: Bytes, kind: Type) -> Bytes:
    return rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])


def steps_of(rows: Bytes, kind: Type) -> Steps:
    """rows: blocks, uint8 [rows, bytes]. kind: one of KINDS."""
    about = KINDS[kind]
    header = about.header(_blocks(rows, kind))
    of = lambda d, *integers: (d[:, None] * integers[0] if integers else d).astype(F).reshape(len(rows), -1)  # noqa: E731
    if about.middle is not None:
        steps = of(*header)
        return Steps(steps, steps * F(about.middle), about.top)
    if len(header) == 2:  # a float16 minimum, which is added
        return Steps(of(header[0]), -of(header[1]), about.top)
    d, dmin, scales, minimums = header
    return Steps(of(d, scales), of(dmin, minimums), about.top)


def with_codes(rows: Bytes, kind: Type, codes: Bytes) -> Bytes:
    """The same blocks with other codes. rows: uint8 [rows, bytes]; codes: uint8 [rows, in], of what counts from 0."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    packed = KINDS[kind].pack(*KINDS[kind].header(_blocks(rows, kind)), codes.reshape(-1, block))
    return packed.reshape(len(rows), -1)
