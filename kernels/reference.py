"""The torch definition of every op: slow, plain, and the oracle that faster kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked
from .layout import unpack, words_per_row


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, columns: slice = slice(None)) -> Tensor:
    """w[i, o] = (q[i, o] - z[g, o]) * s[g, o] for the output columns `columns`: float32 [in, columns], exact.

    qweight: int32 [in, words]; qzeros: int32 [groups, words]; scales: float [groups, out]. `columns` starts at a
    multiple of 32, so that it starts a word at every width.
    """
    start, stop, _ = columns.indices(scales.shape[1])
    words = slice(start * bits // 32, start * bits // 32 + words_per_row(stop - start, bits))
    q = unpack(qweight[:, words], bits, stop - start)  # [in, columns]
    z = unpack(qzeros[:, words], bits, stop - start)  # [groups, columns]
    groups = scales.shape[0]
    grouped = q.view(groups, -1, stop - start).to(torch.float32)  # [groups, width, columns]
    weight = (grouped - z[:, None].to(torch.float32)) * scales[:, None, start:stop].to(torch.float32)
    return weight.view(q.shape[0], stop - start)


def scaled(q: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
    """The weight of canonical codes: uint8 q [out, in], scales and uint8 zero_points [out, groups] -> float32 [out, in], exact."""
    grouped = q.reshape(*scales.shape, -1).to(torch.float32) - zero_points[..., None].to(torch.float32)
    return (grouped * scales[..., None].to(torch.float32)).view(q.shape)


def linear(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """y = x W^T + b with W dequantized to x's dtype, a chunk of output columns at a time.

    x: [..., in], any float dtype; the rest as in `dequantize`; bias: [out] or None. Returns [..., out] in x's dtype.
    """
    rows = lambda part: dequantize(qweight, qzeros, scales, bits, part).T  # noqa: E731
    y = chunked.linear(x.reshape(-1, x.shape[-1]), rows, scales.shape[1], bias)
    return y.view(*x.shape[:-1], y.shape[1])


def experts_linear(x: Tensor, offsets: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """y[t] = x[t] W[e]^T + b[e], tokens being sorted by expert: those of expert e are offsets[e] to offsets[e + 1].

    x: [tokens, in]; offsets: int [experts + 1], from 0 to tokens; the rest as in `linear` with a first dimension of experts.
    Returns [tokens, out] in x's dtype.
    """
    bias_of = lambda e: None if bias is None else bias[e]  # noqa: E731
    multiply = lambda some, e: linear(some, qweight[e], qzeros[e], scales[e], bias_of(e), bits)  # noqa: E731
    return chunked.by_expert(x, offsets, scales.shape[2], multiply)
