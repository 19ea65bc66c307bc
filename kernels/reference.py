"""The torch definition of every op: slow, plain, and the oracle that faster kernels are tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .layout import unpack, words_per_row

CHUNK_WEIGHTS = 1 << 22  # weights dequantized at a time: 16 MB in float32, whatever the size of the layer


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


def linear(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """y = x W^T + b with W dequantized to x's dtype, a chunk of output columns at a time.

    x: [..., in], any float dtype; the rest as in `dequantize`; bias: [out] or None. Returns [..., out] in x's dtype.
    """
    in_features, out_features = qweight.shape[0], scales.shape[1]
    chunk = max(32, CHUNK_WEIGHTS // in_features // 32 * 32)
    y = x.new_empty(*x.shape[:-1], out_features)
    for start in range(0, out_features, chunk):
        columns = slice(start, min(start + chunk, out_features))
        y[..., columns] = x @ dequantize(qweight, qzeros, scales, bits, columns).to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def experts_linear(x: Tensor, offsets: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """y[t] = x[t] W[e]^T + b[e], tokens being sorted by expert: those of expert e are offsets[e] to offsets[e + 1].

    x: [tokens, in]; offsets: int [experts + 1], from 0 to tokens; the rest as in `linear` with a first dimension of experts.
    Returns [tokens, out] in x's dtype.
    """
    y, limits = x.new_empty(x.shape[0], scales.shape[2]), offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(limits)):
        if start < stop:
            y[start:stop] = linear(x[start:stop], qweight[e], qzeros[e], scales[e], None if bias is None else bias[e], bits)
    return y
