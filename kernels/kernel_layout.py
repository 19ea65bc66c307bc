"""The layout the Triton kernels read, made from canonical codes when a model is loaded and never saved.

A row's codes are cut into units of 16 int32 words: 128 columns in 4 bits, 64 in 8. Fields i and i + 16 / bits of word j, which are
16 bits apart, are columns 32 i + 2 j and 32 i + 2 j + 1. So one shift and one mask give two neighbours in the halves of a word, as
tensor cores take them, and 32 columns in order from all words; nothing is permuted. Rows are zero-padded to blocks of 128 columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK, UNIT_WORDS = 128, 16  # columns that rows are padded to, words of a unit
BITS = (4, 8)


class KernelWeight(NamedTuple):
    """W ~ (q - zeros) * scales in 4 or 8 bits. blocks = ceil(in / 128); groups cover all blocks, or the row is one group."""

    words: Tensor  # int32 [out, 4 * bits * blocks]
    scales: Tensor  # float [out, groups]
    zeros: Tensor  # uint8 [out, groups]: the kernels' q - zero is exact, and a scale meets the sum over its group


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] below 2^bits -> int32 words [rows, 4 * bits * ceil(columns / 128)]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % BLOCK))
    halves = padded.view(rows, -1, 16 // bits, UNIT_WORDS, 2).permute(0, 1, 3, 4, 2)  # [rows, units, word j, half, field i]
    octets = halves if bits == 8 else halves[..., 0::2] | halves[..., 1::2] << 4  # memory is little-endian
    return octets.reshape(rows, -1).view(torch.int32)


def unpack_words(words: Tensor, columns: int, bits: int) -> Tensor:
    """int32 words [rows, 4 * bits * blocks] -> uint8 codes [rows, columns]. Inverse of `pack_words`."""
    rows = words.shape[0]
    octets = words.contiguous().view(torch.uint8).view(rows, -1, UNIT_WORDS, 2, 2)
    halves = octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)  # [rows, units, word j, half, field i]
    return halves.permute(0, 1, 4, 2, 3).reshape(rows, -1)[:, :columns]


def to_kernel(q: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> KernelWeight:
    """Canonical uint8 q [out, in], scales and uint8 zero points [out, groups] -> KernelWeight.

    Padded groups have the scale 0. Raises ValueError for other widths than 4 and 8 bits, and for group widths that blocks of 128
    columns cannot be cut into.
    """
    columns, groups = q.shape[1], scales.shape[1]
    if reason := unsupported(columns, groups, bits):
        raise ValueError(reason)
    missing = 0 if groups == 1 else math.ceil(columns / BLOCK) * BLOCK // (columns // groups) - groups
    pad = lambda t: torch.nn.functional.pad(t, (0, missing)).contiguous()  # noqa: E731
    return KernelWeight(pack_words(q, bits), pad(scales), pad(zero_points))


def from_kernel(weight: KernelWeight, columns: int, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, scales and zero_points of the canonical weight [out, columns]. Inverse of `to_kernel`."""
    return unpack_words(weight.words, columns, bits), weight.scales[:, :groups].contiguous(), weight.zeros[:, :groups].contiguous()


def unsupported(columns: int, groups: int, bits: int) -> str | None:
    """Why rows of `columns` codes in `groups` groups have no kernel layout, or None."""
    if bits not in BITS:
        return f"the kernels read 4 or 8 bits, not {bits}: dequantize instead"
    width = columns // groups
    if columns % groups:
        return f"{columns} columns are not divisible by {groups} groups"
    if groups == 1 or width in (32, 64) or width % BLOCK == 0:
        return None
    return f"the kernels have groups of 32, 64 or a multiple of 128 columns, or one for the whole row, not of {width}: dequantize instead"


def kernel_group(words: Tensor, scales: Tensor, bits: int) -> int:
    """Columns of a group in the padded row, 0 when one group is the whole row. A constant of the compiled kernels."""
    groups = scales.shape[-1]
    return 0 if groups == 1 else words.shape[-1] * 32 // bits // groups
