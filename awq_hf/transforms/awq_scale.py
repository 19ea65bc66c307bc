"""Smoothing scales (AWQ, arXiv 2306.00978, equations 4 and 5):

    s* = argmin_s  E| Q(W diag(s)) diag(s)^-1 x - W x |^2,    s = s_x^alpha,  alpha in [0, 1]

s_x is the magnitude of each input channel; here it is the root mean square rather than the mean of |x|. The error D of plain
rounding is as good as independent from weight to weight, so the expectation is taken over it as well, which leaves the
diagonal of H: the loss is sum_oi D_oi^2 E[x_i^2]. That costs out * in for a candidate instead of out * in^2, and finds
scales as good as the full second moment does (benchmarks/ablation.py compares it with the loss of the paper's code).

Candidates: the identity, s_x^alpha with alpha up to and including 1, and a second family, s_x^alpha / w^(1 - alpha) with w the
mean magnitude of the channel's weights, which also lowers channels that are large already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from awq_hf.affine import choose_grid, fake_quantize
from awq_hf.parallel import in_parallel, row_pieces
from awq_hf.spec import QuantSpec

FLOOR = 1e-4  # of magnitudes and scales, relative to their mean: dead channels get a finite scale
FINALISTS = 4  # candidates that judges are asked about
MARGIN = 0.01  # a gain on the held-out slice below this share is noise, and not worth a change of the model

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


Rounding = Callable[[Tensor, Tensor], Tensor]  # rows [rows, in], E[x^2] of their inputs [in] -> the same as stored, dequantized
Consumer = tuple[Tensor, Rounding]  # a weight, float32 [out, in], and how it will be stored


def nearest(spec: QuantSpec) -> Rounding:
    return lambda rows, _energy: fake_quantize(rows, choose_grid(rows, spec))


def search_scales(
    consumers: list[Consumer], channel_map: Tensor, channels: int, energy: Tensor, held_energy: Tensor, options: ScaleOptions,
    loss_of: Loss | None = None, judges: list[Consumer] | None = None,
) -> ScaleChoice:  # fmt: skip
    """The smoothing scales of one fold: best on the calibration statistic, and kept only if the held-out slice agrees.

    consumers: all that share the input; channel_map: [in] -> producer channel; channels: producer
    channels; energy, held_energy: E[x^2] of the float input, [in]. loss_of overrides the loss of scales [in]. judges: where the real
    rounding is too slow for all candidates, consumers whose rounding resembles it leave the best few, which these decide between.
    """
    one = energy.new_ones(channels)
    candidates = list(_candidates([weight for weight, _ in consumers], channel_map, channels, energy, options))
    scales = torch.stack([one, *(scales for _, _, scales in candidates)])[:, channel_map]  # [candidates, in]
    identity_loss, *losses = nearest_losses(consumers, scales, energy) if loss_of is None else [loss_of(s) for s in scales]
    found = dict(enumerate(losses))
    if judges is not None:
        finalists = sorted(found, key=found.__getitem__)[:FINALISTS]
        identity_loss, *losses = nearest_losses(judges, scales[[0, *(1 + i for i in finalists)]], energy)
        found, consumers = dict(zip(finalists, losses, strict=True)), judges
    best = min(found, key=found.__getitem__)
    if found[best] >= identity_loss:
        return ScaleChoice(one, 0.0, "identity", identity_loss, identity_loss)
    family, alpha, smoothing = candidates[best]
    held_loss, held_identity = nearest_losses(consumers, torch.stack([smoothing, one])[:, channel_map], held_energy)
    if held_loss <= (1 - MARGIN) * held_identity:
        return ScaleChoice(smoothing, alpha, family, found[best], identity_loss)
    return ScaleChoice(one, 0.0, "identity (held-out slice)", identity_loss, identity_loss)


def nearest_losses(consumers: list[Consumer], scales: Tensor, energy: Tensor) -> list[float]:
    """Expected output error of rounding after smoothing by each of scales [candidates, in], summed over the consumers."""

    def piece(of: Consumer) -> Tensor:
        rows, rounding = of
        errors = []
        for s in scales:
            d = rounding(rows * s, energy / (s * s)).div_(s).sub_(rows)
            errors.append((d.square_() @ energy).sum())
        return torch.stack(errors)

    pieces = [(weight[rows], rounding) for weight, rounding in consumers for rows in row_pieces(weight)]
    return torch.stack(in_parallel(piece, pieces)).sum(0, dtype=torch.float64).tolist()  # [pieces, candidates] -> [candidates]


def _candidates(
    weights: list[Tensor], channel_map: Tensor, channels: int, energy: Tensor, options: ScaleOptions
) -> Iterator[tuple[str, float, Tensor]]:
    """(family, alpha, scales [channels]), each normalized by sqrt(max * min) as in the paper's code.

    Producer channels that no consumer reads (the query and key rows of a fused projection) keep the scale 1.
    """
    used = torch.zeros(channels, dtype=torch.bool, device=channel_map.device).index_fill_(0, channel_map, True)
    x = _per_producer(energy, channel_map, channels).sqrt()  # [channels]
    # The weights' magnitudes are relative to their group's largest, since that is what sets the step they are rounded by.
    w = _per_producer(torch.stack([_relative_magnitude(weight) for weight in weights]).mean(0), channel_map, channels)
    x, w = _floored(x, used), _floored(w, used)
    for step in range(1, options.steps + 1):
        alpha = step / options.steps
        yield "activations", alpha, _normalized(x**alpha, used)
        if alpha < 1:
            yield "activations / weights", alpha, _normalized(x**alpha / w ** (1 - alpha), used)


def _relative_magnitude(weight: Tensor) -> Tensor:
    return (weight.abs() / weight.abs().amax(1, keepdim=True).clamp(min=1e-12)).mean(0)  # [in]


def _per_producer(values: Tensor, channel_map: Tensor, channels: int) -> Tensor:
    """The mean of the consumer channels that share a producer channel: [in] -> [channels]; 1 where none does."""
    total = values.new_zeros(channels).index_add_(0, channel_map, values)
    count = values.new_zeros(channels).index_add_(0, channel_map, torch.ones_like(values))
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def _floored(values: Tensor, used: Tensor) -> Tensor:
    return values.clamp(min=float(values[used].mean()) * FLOOR + 1e-30)


def _normalized(scales: Tensor, used: Tensor) -> Tensor:
    scales = scales / (scales[used].max() * scales[used].min()).sqrt()
    return torch.where(used, scales.clamp(min=FLOOR, max=1 / FLOOR), 1.0)
