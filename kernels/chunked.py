"""Products with a weight that is dequantized a few rows at a time: what every layout can do, for any dtype and any number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .products import computed_in

CHUNK_WEIGHTS = 1 << 22  # weights dequantized at a time: 16 MB in float32, whatever the size of the layer

Rows = Callable[[slice], Tensor]  # rows of a weight [out, in] -> float32 [rows, in]; slices start at multiples of 64


def chunks(n: int, k: int) -> Iterator[slice]:
    """Slices of n rows of k weights; all but the last of a multiple of 64 rows."""
    size = max(64, CHUNK_WEIGHTS // k // 64 * 64)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def linear(x: Tensor, rows: Rows, n: int, bias: Tensor | None) -> Tensor:
    """y = x W^T + b, W rounded to x's dtype. x: [m, in]; bias: [n] or None. Returns [m, n] in x's dtype."""
    y, operand = x.new_empty(x.shape[0], n), x.to(computed_in(x.dtype, x.device))
    for part in chunks(n, x.shape[1]):
        y[:, part] = operand @ rows(part).to(x.dtype).to(operand.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def by_expert(x: Tensor, offsets: Tensor, n: int, multiply: Callable[[Tensor, int], Tensor]) -> Tensor:
    """multiply(tokens of expert e, e) -> [.., n], for x [tokens, in] sorted by expert: those of e are offsets[e] to offsets[e + 1].

    The host reads offsets. Raises RuntimeError where a CUDA graph is captured, which cannot hold that.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "experts are multiplied one by one here, which a CUDA graph cannot hold: the Triton kernels take them together, in float16 or "
            "bfloat16 and 4 or 8 bits (awq-hf inspect shows the reason against them), and gradients have no such kernel"
        )
    y = x.new_empty(x.shape[0], n)
    for e, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            y[start:stop] = multiply(x[start:stop], e)
    return y


def input_grad(dy: Tensor, rows: Rows, k: int) -> Tensor:
    """dx = dy W, W rounded to dy's dtype, the chunks' sums in float32 or wider. dy: [m, out]. Returns [m, k] in dy's dtype."""
    dx = torch.zeros(dy.shape[0], k, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    operand = dy.to(computed_in(dy.dtype, dy.device))
    for part in chunks(dy.shape[1], k):
        dx += operand[:, part] @ rows(part).to(dy.dtype).to(operand.dtype)
    return dx.to(dy.dtype)
