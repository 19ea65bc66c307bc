"""Registration with torch: an op for a quantized Linear and one for experts, behind which kernels change with device, layout and tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch

torch.library.define(
    "awq_hf::linear", "(Tensor x, Tensor[] weight, Tensor? bias, int out_features, int groups, int bits, str layout) -> Tensor"
)
torch.library.define("awq_hf::input_grad", "(Tensor dy, Tensor[] weight, int in_features, int groups, int bits, str layout) -> Tensor")
torch.library.define(
    "awq_hf::experts_linear",
    "(Tensor x, Tensor offsets, Tensor[] weight, Tensor? bias, int out_features, int groups, int bits, str layout) -> Tensor",
)
torch.library.define(
    "awq_hf::experts_input_grad",
    "(Tensor dy, Tensor offsets, Tensor[] weight, int in_features, int groups, int bits, str layout) -> Tensor",
)
linear = torch.ops.awq_hf.linear.default
input_grad = torch.ops.awq_hf.input_grad.default
experts_linear = torch.ops.awq_hf.experts_linear.default
experts_input_grad = torch.ops.awq_hf.experts_input_grad.default

torch.library.impl("awq_hf::linear", "default")(dispatch.linear)
torch.library.impl("awq_hf::input_grad", "default")(dispatch.input_grad)
torch.library.impl("awq_hf::experts_linear", "default")(dispatch.experts_linear)
torch.library.impl("awq_hf::experts_input_grad", "default")(dispatch.experts_input_grad)


def _fake_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, out_features: int, groups: int, bits: int, layout: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_grad(dy: Tensor, weight: list[Tensor], in_features: int, groups: int, bits: int, layout: str) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], in_features)


def _fake_experts(
    x: Tensor, offsets: Tensor, weight: list[Tensor], bias: Tensor | None, out_features: int, groups: int, bits: int, layout: str
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _fake_experts_grad(dy: Tensor, offsets: Tensor, weight: list[Tensor], in_features: int, groups: int, bits: int, layout: str) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


torch.library.register_fake("awq_hf::linear")(_fake_linear)
torch.library.register_fake("awq_hf::input_grad")(_fake_grad)
torch.library.register_fake("awq_hf::experts_linear")(_fake_experts)
torch.library.register_fake("awq_hf::experts_input_grad")(_fake_experts_grad)


# The weight is integers and gets no gradient; the two ops are each other's.


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, *ctx.how = inputs
    ctx.weight, ctx.in_features, ctx.bias_dtype = weight, x.shape[-1], None if bias is None else bias.dtype


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx = input_grad(dy, ctx.weight, ctx.in_features, *ctx.how) if ctx.needs_input_grad[0] else None
    db = dy.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, [None] * len(ctx.weight), db, None, None, None, None


def _keep_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, ctx.weight, _, *ctx.how = inputs
    ctx.out_features = dy.shape[-1]


def _grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    return linear(ddx, ctx.weight, None, ctx.out_features, *ctx.how), [None] * len(ctx.weight), None, None, None, None


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, ctx.weight, bias, _, *ctx.how = inputs
    ctx.save_for_backward(offsets)
    ctx.in_features, ctx.bias = x.shape[-1], None if bias is None else (bias.shape, bias.dtype)


def _experts_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    (offsets,) = ctx.saved_tensors
    dx = experts_input_grad(dy.contiguous(), offsets, ctx.weight, ctx.in_features, *ctx.how) if ctx.needs_input_grad[0] else None
    db = None
    if ctx.needs_input_grad[3]:
        shape, dtype = ctx.bias
        expert = torch.searchsorted(offsets, torch.arange(len(dy), device=dy.device, dtype=offsets.dtype), right=True) - 1
        db = dy.new_zeros(shape).index_add(0, expert, dy).to(dtype)
    return dx, None, [None] * len(ctx.weight), db, None, None, None, None


torch.library.register_autograd("awq_hf::linear", _linear_backward, setup_context=_keep_linear)
torch.library.register_autograd("awq_hf::input_grad", _grad_backward, setup_context=_keep_grad)
torch.library.register_autograd("awq_hf::experts_linear", _experts_backward, setup_context=_keep_experts)
