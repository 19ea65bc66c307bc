"""The layout the Triton kernels read, made from canonical codes when a model is loaded and never saved.

A row's codes are cut into blocks of 128 columns, the last one zero-padded; a block is 16 int32 words, nibble i of word j
being column 16 i + j. One shift of a block's words thus yields 16 columns in order, so a kernel never permutes anything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK, BLOCK_WORDS = 128, 16  # columns, and int32 words of 8 nibbles


class KernelWeight(NamedTuple):
    """W ~ (q - zeros) * scales, 4 bits. blocks = ceil(in / 128); groups cover all blocks, or the row is one group."""

    words: Tensor  # int32 [out, 16 * blocks]
    scales: Tensor  # float [out, groups]
    zeros: Tensor  # uint8 [out, groups]: the kernels' q - zero is exact, and a scale meets the sum over its group


def pack_words(codes: Tensor) -> Tensor:
    """uint8 codes [rows, columns] below 16 -> int32 words [rows, 16 * ceil(columns / 128)]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % BLOCK))
    nibbles = padded.view(rows, -1, 8, BLOCK_WORDS).transpose(2, 3)  # [rows, blocks, word j, nibble i]
    octets = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous()  # memory is little-endian
    return octets.view(torch.int32).view(rows, -1)


def unpack_words(words: Tensor, columns: int) -> Tensor:
    """int32 words [rows, 16 * blocks] -> uint8 codes [rows, columns]. Inverse of `pack_words`."""
    rows = words.shape[0]
    octets = words.contiguous().view(torch.uint8).view(rows, -1, BLOCK_WORDS, 4)
    nibbles = torch.stack((octets & 15, octets >> 4), -1).flatten(-2)  # [rows, blocks, word j, nibble i]
    return nibbles.transpose(2, 3).reshape(rows, -1)[:, :columns]


def to_kernel(q: Tensor, scales: Tensor, zero_points: Tensor) -> KernelWeight:
    """Canonical uint8 q [out, in], scales and uint8 zero points [out, groups] -> KernelWeight.

    Padded groups have the scale 0. Raises ValueError for group widths that blocks of 128 columns cannot be cut into.
    """
    columns, groups = q.shape[1], scales.shape[1]
    if reason := unsupported_groups(columns, groups):
        raise ValueError(reason)
    missing = 0 if groups == 1 else math.ceil(columns / BLOCK) * BLOCK // (columns // groups) - groups
    pad = lambda t: torch.nn.functional.pad(t, (0, missing)).contiguous()  # noqa: E731
    return KernelWeight(pack_words(q), pad(scales), pad(zero_points))


def from_kernel(weight: KernelWeight, columns: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, scales and zero_points of the canonical weight [out, columns]. Inverse of `to_kernel`."""
    return unpack_words(weight.words, columns), weight.scales[:, :groups].contiguous(), weight.zeros[:, :groups].contiguous()


def unsupported_groups(columns: int, groups: int) -> str | None:
    """Why rows of `columns` in `groups` groups have no kernel layout, or None."""
    width = columns // groups
    if columns % groups:
        return f"{columns} columns are not divisible by {groups} groups"
    if groups == 1 or width in (32, 64) or width % BLOCK == 0:
        return None
    return f"the kernels have groups of 32, 64 or a multiple of 128 columns, or one for the whole row, not of {width}: dequantize instead"


def kernel_group(words: Tensor, scales: Tensor) -> int:
    """Columns of a group in the padded row, 0 when one group is the whole row. A constant of the compiled kernels."""
    groups = scales.shape[1]
    return 0 if groups == 1 else words.shape[1] * 8 // groups
