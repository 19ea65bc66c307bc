"""From a tensor and the type that is wanted to bytes: the one place where that is done."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf.affine import dequantize_weight
from awq_hf.spec import QuantizedWeight

Rows = Tensor | QuantizedWeight

TYPES = ("F32", "F16", "BF16", "Q8_0")
_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_FLOAT32_PARTS = {"ffn_gate_inp"}  # matrices that llama.cpp wants in float32: the router decides on small differences


def type_of(wanted: str) -> Type:
    """Raises ValueError for a type that is not written."""
    if wanted.upper() not in TYPES:
        raise ValueError(f"type {wanted!r} is not written to GGUF files; choose one of {', '.join(TYPES)}")
    return Type[wanted.upper()]


def choose_type(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """The type of the tensor `name` in a file of type `wanted`: vectors and routers are float32, rows that blocks do not divide float16."""
    if len(shape) == 1 or name.split(".")[-2] in _FLOAT32_PARTS:
        return Type.F32
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def n_bytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encode(rows: Rows, kind: Type) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """rows: [n, k] or a vector, float or quantized. The bytes of them in `kind`. Raises ValueError for what does not fit it."""
    values = dequantize_weight(rows) if isinstance(rows, QuantizedWeight) else rows
    if kind not in _FLOATS:
        return gguf.quants.quantize(values.to(torch.float32).contiguous().numpy(), kind)
    rounded = values.to(_FLOATS[kind]).contiguous()
    if kind is Type.F16 and not bool(rounded.isfinite().all()):
        raise ValueError(f"a value of {values.abs().max().item():.6g} does not fit float16 (at most 65504): use type BF16 or F32")
    return rounded.view(torch.uint8).numpy()


def select(value: Rows, rows: Tensor | slice) -> Rows:
    """Rows of a tensor, or of a quantized weight: its integers, scales and zero points together."""
    if isinstance(value, QuantizedWeight):
        return replace(value, q=value.q[rows], scales=value.scales[rows], zero_points=value.zero_points[rows])
    return value[rows]


def n_rows(value: Rows) -> int:
    return (value.q if isinstance(value, QuantizedWeight) else value).shape[0]


def rotary_order(n: int, heads: int) -> Tensor:
    """Rows of a projection as llama.cpp wants them: it rotates channels 2i and 2i + 1 of a head together, transformers i and i + half."""
    return torch.arange(n).view(heads, 2, n // heads // 2).transpose(1, 2).reshape(-1)
