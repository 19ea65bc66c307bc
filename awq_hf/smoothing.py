"""The smoothing scales of one block: what won for each consumer of a fold, and how it is carried through the fold.

A fold's producer puts out its channels divided by s, and the weights of its consumers are multiplied by s: what the block computes stays
the same (arXiv 2306.00978, section 3.2).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.folding import FoldPoint
from awq_hf.folding.fold import divided_parameters, reading_parameter, representable_scales
from awq_hf.transforms.awq_scale import ScaleChoice


class Smoothing:
    """Of one block; module names are relative to it. Producers that stay in float are divided at once, and readers that do multiplied;
    Linears that are quantized take their share when they are rounded (`carried_out`)."""

    def __init__(self, block: nn.Module, linears: Collection[str], experts: Collection[str]) -> None:
        """linears, experts: that are to be quantized; they may become fewer until scales are absorbed."""
        self.block, self.linears, self.experts = block, linears, experts
        self.folds: list[FoldPoint] = []
        self.choices: dict[str, ScaleChoice] = {}  # consumer -> what won
        self.in_scales: dict[str, Tensor] = {}  # consumer -> s of its input channels, [in]
        self._out_scales: dict[str, Tensor] = {}  # producing Linear -> s that its rows are divided by, [out]

    def take(self, fold: FoldPoint, choice: ScaleChoice) -> None:
        self.choices.update(dict.fromkeys(fold.consumers, choice))
        if choice.alpha > 0:
            self._absorb(fold, self.block.get_submodule(fold.producer), choice.scales)

    def _absorb(self, fold: FoldPoint, producer: nn.Module, scales: Tensor) -> None:
        stays_float = [name for name in fold.consumers if name not in self.linears and name not in self.experts]
        if stays_float or (fold.gain == "rows" and fold.producer not in self.linears):
            scales = torch.exp2(scales.log2().round())  # exact in a weight that keeps its dtype
        scales = representable_scales(fold, producer, scales)
        if fold.gain == "rows" and fold.producer in self.linears:
            self._out_scales[fold.producer] = scales
        else:
            for name, value in divided_parameters(fold, producer, scales).items():
                producer.get_parameter(name).data.copy_(value)
        for name in fold.consumers:
            self.in_scales[name] = scales[fold.channel_map]
        for name in stays_float:
            reader = self.block.get_submodule(name)
            reader.get_parameter(reading_parameter(reader)).data.mul_(scales[fold.channel_map])

    def carried_out(self, name: str, weight: Tensor) -> Tensor:
        """A weight [out, in] of the Linear with both of its folds carried out."""
        if name in self.in_scales:
            weight = weight * self.in_scales[name]
        if name in self._out_scales:
            weight = weight / self._out_scales[name][:, None]
        return weight

    def divide_bias(self, name: str, linear: nn.Linear) -> None:
        """The bias of a Linear whose rows are divided, in place."""
        if name in self._out_scales and linear.bias is not None:
            linear.bias.data.copy_(linear.bias.data.to(torch.float32) / self._out_scales[name])

    def described(self, name: str) -> Mapping[str, Any]:
        """For the report of a consumer: what takes up the scales of its inputs, with what exponent, of which family."""
        choice = self.choices.get(name)
        return {
            "fold": next((fold.producer for fold in self.folds if name in fold.consumers), None),
            "alpha": choice.alpha if choice else 0.0,
            "family": choice.family if choice else "not folded",
        }
