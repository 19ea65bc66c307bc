"""The dense target: plain Linears in place of quantized ones, for programs that know nothing of quantization."""

from __future__ import annotations

import torch
from torch import nn

from awq_hf.linear import AwqLinear


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every AwqLinear of `model`, in place, by an nn.Linear that holds its dequantized weight in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AwqLinear):
            model.set_submodule(name, dense_linear(module, dtype))


def dense_linear(module: AwqLinear, dtype: torch.dtype) -> nn.Linear:
    """The Linear whose weight [out, in] is the one `module` stands for, rounded once to `dtype`."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight = nn.Parameter(module.dequantize(dtype))
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.data.to(dtype))
    return linear
