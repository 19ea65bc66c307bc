"""Modules that compute y = x W^T + b, under whatever class a model keeps them: what AwqLinear can stand in for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.compat import Conv1D


def is_matrix(module: nn.Module) -> bool:
    """Whether the module is a Linear, one of its subclasses that computes just the same (Falcon's), or GPT-2's Conv1D."""
    if isinstance(module, Conv1D):
        return True
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and _is_plain(kind) and not list(module.children())


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Tried on a small one: a subclass's forward may be anything, and its constructor may want something else.

    In float32: while transformers builds a model, the default is the model's dtype, in which the order of roundings shows.
    """
    if kind is nn.Linear:
        return True
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            small, x = kind(3, 2).to(torch.float32), torch.randn(2, 4, 3, dtype=torch.float32)
            for parameter in small.parameters():
                nn.init.normal_(parameter)
            return torch.allclose(small(x), nn.functional.linear(x, small.weight, small.bias), atol=1e-6)
    except Exception:
        return False


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a matrix; no weight is read."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def as_linear(module: nn.Module) -> nn.Linear:
    """The same function as an nn.Linear, sharing bias and, but for Conv1D, whose weight is [in, out], the weight."""
    if isinstance(module, nn.Linear):
        return module
    out_features, in_features = shape_of(module)
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(module.get_parameter("weight").data.T.contiguous(), requires_grad=False)
    linear.bias = module.get_parameter("bias")
    return linear


def as_kind(kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module of class `kind` that computes x weight^T + bias. weight: [out, in]; bias: [out] or None."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        if kind is Conv1D:
            module: nn.Module = Conv1D(out_features, in_features)
            weight = weight.T.contiguous()
        else:
            module = kind(in_features, out_features, bias=bias is not None)
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module
