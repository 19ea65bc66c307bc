"""Float models in half precision, run on a CPU that has no instructions for it: their matrix products are computed in float32
(kernels/products.py), and rounded to what the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from awq_hf.kernels.products import computed_in, matmul

aten = torch.ops.aten


class _InFloat32(TorchDispatchMode):
    """Below autograd, so that gradients are computed in the same way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = PRODUCTS.get(func)
        if product is None or not _is_slow(args[0]):
            return func(*args, **(kwargs or {}))
        return product(*args, **(kwargs or {}))


def _is_slow(operand: Tensor) -> bool:
    return computed_in(operand.dtype, operand.device) != operand.dtype


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return matmul(a, b).to(a.dtype)


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """float32 [batch, m, n]"""
    y = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float32, device=a.device)
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        y[i] = matmul(left, right)
    return y


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return _batched(a, b).to(a.dtype)


def _added(bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """beta bias + alpha product; what is in bias does not matter, not even NaN, where beta is 0."""
    product.mul_(alpha)
    return (torch.add(product, bias, alpha=beta) if beta else product).to(bias.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(bias, matmul(a, b), beta, alpha)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(bias, _batched(a, b), beta, alpha)


def _grouped_mm(x: Tensor, weights: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """Tokens sorted by expert, x [tokens, in], times [experts, in, out]; offs: where each expert's end."""
    if offs is None or (x.ndim, weights.ndim) != (2, 3) or bias is not None:
        return aten._grouped_mm.default(x, weights, offs, bias, out_dtype)
    y = x.new_zeros(x.shape[0], weights.shape[2], dtype=out_dtype or x.dtype)
    start = 0
    for stop, weight in zip(offs.tolist(), weights, strict=True):
        y[start:stop] = matmul(x[start:stop], weight)
        start = stop
    return y


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
}
if hasattr(aten, "_grouped_mm"):  # not in torch 2.6
    PRODUCTS[aten._grouped_mm.default] = _grouped_mm


def fast_products(module: nn.Module) -> AbstractContextManager[Any]:
    """Within, what this thread runs of the module multiplies in float32, where that is the faster way."""
    return _InFloat32() if any(_is_slow(parameter) for parameter in module.parameters()) else nullcontext()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for [tokens, in] and [out, in] of one dtype, which the result has too."""
    return _mm(x, weight.T)


def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """module(*args, **kwargs), with fast products."""
    with fast_products(module):
        return module(*args, **kwargs)
