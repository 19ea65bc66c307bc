"""Y = X W^T for several tokens, with the operands swapped: a tile is W [BN, K] times X^T [K, BM], because a tensor core can take
its first operand from registers, where W's codes are unpacked.

q - z is at most 15 or 255 in size, exact in float16 and bfloat16, and is what the tensor core multiplies; a group's scale is applied
to its float32 sum. A code and its zero point become floats without a conversion, both with the same power of two added (MAGIC), two
codes at a time where a word holds two such floats. Splits of K leave float32 sums that `reduce` adds up in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tuning
from .jit import INTERPRETED, jit, launch, operand_dtype, tl, unfenced
from .kernel_layout import UNIT_WORDS, kernel_group
from .problem import Problem
from .reduce import reduce
from .tuning import GemmConfig

# The bits of the power of two under which the last mantissa bit counts 1: MAGIC | q is that power + q, for codes below it.
MAGIC = {"float16": 0x6400, "bfloat16": 0x4300, "float32": 0x4B000000}


@jit()
def subtract_halves(a, b, TYPE: tl.constexpr, ASSEMBLE: tl.constexpr):
    """a - b of the floats in the low halves of two words, and in the high ones. The compiler takes words apart before it subtracts, at
    one more instruction a float; hence in assembly (b * -1 + a, as sm_80 cannot subtract two bfloat16), except in the interpreter."""
    if ASSEMBLE:
        NAME: tl.constexpr = "bf16x2" if TYPE == tl.bfloat16 else "f16x2"
        MINUS_ONES: tl.constexpr = "0xbf80bf80" if TYPE == tl.bfloat16 else "0xbc00bc00"
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 d; mov.b32 d, " + MINUS_ONES + "; fma.rn." + NAME + " d, $3, d, $2; mov.b32 {$0, $1}, d; }",
            *("=h,=h,r,r", [a, b]),
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        low, high = low.to(TYPE, bitcast=True), high.to(TYPE, bitcast=True)
    else:
        low = a.to(tl.int16).to(TYPE, bitcast=True) - b.to(tl.int16).to(TYPE, bitcast=True)
        high = (a >> 16).to(tl.int16).to(TYPE, bitcast=True) - (b >> 16).to(tl.int16).to(TYPE, bitcast=True)
    return low, high


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
    first,  # unit of 16 words
    last,  # unit after the last one
    k,
    row_words,
    groups,
    magic,  # bits of CARRIER that make an integer of the last ones; twice in a word, where it has 16
    BITS: tl.constexpr,  # 4 or 8
    GROUP: tl.constexpr,  # columns of a group, 0 = one group a row
    BN: tl.constexpr,
    BM: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype that is multiplied
    CARRIER: tl.constexpr,  # dtype that the difference is taken in
    ASSEMBLE: tl.constexpr,  # whether there is an assembler
):
    """W X^T over some units of columns: float32 [BN, BM]."""
    COLUMNS: tl.constexpr = 512 // BITS  # of a unit
    SUB: tl.constexpr = GROUP if GROUP > 0 and GROUP < COLUMNS else COLUMNS  # columns of a unit that share a scale
    MASK: tl.constexpr = 2**BITS - 1
    TWO: tl.constexpr = 65537  # puts a number of 16 bits in both halves of a word
    shifts = tl.arange(0, SUB // 32) * BITS
    acc = tl.zeros([BN, BM], tl.float32)
    for unit in range(first, last):
        word = tl.load(words + rows[:, None] * row_words + (unit * 16 + tl.arange(0, 16))[None, :], mask=row_ok[:, None], other=0)
        for part in tl.static_range(COLUMNS // SUB):
            at = rows * groups + ((unit * COLUMNS + part * SUB) // GROUP if GROUP > 0 else 0)
            scale = tl.load(scales + at, mask=row_ok, other=0).to(tl.float32)
            zero = (tl.load(zeros + at, mask=row_ok, other=0).to(tl.int32) * (1 if CARRIER == tl.float32 else TWO) | magic)[:, None, None]
            columns = unit * COLUMNS + part * SUB + tl.arange(0, SUB)
            values = tl.load(x + tokens[:, None] * k + columns[None, :], mask=token_ok[:, None] & (columns < k)[None, :], other=0)
            pair = word[:, None, :] >> (shifts + part * (SUB // 32 * BITS))[None, :, None]  # [BN, SUB / 32, 16]
            if CARRIER == tl.float32:
                even, odd = pair & MASK | magic, (pair >> 16) & MASK | magic
                even, odd = even.to(CARRIER, bitcast=True), odd.to(CARRIER, bitcast=True)
                even, odd = even - zero.to(CARRIER, bitcast=True), odd - zero.to(CARRIER, bitcast=True)
            else:
                even, odd = subtract_halves(pair & (MASK * TWO) | magic, zero, CARRIER, ASSEMBLE)
            difference = tl.join(even.to(OPERAND), odd.to(OPERAND)).reshape(BN, SUB)
            acc += tl.dot(difference, tl.trans(values.to(OPERAND))) * scale[:, None]
    return acc


@jit(varying=("m", "split_units", "magic"))
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
    split_units,  # units of 16 words of a split
    magic,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    OPERAND: tl.constexpr,
    CARRIER: tl.constexpr,
    ASSEMBLE: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    row_ok, token_ok = rows < n, tokens < m
    first, last = split * split_units, tl.minimum((split + 1) * split_units, row_words // 16)
    acc = tile(
        *(x, words, scales, zeros, rows, row_ok, tokens, token_ok, first, last, k, row_words, groups, magic),
        *(BITS, GROUP, BN, BM, OPERAND, CARRIER, ASSEMBLE),
    )
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=row_ok, other=0).to(tl.float32)[:, None]
    at = split * m * n + tokens[None, :] * n + rows[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`, or None."""
    return tuning.unsupported(problem) or unfenced()


def carrier(bits: int, dtype: torch.dtype) -> str:
    """What differences are taken in for x of `dtype`. 7 mantissa bits of a bfloat16 hold 4-bit codes, and not 8-bit ones."""
    operand = operand_dtype(dtype)
    return "float32" if bits == 8 and operand == "bfloat16" else operand


def magic(bits: int, dtype: torch.dtype) -> int:
    """The kernels' argument of that name: not compiled in, as an instruction has room for one constant, which is the mask."""
    name = carrier(bits, dtype)
    return MAGIC[name] * (1 if name == "float32" else 0x10001)


def constants(bits: int, group: int, has_bias: bool, dtype: torch.dtype, config: GemmConfig) -> dict[str, Any]:
    """What is compiled into the kernel. dtype: of x."""
    types = {"OPERAND": getattr(tl, operand_dtype(dtype)), "CARRIER": getattr(tl, carrier(bits, dtype)), "ASSEMBLE": not INTERPRETED}
    return {"BITS": bits, "GROUP": group, "HAS_BIAS": has_bias, "BN": config.bn, "BM": config.bm, **types}


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
    launch(
        gemm_kernel[(-(-n // config.bn), -(-m // config.bm), splits)],
        *(x, words, scales, zeros, fused_bias if fused_bias is not None else y, out),
        *(m, n, k, row_words, scales.shape[1], -(-(row_words // UNIT_WORDS) // splits), magic(bits, x.dtype)),
        **constants(bits, kernel_group(words, scales, bits), fused_bias is not None, x.dtype, config),
        **config.options(),
    )
    return y if splits == 1 else reduce(out, bias, y)
