"""y[t] = x[t] W[e]^T for tokens sorted by expert: all experts in one launch of the tiles of `gemm`.

How many tokens an expert has is known on the device only, and the host does not wait for it: tiles are launched for the worst case.
Expert e has the tiles from offsets[e] // BM + e on, which leaves each as many as it needs, as
(offset + count) // BM + 1 - offset // BM >= ceil(count / BM), and tokens // BM + experts are enough for all. Spare ones do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gemm, tuning
from .gemm import tile
from .jit import jit, launch, tl, unfenced
from .kernel_layout import kernel_group
from .problem import Problem
from .tuning import GemmConfig


@jit(varying=("magic",))
def experts_kernel(
    x,  # [tokens, k]
    offsets,  # int32 [experts + 1]
    words,  # int32 [experts, n, row_words]
    scales,  # [experts, n, groups]
    zeros,  # uint8 [experts, n, groups]
    bias,  # [experts, n], unread without HAS_BIAS
    out,  # [tokens, n]
    experts,
    n,
    k,
    row_words,
    groups,
    magic,
    EXPERTS: tl.constexpr,  # power of two that is no less
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    OPERAND: tl.constexpr,
    CARRIER: tl.constexpr,
    ASSEMBLE: tl.constexpr,
):
    index, every = tl.program_id(1), tl.arange(0, EXPERTS)
    starts = tl.load(offsets + every, mask=every < experts, other=0) // BM + every
    expert = tl.sum(((starts <= index) & (every < experts)).to(tl.int32), 0) - 1
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    begin = start + (index - start // BM - expert) * BM
    rows, tokens = tl.program_id(0) * BN + tl.arange(0, BN), begin + tl.arange(0, BM)
    row_ok, token_ok = rows < n, tokens < stop
    base = expert.to(tl.int64) * n  # all experts together may pass 2^31
    acc = tile(
        *(x, words + base * row_words, scales + base * groups, zeros + base * groups, rows, row_ok, tokens, token_ok),
        *(0, tl.where(begin < stop, row_words // 16, 0), k, row_words, groups, magic, BITS, GROUP, BN, BM, OPERAND, CARRIER, ASSEMBLE),
    )
    if HAS_BIAS:
        acc += tl.load(bias + base + rows, mask=row_ok, other=0).to(tl.float32)[:, None]
    tl.store(out + tokens[None, :] * n + rows[:, None], acc.to(out.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`, that of all tokens and one expert, or None."""
    return tuning.unsupported(problem) or unfenced()


def constants(experts: int, bits: int, group: int, has_bias: bool, dtype: torch.dtype, config: GemmConfig) -> dict[str, Any]:
    """What is compiled into the kernel. dtype: of x."""
    return {"EXPERTS": 1 << (experts - 1).bit_length(), **gemm.constants(bits, group, has_bias, dtype, config)}


def experts_linear(
    x: Tensor,
    offsets: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    config: GemmConfig | None = None,
) -> Tensor:
    """y[t] = x[t] W[e]^T + bias[e], the tokens of expert e being offsets[e] to offsets[e + 1].

    x: [tokens, in], float16 or bfloat16, contiguous; offsets: int32 [experts + 1], from 0 to tokens, as `routing.route` makes them;
    words, scales, zeros: `KernelWeight`s stacked to [experts, ..]; bias: [experts, out], any float dtype.
    Returns [tokens, out] in x's dtype.
    """
    (m, k), (experts, n, row_words) = x.shape, words.shape
    config = config or tuning.gemm_config(-(-m // experts))
    y = x.new_empty(m, n)
    launch(
        experts_kernel[(-(-n // config.bn), m // config.bm + experts)],
        *(x, offsets, words, scales, zeros, bias if bias is not None else y, y),
        *(experts, n, k, row_words, scales.shape[2], gemm.magic(bits, x.dtype)),
        **constants(experts, bits, kernel_group(words, scales, bits), bias is not None, x.dtype, config),
        **config.options(),
    )
    return y
