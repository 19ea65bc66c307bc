"""y = W x for one token (M = 1): bound by reading W, so 16-byte loads, no shared memory but for the last sum, no atomics.

A code becomes a float without a conversion: under the exponent of 2^23 the low mantissa bits of a float32 are an integer, so for
nibbles (word & 15 << 4i) | 0x4B000000 is 2^23 + 16^i q, and subtracting 2^23 + 16^i z leaves 16^i (q - z) exactly. x is divided by
16^i in turn, once for all rows of a program. Sums are float32, in an order that only the shapes and the configuration set.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tuning
from .jit import jit, tl
from .kernel_layout import kernel_group
from .tuning import GemvConfig, Problem


@jit()
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
    BITS: tl.constexpr,  # 4 or 8
    GROUP: tl.constexpr,  # columns of a group, 0 = one group a row
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,  # rows of a program
    QUADS: tl.constexpr,  # 16-byte pieces of each row at a time
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_ok = rows < n
    lanes = tl.arange(0, 4)
    WORDS: tl.constexpr = 4 * BITS  # of a block
    HALF: tl.constexpr = 16 // BITS  # fields of half a word: what fits below 2^23 at once
    SUB: tl.constexpr = GROUP if 0 < GROUP < 128 else 128  # columns of a block that share a scale
    acc = tl.zeros([BN, QUADS], tl.float32)
    for start in range(0, row_words // 4, QUADS):
        quads = start + tl.arange(0, QUADS)
        quad_ok = quads < row_words // 4
        offsets = rows[:, None, None] * row_words + (quads[:, None] * 4 + lanes[None, :])[None]
        word = tl.load(words + offsets, mask=row_ok[:, None, None] & quad_ok[None, :, None], other=0, eviction_policy="evict_first")
        columns = (quads // BITS * 128 + quads % BITS * 4)[:, None] + lanes[None, :]  # [QUADS, 4], of field 0
        ok = row_ok[:, None] & quad_ok[None, :]
        for part in tl.static_range(128 // SUB):
            group = (quads // BITS * 128 + part * SUB) // GROUP if GROUP > 0 else quads * 0
            at = rows[:, None] * groups + group[None, :]
            scale = tl.load(scales + at, mask=ok, other=0).to(tl.float32)  # [BN, QUADS]
            zero = tl.load(zeros + at, mask=ok, other=0).to(tl.float32)
            dot = tl.zeros([BN, QUADS, 4], tl.float32)
            for i in tl.static_range(SUB // WORDS * part, SUB // WORDS * (part + 1)):
                power = 2 ** (BITS * (i % HALF))
                field = ((word >> (16 * (i // HALF))) & ((2**BITS - 1) * power)) | 0x4B000000
                difference = field.to(tl.float32, bitcast=True) - (8388608.0 + zero * power)[:, :, None]
                column = columns + WORDS * i
                values = tl.load(x + column, mask=column < k, other=0).to(tl.float32) * (1.0 / power)
                dot += difference * values[None]
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

    x: [1, in], float16 or bfloat16, contiguous; words, scales, zeros: as in `KernelWeight`; bias: [out], any float dtype.
    Returns [1, out] in x's dtype.
    """
    n, k = words.shape[0], x.shape[1]
    config = config or tuning.gemv_config(n, k)
    y = x.new_empty(1, n)
    gemv_kernel[(-(-n // config.rows),)](
        *(x, words, scales, zeros, bias if bias is not None else y, y, n, k, words.shape[1], scales.shape[1]),
        **constants(bits, kernel_group(words, scales, bits), bias is not None, config),
        **config.options(),
    )
    return y
