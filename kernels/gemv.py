"""y = W x for one token (M = 1): bound by reading W, so 16-byte loads, no shared memory but for the last sum, no atomics.

A code becomes a float without a conversion: under the exponent of 2^23 the low mantissa bits of a float32 are an integer, so for
nibbles (word & 15 << 4i) | 0x4B000000 is 2^23 + 16^i q, and subtracting 2^23 + 16^i z leaves 16^i (q - z) exactly, i < 4. x is
divided by 16^i in turn, once for all rows of a program. x is read as words as well: as a code of the low half of a word meets an even
column and one of the high half the next. Sums are float32, in an order that only the shapes and the configuration set.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tuning
from .jit import jit, launch, tl
from .kernel_layout import kernel_group
from .problem import Problem
from .tuning import GemvConfig

MAGIC = 0x4B000000


@jit(varying=("magic",))
def gemv_kernel(
    x,  # [k]
    words,  # int32 [n, row_words]
    scales,  # [n, groups]
    zeros,  # uint8 [n, groups]
    bias,  # [n], unread without HAS_BIAS
    y,  # [n]
    n,
    k,
    row_words,
    groups,
    magic,  # bits of 2^23: an instruction has room for one constant, which is the mask
    BITS: tl.constexpr,  # 4 or 8
    GROUP: tl.constexpr,  # columns of a group, 0 = one group a row
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,  # rows of a program
    QUADS: tl.constexpr,  # 16-byte pieces of each row at a time
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_ok = rows < n
    lanes = tl.arange(0, 4)
    COLUMNS: tl.constexpr = 512 // BITS  # of a unit
    SUB: tl.constexpr = GROUP if GROUP > 0 and GROUP < COLUMNS else COLUMNS  # columns of a unit that share a scale
    pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)  # of neighbours
    acc = tl.zeros([BN, QUADS], tl.float32)
    for start in range(0, row_words // 4, QUADS):
        quads = start + tl.arange(0, QUADS)
        quad_ok = quads < row_words // 4
        offsets = rows[:, None, None] * row_words + (quads[:, None] * 4 + lanes[None, :])[None]
        word = tl.load(words + offsets, mask=row_ok[:, None, None] & quad_ok[None, :, None], other=0, eviction_policy="evict_first")
        neighbours = (quads // 4 * (COLUMNS // 2) + quads % 4 * 4)[:, None] + lanes[None, :]  # [QUADS, 4]
        ok = row_ok[:, None] & quad_ok[None, :]
        for part in tl.static_range(COLUMNS // SUB):
            group = (quads // 4 * COLUMNS + part * SUB) // GROUP if GROUP > 0 else quads * 0
            at = rows[:, None] * groups + group[None, :]
            scale = tl.load(scales + at, mask=ok, other=0).to(tl.float32)  # [BN, QUADS]
            zero = tl.load(zeros + at, mask=ok, other=0).to(tl.float32)
            dot = tl.zeros([BN, QUADS, 4], tl.float32)
            for i in tl.static_range(SUB // 32 * part, SUB // 32 * (part + 1)):
                power = 2 ** (BITS * i)
                pair = tl.load(pairs + neighbours + 16 * i, mask=neighbours + 16 * i < k // 2, other=0)
                if x.dtype.element_ty == tl.bfloat16:
                    even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
                else:
                    even = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                    odd = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                offset = (8388608.0 + zero * power)[:, :, None]
                low, high = word & ((2**BITS - 1) * power) | magic, (word >> 16) & ((2**BITS - 1) * power) | magic
                dot += (low.to(tl.float32, bitcast=True) - offset) * (even * (1.0 / power))[None]
                dot += (high.to(tl.float32, bitcast=True) - offset) * (odd * (1.0 / power))[None]
            acc += tl.sum(dot, 2) * scale
    total = tl.sum(acc, 1)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=row_ok, other=0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=row_ok)


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`, or None."""
    if problem.m != 1:
        return f"the kernel multiplies 1 token, not {problem.m}"
    return tuning.unsupported(problem)


def constants(bits: int, group: int, has_bias: bool, config: GemvConfig) -> dict[str, Any]:
    """What is compiled into the kernel."""
    return {"BITS": bits, "GROUP": group, "HAS_BIAS": has_bias, "BN": config.rows, "QUADS": config.quads}


def gemv(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None, bits: int = 4, config: GemvConfig | None = None
) -> Tensor:
    """y = W x + bias for a problem that `supports` accepts.

    x: [1, in], float16 or bfloat16, contiguous, in even; words, scales, zeros: as in `KernelWeight`; bias: [out], any float dtype.
    Returns [1, out] in x's dtype.
    """
    n, k = words.shape[0], x.shape[1]
    config = config or tuning.gemv_config(n, k)
    if x.data_ptr() % 4:  # a view that starts in the middle of a word
        x = x.clone()
    y = x.new_empty(1, n)
    launch(
        gemv_kernel[(-(-n // config.rows),)],
        *(x, words, scales, zeros, bias if bias is not None else y, y, n, k, words.shape[1], scales.shape[1], MAGIC),
        **constants(bits, kernel_group(words, scales, bits), bias is not None, config),
        **config.options(),
    )
    return y
