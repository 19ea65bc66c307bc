"""W as a dense matrix, and the products that use it: Y = X W^T for many tokens, and dX = dY W. The multiplying is the library's.

W never exists as a whole: the scratch has CHUNK bytes. Y is cut along W's rows and dX along its columns, so that every value comes from
one product of the library, accumulated as it always does, and none is a sum of rounded parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tuning
from .jit import jit, launch, tl
from .kernel_layout import BLOCK, kernel_group
from .problem import Problem

CHUNK = 64 << 20  # bytes
ROWS = 32  # of a program, which does one block of 128 columns
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@jit(varying=("first_block",))
def dequantize_kernel(
    words,  # int32 [n, row_words]
    scales,  # [n, groups]
    zeros,  # uint8 [n, groups]
    out,  # [n, columns]: from the first block on
    n,
    columns,
    row_words,
    groups,
    first_block,
    BITS: tl.constexpr,  # 4 or 8
    GROUP: tl.constexpr,  # columns of a group, 0 = one group a row
    BN: tl.constexpr,  # rows of a program
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    block = first_block + tl.program_id(1)
    row_ok = rows[:, None] < n
    SUB: tl.constexpr = GROUP if GROUP > 0 and GROUP < 128 else 128  # columns of a block that share a scale
    at = rows[:, None] * row_words + (block * (4 * BITS) + tl.arange(0, 4 * BITS))[None, :]
    word = tl.load(words + at, mask=row_ok, other=0).reshape(BN, BITS // 4, 1, 16)
    pair = word >> (tl.arange(0, 16 // BITS) * BITS)[None, None, :, None]  # [BN, units, 16 / BITS, 16]
    code = tl.join(pair, pair >> 16) & (2**BITS - 1)
    parts = tl.arange(0, 128 // SUB)
    at = rows[:, None] * groups + ((block * 128 + parts * SUB) // GROUP if GROUP > 0 else parts * 0)[None, :]
    scale = tl.load(scales + at, mask=row_ok, other=0).to(tl.float32)[:, :, None]
    zero = tl.load(zeros + at, mask=row_ok, other=0).to(tl.int32)[:, :, None]
    weight = (code.reshape(BN, 128 // SUB, SUB) - zero).to(tl.float32) * scale
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = rows.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, weight.reshape(BN, 128).to(out.dtype.element_ty), mask=row_ok & (column < columns)[None, :])


def constants(bits: int, group: int) -> dict[str, Any]:
    """What is compiled into the kernel."""
    return {"BITS": bits, "GROUP": group, "BN": ROWS}


def supports(problem: Problem) -> str | None:
    """Why `matmul_dequantized` cannot do `problem`, or None."""
    return tuning.unsupported(problem)


def dequantize(words: Tensor, scales: Tensor, zeros: Tensor, out: Tensor, bits: int = 4, start: int = 0) -> Tensor:
    """Fills out, [rows, columns] of any float dtype and contiguous, with the columns from `start` on, a multiple of 128. Returns out.

    words, scales, zeros: as in `KernelWeight`. Values are exact in float32 and rounded once.
    """
    n, columns = out.shape
    launch(
        dequantize_kernel[(-(-n // ROWS), -(-columns // BLOCK))],
        *(words, scales, zeros, out, n, columns, words.shape[1], scales.shape[1], start // BLOCK),
        **constants(bits, kernel_group(words, scales, bits)),
        **OPTIONS,
    )
    return out


def matmul_dequantized(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None, bits: int = 4) -> Tensor:
    """Y = X W^T + bias with W rounded to x's dtype.

    x: [tokens, in], contiguous; words, scales, zeros: as in `KernelWeight`; bias: [out], any float dtype, added in x's.
    Returns [tokens, out] in x's dtype.
    """
    (m, k), n = x.shape, words.shape[0]
    y = x.new_empty(m, n)
    chunk = _multiple(k * x.element_size(), 64)
    scratch = x.new_empty(min(chunk, n), k)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        weight = dequantize(words[rows], scales[rows], zeros[rows], scratch[: rows.stop - start], bits)
        if bias is None:
            torch.mm(x, weight.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows].to(x.dtype), x, weight.T, out=y[:, rows])
    return y


def input_grad(dy: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, k: int, bits: int = 4) -> Tensor:
    """dX = dY W, the gradient of X in Y = X W^T, with W rounded to dy's dtype.

    dy: [tokens, out], contiguous; words, scales, zeros: as in `KernelWeight`; k: in_features. Returns [tokens, k] in dy's dtype.
    """
    (m, n), chunk = dy.shape, _multiple(dy.shape[1] * dy.element_size(), BLOCK)
    dx = dy.new_empty(m, k)
    for start in range(0, k, chunk):
        columns = min(chunk, k - start)
        weight = dequantize(words, scales, zeros, dy.new_empty(n, columns), bits, start)
        torch.mm(dy, weight, out=dx[:, start : start + columns])
    return dx


def _multiple(size: int, step: int) -> int:
    """How many rows or columns of `size` bytes fit the scratch: a multiple of `step`, at least one."""
    return max(1, CHUNK // size // step) * step
