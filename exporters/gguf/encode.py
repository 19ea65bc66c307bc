"""From a tensor and the type that is wanted to bytes: the one place where that is done."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf.affine import dequantize_weight
from awq_hf.exporters.gguf.ggml import quantize
from awq_hf.exporters.gguf.repack import repack
from awq_hf.exporters.gguf.types import FLOATS
from awq_hf.spec import EncodedWeight, QuantizedWeight

Rows = Tensor | QuantizedWeight | EncodedWeight


def n_bytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encode(rows: Rows, kind: Type, importance: Tensor | None = None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """rows: [n, k] or a vector; float, quantized, or encoded already. The bytes of them in `kind`.

    Integer codes stay as they are, unless kind is a float type. importance: float32 [k], of float rows' columns. Raises ValueError for what
    does not fit it.
    """
    columns = None if importance is None else _columns(importance).numpy()
    if isinstance(rows, EncodedWeight):
        if rows.kind != kind.name:
            raise ValueError(f"it was encoded as {rows.kind}, and is to be written as {kind.name}")
        return rows.data.numpy()
    if kind not in FLOATS:
        if isinstance(rows, QuantizedWeight):
            return repack(rows, kind, columns)
        return quantize(rows.to(torch.float32).contiguous().numpy(), kind, columns)
    values = dequantize_weight(rows) if isinstance(rows, QuantizedWeight) else rows
    rounded = values.to(FLOATS[kind]).contiguous()
    if kind is Type.F16 and not bool(rounded.isfinite().all()):
        raise ValueError(f"a value of {values.abs().max().item():.6g} does not fit float16 (at most 65504): use type BF16 or F32")
    return rounded.view(torch.uint8).numpy()


def _columns(importance: Tensor) -> Tensor:
    """What quantizers take: columns without importance get a little of it, since blocks of nothing else would become zeros."""
    mean = importance.mean()
    return importance.clamp(min=1e-4 * mean) if mean > 0 else torch.ones_like(importance)


def select(value: Rows, rows: Tensor | slice) -> Rows:
    """Rows of a tensor, or of a quantized weight: its integers, scales and zero points together."""
    if isinstance(value, QuantizedWeight):
        return replace(value, q=value.q[rows], scales=value.scales[rows], zero_points=value.zero_points[rows])
    if isinstance(value, EncodedWeight):
        return replace(value, data=value.data[rows])
    return value[rows]


def n_rows(value: Rows) -> int:
    return len(value if isinstance(value, Tensor) else value.q if isinstance(value, QuantizedWeight) else value.data)


def rotary_order(n: int, heads: int) -> Tensor:
    """Rows of a projection as llama.cpp wants them: it rotates channels 2i and 2i + 1 of a head together, transformers i and i + half."""
    return torch.arange(n).view(heads, 2, n // heads // 2).transpose(1, 2).reshape(-1)
