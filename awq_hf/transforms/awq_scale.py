"""Smoothing scales (AWQ, arXiv 2306.00978, equations 4 and 5):

    s* = argmin_s  E| Q(W diag(s)) diag(s)^-1 x - W x |^2,    s = s_x^alpha,  alpha in [0, 1]

s_x is the magnitude of each input channel. Here it is the root mean square (from diag H) rather than the mean of |x|, and
the error is taken from H (calibration/stats.py). Candidates: the identity, s_x^alpha with alpha up to and including 1,
and the second family s_x^alpha / mean|w|^(1 - alpha), which also lowers channels whose weights are already large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from awq_hf.affine import choose_grid, fake_quantize
from awq_hf.calibration.stats import Moments, output_error
from awq_hf.spec import QuantSpec

FLOOR = 1e-4  # of magnitudes and scales, relative to their mean: dead channels get a finite scale

Loss = Callable[[Tensor], float]


@dataclass(frozen=True)
class ScaleOptions:
    """steps: alpha is tried at 1/steps, 2/steps, ... 1."""

    steps: int = 20


@dataclass(frozen=True)
class ScaleChoice:
    """scales: float32 [producer channels]; alpha and family of the winner (alpha 0 is the identity); its loss and the identity's."""

    scales: Tensor
    alpha: float
    family: str
    loss: float
    identity_loss: float


def search_scales(
    weights: list[Tensor], channel_map: Tensor, channels: int, train: Moments, held: Moments, spec: QuantSpec, options: ScaleOptions,
    loss_of: Loss | None = None,
) -> ScaleChoice:  # fmt: skip
    """The smoothing scales of one fold: best on the calibration statistic, and kept only if the held-out slice agrees.

    weights: the consumers' float32 [out, in], sharing one input; channel_map: [in] -> producer channel;
    channels: producer channels; train, held: moments of the float input. loss_of overrides the loss of scales [in].
    """
    loss_of = loss_of or (lambda s: nearest_loss(weights, s, train, spec))
    one = torch.ones(channels, device=channel_map.device)
    best = identity = ScaleChoice(one, 0.0, "identity", loss := loss_of(one[channel_map]), loss)
    for family, alpha, scales in _candidates(weights, channel_map, channels, train, options):
        loss = loss_of(scales[channel_map])
        if loss < best.loss:
            best = ScaleChoice(scales, alpha, family, loss, identity.loss)
    if best is identity:
        return identity
    agrees = nearest_loss(weights, best.scales[channel_map], held, spec) <= nearest_loss(weights, one[channel_map], held, spec)
    return best if agrees else ScaleChoice(one, 0.0, "identity (held-out slice)", identity.loss, identity.loss)


def nearest_loss(weights: list[Tensor], scales: Tensor, moments: Moments, spec: QuantSpec) -> float:
    """Output error of plain rounding after smoothing by scales [in], summed over the consumers."""
    error = 0.0
    for weight in weights:
        smoothed = weight * scales
        error += float(output_error(weight, fake_quantize(smoothed, choose_grid(smoothed, spec)) / scales, moments).sum())
    return error


def _candidates(
    weights: list[Tensor], channel_map: Tensor, channels: int, moments: Moments, options: ScaleOptions
) -> Iterator[tuple[str, float, Tensor]]:
    """(family, alpha, scales [channels]), each normalized by sqrt(max * min) as in the paper's code."""
    x = _per_producer(moments.H.diagonal(), channel_map, channels).sqrt()  # [channels]
    # The weights' magnitudes are relative to their group's largest, since that is what sets the step they are rounded by.
    w = _per_producer(torch.stack([_relative_magnitude(weight) for weight in weights]).mean(0), channel_map, channels)
    x, w = _floored(x), _floored(w)
    for step in range(1, options.steps + 1):
        alpha = step / options.steps
        yield "activations", alpha, _normalized(x**alpha)
        if alpha < 1:
            yield "activations / weights", alpha, _normalized(x**alpha / w ** (1 - alpha))


def _relative_magnitude(weight: Tensor) -> Tensor:
    return (weight.abs() / weight.abs().amax(1, keepdim=True).clamp(min=1e-12)).mean(0)  # [in]


def _per_producer(values: Tensor, channel_map: Tensor, channels: int) -> Tensor:
    """The mean of the consumer channels that share a producer channel: [in] -> [channels]; 1 where none does."""
    total = torch.zeros(channels, device=values.device).index_add_(0, channel_map, values)
    count = torch.zeros(channels, device=values.device).index_add_(0, channel_map, torch.ones_like(values))
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def _floored(values: Tensor) -> Tensor:
    return values.clamp(min=float(values.mean()) * FLOOR + 1e-30)


def _normalized(scales: Tensor) -> Tensor:
    scales = scales / (scales.max() * scales.min()).sqrt()
    return scales.clamp(min=FLOOR, max=1 / FLOOR)
