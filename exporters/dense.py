"""The dense target: plain Linears in place of quantized ones, for programs that know nothing of quantization."""

from __future__ import annotations

import torch
from torch import nn

from awq_hf.linear import AwqLinear
from awq_hf.matrices import as_kind


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every AwqLinear of `model`, in place, by what it had replaced, holding its dequantized weight in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AwqLinear):
            model.set_submodule(name, dense_module(module, dtype))


def dense_module(module: AwqLinear, dtype: torch.dtype) -> nn.Module:
    """The Linear (or Conv1D) whose weight is the one `module` stands for, rounded once to `dtype`."""
    return as_kind(module.replaces, module.dequantize(dtype), None if module.bias is None else module.bias.data.to(dtype))
