"""A fold: dividing a producer's output channels by s and multiplying its consumers' input channels by s.

(W diag(s)) (diag(s)^-1 x) = W x (AWQ, arXiv 2306.00978, section 3.2): the function stays, the weights become easier
to quantize. The diag(s)^-1 costs nothing when it is absorbed by the norm or the Linear that made x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Gain = Literal["rows", "weight", "weight+1"]


@dataclass(frozen=True)
class FoldPoint:
    """Where smoothing scales are absorbed. Module names are relative to the block.

    producer: norm or Linear whose output channels are divided by s.
    gain: how: the rows of a Linear, a norm's weight w, or a norm that multiplies by 1 + w.
    channel_map: int64 [in], consumer channel -> producer channel. Grouped-query attention repeats a value channel for
        several query heads; those consumer channels share one producer channel, hence one scale.
    consumers: Linears whose input channels are multiplied by s[channel_map].
    """

    producer: str
    gain: Gain
    channel_map: Tensor
    consumers: tuple[str, ...]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a norm or a Linear; its first dimension is the output channel."""
    return module.get_parameter("weight").data


def _gain(fold: FoldPoint, weight: Tensor) -> Tensor:
    return weight.to(torch.float32) + 1 if fold.gain == "weight+1" else weight.to(torch.float32)


def representable_scales(fold: FoldPoint, producer: nn.Module, scales: Tensor) -> Tensor:
    """The scales nearest to `scales` that the norm can absorb without a rounding error.

    A norm's weight w is stored in the model's dtype, so w / s is rounded to w'. Folding w / w' instead of s into the
    consumers, whose weights are about to be quantized from float32, makes the fold exact. scales: float32 [producer channels].
    """
    if fold.gain == "rows":
        return scales
    weight = weight_of(producer)
    before = _gain(fold, weight)
    after = _gain(fold, _divided(fold, weight, scales))
    exact = (before != 0) & (after != 0) & torch.isfinite(after)
    return torch.where(exact, before / torch.where(exact, after, 1.0), 1.0).abs()


def _divided(fold: FoldPoint, weight: Tensor, scales: Tensor) -> Tensor:
    scales = scales.view(-1, *[1] * (weight.ndim - 1))
    divided = _gain(fold, weight) / scales - (1 if fold.gain == "weight+1" else 0)
    return divided.to(weight.dtype)


def divided_parameters(fold: FoldPoint, producer: nn.Module, scales: Tensor) -> dict[str, Tensor]:
    """The producer's parameters with its output channels divided by `scales`, in their own dtypes."""
    parameters = {"weight": _divided(fold, weight_of(producer), scales)}
    bias = getattr(producer, "bias", None)
    if bias is not None:
        parameters["bias"] = (bias.data.to(torch.float32) / scales).to(bias.dtype)
    return parameters


def reading_parameter(module: nn.Module) -> str:
    """The name of the parameter [.., in] that multiplies a consumer's input: a Linear's or router's weight, or that of fused experts."""
    return "gate_up_proj" if "gate_up_proj" in module._parameters else "weight"


def multiplied_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """A consumer's weight [.., in] with its input channels multiplied by `scales` [in]."""
    return (weight.to(torch.float32) * scales).to(weight.dtype)
