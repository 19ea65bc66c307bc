"""Y = X W^T for several tokens, with the operands swapped: a tile is W [BN, K] times X^T [K, BM], because a tensor core can take
its first operand from registers, where W's codes are unpacked.

q - z is at most 15 or 255 in size, exact in float16 and bfloat16, and is what the tensor core multiplies; a group's scale is applied
to its float32 sum. A code and its zero point become floats without a conversion, both with the same power of two added (MAGIC).
Splits of K leave float32 sums that `reduce` adds up in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tuning
from .jit import jit, operand_dtype, tl
from .kernel_layout import kernel_group
from .reduce import reduce
from .tuning import GemmConfig, Problem

# The bits of the power of two under which the last mantissa bit counts 1: MAGIC | q is that power + q, for codes below it.
MAGIC = {"float16": 0x6400, "bfloat16": 0x4300, "float32": 0x4B000000}


@jit()
def tile(
    x,  # [tokens, k]
    words,  # int32 [n, row_words]
    scales,  # [n, groups]
    zeros,  # uint8 [n, groups]
    rows,  # [BN], of W
    row_ok,
    tokens,  # [BM], of x
    token_ok,
    first,  # block of 128 columns
    last,  # block after the last one
    k,
    row_words,
    groups,
    BITS: tl.constexpr,  # 4 or 8
    GROUP: tl.constexpr,  # columns of a group, 0 = one group a row
    BN: tl.constexpr,
    BM: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype that is multiplied
    CARRIER: tl.constexpr,  # dtype that the difference is taken in
    MAGIC: tl.constexpr,  # its bits that make an integer of the last ones
):
    """W X^T over some blocks of columns: float32 [BN, BM]."""
    SUB: tl.constexpr = GROUP if 0 < GROUP < 128 else 128  # columns of a block that share a scale
    WORDS: tl.constexpr = 4 * BITS  # of a block
    INTEGER: tl.constexpr = tl.int16 if MAGIC < 1 << 16 else tl.int32
    pieces = tl.arange(0, SUB // WORDS)
    # Nothing is loaded: these are the shifts 0, BITS, .. The compiler unpacks in the registers of the dot product's operand, without a
    # trip through shared memory, only if all it starts from are loads.
    shifts = tl.load(words + pieces, mask=pieces + k < 0, other=pieces * BITS)
    acc = tl.zeros([BN, BM], tl.float32)
    for block in range(first, last):
        word = tl.load(words + rows[:, None] * row_words + (block * WORDS + tl.arange(0, WORDS))[None, :], mask=row_ok[:, None], other=0)
        for part in tl.static_range(128 // SUB):
            at = rows * groups + ((block * 128 + part * SUB) // GROUP if GROUP > 0 else 0)
            scale = tl.load(scales + at, mask=row_ok, other=0).to(tl.float32)
            zero = tl.load(zeros + at, mask=row_ok, other=0).to(tl.int32)
            zero = (zero | MAGIC).to(INTEGER).to(CARRIER, bitcast=True)[:, None, None]
            columns = block * 128 + part * SUB + tl.arange(0, SUB)
            values = tl.load(x + tokens[:, None] * k + columns[None, :], mask=token_ok[:, None] & (columns < k)[None, :], other=0)
            code = (word[:, None, :] >> (shifts + part * (SUB // 4))[None, :, None]) & (2**BITS - 1) | MAGIC  # [BN, SUB / WORDS, WORDS]
            difference = (code.to(INTEGER).to(CARRIER, bitcast=True) - zero).to(OPERAND).reshape(BN, SUB)
            acc += tl.dot(difference, tl.trans(values.to(OPERAND))) * scale[:, None]
    return acc


@jit(varying=("m", "split_blocks"))
def gemm_kernel(
    x,  # [m, k]; words to groups as in `tile`
    words,
    scales,
    zeros,
    bias,  # [n], unread without HAS_BIAS
    out,  # [m, n], or float32 [splits, m, n]
    m,
    n,
    k,
    row_words,
    groups,
    split_blocks,  # blocks of 128 columns of a split
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    OPERAND: tl.constexpr,
    CARRIER: tl.constexpr,
    MAGIC: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    row_ok, token_ok = rows < n, tokens < m
    first, last = split * split_blocks, tl.minimum((split + 1) * split_blocks, row_words // (4 * BITS))
    acc = tile(
        *(x, words, scales, zeros, rows, row_ok, tokens, token_ok, first, last, k, row_words, groups),
        *(BITS, GROUP, BN, BM, OPERAND, CARRIER, MAGIC),
    )
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=row_ok, other=0).to(tl.float32)[:, None]
    at = split * m * n + tokens[None, :] * n + rows[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`, or None."""
    return tuning.unsupported(problem)


def constants(bits: int, group: int, has_bias: bool, dtype: torch.dtype, config: GemmConfig) -> dict[str, Any]:
    """What is compiled into the kernel. dtype: of x."""
    operand = operand_dtype(dtype)
    carrier = "float32" if bits == 8 and operand == "bfloat16" else operand  # 7 mantissa bits hold 16 codes, not 256
    tile = {"BN": config.bn, "BM": config.bm}
    types = {"OPERAND": getattr(tl, operand), "CARRIER": getattr(tl, carrier), "MAGIC": MAGIC[carrier]}
    return {"BITS": bits, "GROUP": group, "HAS_BIAS": has_bias, **tile, **types}


def gemm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    config: GemmConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Y = X W^T + bias for a problem that `supports` accepts.

    x: [tokens, in], float16 or bfloat16, contiguous; words, scales, zeros: as in `KernelWeight`; bias: [out], any float dtype;
    config, splits: from the tables of `tuning` unless given. Returns [tokens, out] in x's dtype.
    """
    (m, k), (n, row_words) = x.shape, words.shape
    config = config or tuning.gemm_config(m)
    splits = splits or tuning.splits(m, n, k, config)
    y = x.new_empty(m, n)
    out = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    fused_bias = bias if splits == 1 else None
    gemm_kernel[(-(-n // config.bn), -(-m // config.bm), splits)](
        *(x, words, scales, zeros, fused_bias if fused_bias is not None else y, out),
        *(m, n, k, row_words, scales.shape[1], -(-(row_words // (4 * bits)) // splits)),
        **constants(bits, kernel_group(words, scales, bits), fused_bias is not None, x.dtype, config),
        **config.options(),
    )
    return y if splits == 1 else reduce(out, bias, y)
