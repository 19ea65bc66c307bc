"""Registration of the ops with torch: one name per op, behind which the implementation may change with the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("awq_hf::linear", mutates_args=())
def linear(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """y = x W^T + b for a packed W; arguments as in `reference.linear`."""
    return reference.linear(x, qweight, qzeros, scales, bias, bits)


@linear.register_fake
def _(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])
