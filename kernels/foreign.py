"""Layouts in which other writers store 4 bits; a checkpoint in one of them becomes AutoAWQ's gemm layout when it is loaded.

    gemv        AutoAWQ, awq/modules/linear/gemv.py; rows of weights, nibbles in order
    gemv_fast   AutoAWQ, awq/modules/linear/gemv_fast.py, and llm-awq, awq/quantize/qmodule.py: four rows interleaved in
                int16 words, zero points as the floating products -scale * zero

Both pad scales and zero points to whole words of 8 groups, and to 2 or 4 words where groups are shorter than 128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import GEMM, WIDE, pack, words_per_row

GEMV, GEMV_FAST = "gemv", "gemv_fast"

# What checkpoints call their layout -> the layout. llm-awq had all three under its name over time: the tensors tell.
VERSIONS = dict.fromkeys((GEMM, "exllama", "exllamav2", "ipex"), GEMM) | {GEMV: GEMV, GEMV_FAST: GEMV_FAST, "llm-awq": None, WIDE: WIDE}

_INT16, _INT32 = (torch.int16,), (torch.int32,)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
Shapes = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]


def padded_groups(in_features: int, group_width: int) -> int:
    """Groups of a row that gemv and gemv_fast have room for. Raises ValueError for group widths they do not have."""
    if group_width < 128 and group_width not in (32, 64):
        raise ValueError(f"groups of {group_width} channels do not exist in the layouts {GEMV} and {GEMV_FAST}: 32, 64, 128 or more do")
    multiple = max(1, 128 // group_width)  # words
    return 8 * multiple * math.ceil(in_features / group_width / 8 / multiple)


def tensor_shapes(layout: str, in_features: int, out_features: int, group_width: int, bits: int) -> Shapes:
    """Shapes and possible dtypes of qweight, zeros and scales in `layout`. Raises ValueError when it cannot hold such a matrix."""
    groups = in_features // group_width
    if layout in (GEMM, WIDE):
        words = words_per_row(out_features, bits)
        return {"qweight": ((in_features, words), _INT32), "zeros": ((groups, words), _INT32), "scales": ((groups, out_features), _FLOATS)}
    multiple = 64 if layout == GEMV_FAST else 8
    if bits != 4 or in_features % multiple or out_features % 8:
        raise ValueError(f"the layout {layout} holds 4 bits, in_features in multiples of {multiple} and out_features in multiples of 8")
    padded = padded_groups(in_features, group_width)
    if layout == GEMV:
        qweight, zeros, scales = (out_features, in_features // 8), (out_features, padded // 8), (out_features, padded)
        return {"qweight": (qweight, _INT32), "zeros": (zeros, _INT32), "scales": (scales, _FLOATS)}
    return {"qweight": ((out_features // 4, in_features), _INT16)} | dict.fromkeys(("zeros", "scales"), ((padded, out_features), _FLOATS))


def shape_in(layout: str, qweight: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """(out_features, in_features) of a matrix whose qweight and scales have these shapes in `layout`, right only if it is that layout."""
    if layout == GEMV:
        return qweight[0], qweight[1] * 8
    return (qweight[0] * 4, qweight[1]) if layout == GEMV_FAST else (scales[1], qweight[0])


def to_gemm(layout: str, qweight: Tensor, zeros: Tensor, scales: Tensor, group_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, zeros and scales in `layout` -> qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out], unpadded."""
    if layout == GEMV:
        q, scales = unpack_gemv(qweight), scales.T  # [out, in], [padded groups, out]
        groups = q.shape[1] // group_width
        z = unpack_gemv(zeros)[:, :groups]
    else:
        q = unpack_gemv_fast(qweight)
        groups = q.shape[1] // group_width
        z = unscale_zeros(zeros[:groups], scales[:groups]).T
    return pack(q.T.contiguous(), 4), pack(z.T.contiguous(), 4), scales[:groups].contiguous()


def pad_groups(values: Tensor, group_width: int, in_features: int) -> Tensor:
    """[rows, groups] -> [rows, padded groups], zeros after the last group: what gemv stores of scales and zero points."""
    return torch.nn.functional.pad(values, (0, padded_groups(in_features, group_width) - values.shape[1]))


def _join(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 nibbles [..., nibbles of a word] -> words [..., 1] of `dtype`, the first nibble lowest (memory is little-endian)."""
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(dtype)


def _split(words: Tensor) -> Tensor:
    """Words [..., n] -> their uint8 nibbles [..., n * nibbles of a word], lowest first. Inverse of `_join`."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def pack_gemv(codes: Tensor) -> Tensor:
    """uint8 codes [rows, columns] below 16 -> int32 words [rows, columns / 8], nibble i of word c being column 8c + i."""
    return _join(codes, torch.int32)


def unpack_gemv(words: Tensor) -> Tensor:
    """int32 words [rows, columns / 8] -> uint8 codes [rows, columns]. Inverse of `pack_gemv`."""
    return _split(words)


def pack_gemv_fast(codes: Tensor) -> Tensor:
    """uint8 codes [out, in] below 16 -> int16 words [out / 4, in].

    Every 64 words hold 64 columns of 4 rows, 16 words for each row; nibble i of a row's word w is column 32(w // 8) + 8i + w % 8.
    """
    out_features, in_features = codes.shape
    columns = codes.view(out_features // 4, 4, in_features // 64, 2, 4, 8).permute(0, 2, 1, 3, 5, 4)  # [out/4, in/64, 4 rows, 2, 8, 4]
    return _join(columns, torch.int16).reshape(out_features // 4, in_features)


def unpack_gemv_fast(words: Tensor) -> Tensor:
    """int16 words [out / 4, in] -> uint8 codes [out, in]. Inverse of `pack_gemv_fast`."""
    quads, in_features = words.shape
    nibbles = _split(words).view(quads, in_features // 64, 4, 2, 8, 4)
    return nibbles.permute(0, 2, 1, 3, 5, 4).reshape(4 * quads, in_features)


def scale_zeros(zero_points: Tensor, scales: Tensor) -> Tensor:
    """Zero points as gemv_fast stores them: -scales * zero_points in the dtype of the scales."""
    return -(scales.to(torch.float32) * zero_points).to(scales.dtype)


def unscale_zeros(scaled: Tensor, scales: Tensor) -> Tensor:
    """uint8 zero points from -scales * zero_points. Inverse of `scale_zeros`.

    Raises ValueError for values that are no code from 0 to 15: zero points off the grid cannot be kept in integers.
    """
    exact = (-scaled.to(torch.float32) / scales.to(torch.float32)).masked_fill((scaled == 0) & (scales == 0), 0)
    zero_points = exact.round()
    # Product and scale are each off by up to half an eps of their dtype, relative to a zero point of up to 15.
    tolerance = 16 * max(torch.finfo(scaled.dtype).eps, torch.finfo(scales.dtype).eps)
    bad = ~(((exact - zero_points).abs() <= tolerance) & (zero_points >= 0) & (zero_points <= 15))  # NaN is bad as well
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} zero points are no integers from 0 to 15 (the first is {exact[bad][0].item():.4g}); "
            "integer zero points, which the gemm layout has, cannot hold them"
        )
    return zero_points.to(torch.uint8)
