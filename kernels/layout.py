"""Packed layouts of integer codes, each with its inverse beside it.

`pack` writes every row of codes as one little-endian bit stream, low bits first, in int32 words.
AutoAWQ's "gemm" layout (4 bits) is the same stream after a permutation of each 8 columns; that permutation is
written once, here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Nibble i of a word holds column 8 * word + GEMM_ORDER[i] (AutoAWQ, awq/utils/packing_utils.py: AWQ_ORDER).
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMM = "gemm"  # AutoAWQ's 4-bit layout, read by vLLM, SGLang, transformers, MLX
WIDE = "awq_hf"  # ours, for the widths AutoAWQ has no format for: columns in order, last word zero-padded


def layout_for(bits: int) -> str:
    """The layout, and with it the `version` of the checkpoint, that `bits` is stored in."""
    return GEMM if bits == 4 else WIDE


def column_multiple(bits: int) -> int:
    """out_features must be a multiple of this to be stored (AutoAWQ's words hold 8 columns and have no padding)."""
    return 8 if layout_for(bits) == GEMM else 1


def words_per_row(columns: int, bits: int) -> int:
    return math.ceil(columns * bits / 32)


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the bit stream is aligned to a word again: (8, 1) for 4 bits, (32, 3) for 3."""
    step = math.gcd(bits, 32)
    return 32 // step, bits // step


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] below 2^bits -> int32 words [rows, ceil(columns * bits / 32)], in the layout of `bits`."""
    if codes.shape[1] % column_multiple(bits):
        raise ValueError(f"{codes.shape[1]} columns cannot be packed in AutoAWQ's layout: a multiple of 8 is needed")
    return _pack(codes, bits, GEMM_ORDER if layout_for(bits) == GEMM else None)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words [rows, ceil(columns * bits / 32)] -> uint8 codes [rows, columns]. Inverse of `pack`."""
    return _unpack(words, bits, columns, GEMM_ORDER if layout_for(bits) == GEMM else None)


def pack_in_order(codes: Tensor, bits: int) -> Tensor:
    """The same with columns in order whatever the width: what compressed-tensors and GPTQ pack. The last word is zero-padded."""
    return _pack(codes, bits, None)


def unpack_in_order(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_in_order`."""
    return _unpack(words, bits, columns, None)


def _pack(codes: Tensor, bits: int, order: tuple[int, ...] | None) -> Tensor:
    rows, columns = codes.shape
    per_period, period_words = _period(bits)
    periods = math.ceil(columns / per_period)
    if columns != periods * per_period:
        codes = torch.nn.functional.pad(codes, (0, periods * per_period - columns))
    codes = codes.reshape(rows, periods, per_period)
    words = _pack_octets(codes, bits, period_words, order) if 8 % bits == 0 else _pack_stream(codes, bits, period_words)
    return words.view(rows, -1)[:, : words_per_row(columns, bits)].contiguous()


def _pack_octets(codes: Tensor, bits: int, period_words: int, order: tuple[int, ...] | None) -> Tensor:
    """Widths that divide 8: no code straddles a byte, and bytes are what is put together."""
    octets = torch.zeros(*codes.shape[:2], 4 * period_words, dtype=torch.uint8, device=codes.device)
    for slot, column in enumerate(order or range(codes.shape[2])):
        octet, offset = divmod(slot * bits, 8)
        octets[:, :, octet] |= codes[:, :, column] << offset
    return octets.view(torch.int32)  # memory is little-endian


def _pack_stream(codes: Tensor, bits: int, period_words: int) -> Tensor:
    words = torch.zeros(*codes.shape[:2], period_words, dtype=torch.int64, device=codes.device)
    for i in range(codes.shape[2]):
        word, offset = divmod(i * bits, 32)
        value = codes[:, :, i].to(torch.int64) << offset
        words[:, :, word] |= value & 0xFFFFFFFF
        if offset + bits > 32:  # a 3-bit code that straddles two words
            words[:, :, word + 1] |= value >> 32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpack(words: Tensor, bits: int, columns: int, order: tuple[int, ...] | None) -> Tensor:
    rows = words.shape[0]
    if words.shape[1] != words_per_row(columns, bits):
        raise ValueError(f"{columns} columns of {bits} bits are {words_per_row(columns, bits)} words a row, not {words.shape[1]}")
    per_period, period_words = _period(bits)
    periods = math.ceil(columns / per_period)
    if words.shape[1] != periods * period_words:
        words = torch.nn.functional.pad(words, (0, periods * period_words - words.shape[1]))
    words = words.reshape(rows, periods, period_words)
    codes = torch.empty(rows, periods, per_period, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for i, column in enumerate(order or range(per_period)):
        word, offset = divmod(i * bits, 32)
        value = words[:, :, word] >> offset  # arithmetic shift; the mask drops the copied sign bits
        if offset + bits > 32:
            low_bits = 32 - offset
            value = (value & (2**low_bits - 1)) | (words[:, :, word + 1] << low_bits)
        codes[:, :, column] = (value & mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns]
