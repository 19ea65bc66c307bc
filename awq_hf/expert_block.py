"""The experts of one layer on their way from float to integers: each is fitted to the tokens that the router sends it.

An expert that few calibration tokens reach has too poor a statistic for as many weights as it has. With n tokens and k input channels,
n < k, its moments are n / k of its own and the rest those of all tokens of the layer; an expert that none reached has only these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awq_hf.affine import choose_grid, fake_quantize, to_quantized_weight
from awq_hf.calibration.data import HELD_OUT, Batch
from awq_hf.calibration.stats import Moments
from awq_hf.experts import FUSED, AwqExperts, ExpertWeights, gate_is_linear_in_up
from awq_hf.layer import judge, round_together
from awq_hf.linear import pack_weight
from awq_hf.products import linear
from awq_hf.recipe import Recipe
from awq_hf.report import LayerReport, Report
from awq_hf.spec import QuantizedWeight, QuantSpec
from awq_hf.transforms.awq_scale import Consumer, ScaleChoice, nearest, search_scales

JUDGED_ROWS = 8192  # of all experts' gate and up together, that smoothing scales are chosen by
SPARE_TOKENS = 4  # times an expert's input channels: as many of the layer's tokens stand in for those that did not reach it

Specs = tuple[QuantSpec, QuantSpec]  # of gate_up_proj and down_proj


class Tokens(NamedTuple):
    """What reaches the experts in one batch. x: [tokens, H] in the quantized stream, None where it is not followed; x0: the same in the
    float stream, which smoothing scales still have to divide; chosen: the experts of each token, int [tokens, k]."""

    x: Tensor | None
    x0: Tensor
    chosen: Tensor
    held_out: bool


def tokens_of(
    batches: Sequence[Batch], x0s: Sequence[Tensor], reached: Sequence[tuple[Tensor, Tensor] | None], routes: Sequence[Tensor]
) -> list[Tokens]:
    """reached: (x, chosen) of each batch in the quantized stream, padding included; none where it is not followed, and `routes`, the
    experts chosen in the float stream, count."""
    if not reached:
        return [Tokens(None, x0, chosen, batch.held_out) for batch, x0, chosen in zip(batches, x0s, routes, strict=True)]
    pairs = zip(batches, reached, x0s, strict=True)
    return [Tokens(b.real_tokens(r[0]), x0, b.real_tokens(r[1]), b.held_out) for b, r, x0 in pairs if r is not None]


Statistic = tuple[Moments, Moments]  # for the search, of the held-out slice


class Matrix(NamedTuple):
    """A matrix of one expert, float32 [out, in]. inputs, outputs: smoothing scales of its input [in], and of what it puts out [out]."""

    original: Tensor
    inputs: Tensor | None
    outputs: Tensor | None

    def folded(self, weight: Tensor) -> Tensor:
        """`weight`, the original or something that was made of it, with the scales carried out."""
        weight = weight if self.inputs is None else weight * self.inputs
        return weight if self.outputs is None else weight / self.outputs[:, None]


class ExpertsWork:
    """The experts module `name` of a block. packed: the result, parameter -> packed tensors of each expert."""

    def __init__(self, block: str, name: str, module: nn.Module, specs: Specs, recipe: Recipe, report: Report) -> None:
        self.inside, self.name, self.module, self.recipe, self.report = name, f"{block}.{name}", module, recipe, report
        self.folds_into_up = recipe.scale is not None and gate_is_linear_in_up(module)
        self.specs = dict(zip(FUSED, specs, strict=True))
        self.gate_up, self.down = (module.get_parameter(parameter).data for parameter in FUSED)
        self.packed: dict[str, list[dict[str, Tensor]]] = {parameter: [] for parameter in FUSED}

    def consumers(self) -> list[Consumer]:
        """What judges the smoothing scales of the experts' input: rows of gate and up, spread over all experts."""
        rows = self.gate_up.flatten(0, 1)
        return [(rows[:: -(-len(rows) // JUDGED_ROWS)].to(torch.float32), nearest(self.specs[FUSED[0]]))]

    def round(self, tokens: Sequence[Tokens], in_scales: Tensor | None, smoothed: Mapping[str, Any]) -> list[LayerReport]:
        """Quantize every expert; the module computes with the result from then on.

        in_scales: s of the input channels, float32 [H]; smoothed: what the report says of it (`Smoothing.described`).
        """
        alphas: list[float] = []  # of the scales of down's inputs
        statistics = _Statistics(tokens, len(self.gate_up), self.gate_up.shape[2], in_scales)
        judged: dict[str, list[list[Any]]] = {parameter: [] for parameter in FUSED}
        few = {parameter: [] for parameter in FUSED}  # type: dict[str, list[int]]
        for expert in range(len(self.gate_up)):
            original, down = self.gate_up[expert].to(torch.float32), self.down[expert].to(torch.float32)  # [2 I, H], [H, I]
            reached = [(t.chosen == expert).any(1).nonzero()[:, 0] for t in tokens]
            chosen = self._down_scales(statistics, reached, original if in_scales is None else original * in_scales, down)
            alphas.append(chosen.alpha)
            halves = [Matrix(half, in_scales, s) for half, s in zip(original.chunk(2), (None, chosen.scales), strict=True)]
            folded = torch.cat([half.folded(half.original) for half in halves])
            with self.report.timed("quantized stream and statistics"):
                train, held = statistics.of_inputs(reached)
            judged[FUSED[0]].append(self._round(FUSED[0], expert, self.gate_up, halves, train, held))
            del train, held
            with self.report.timed("quantized stream and statistics"):
                train, held = statistics.of_activations(reached, self._activation(expert, folded), self.down.shape[2])
            judged[FUSED[1]].append(self._round(FUSED[1], expert, self.down, [Matrix(down, chosen.scales, None)], train, held))
            count = sum(len(rows) for rows, t in zip(reached, tokens, strict=True) if not t.held_out)
            for parameter, columns in zip(FUSED, (self.gate_up.shape[2], self.down.shape[2]), strict=True):
                few[parameter] += [expert] if count < columns else []
        return [
            *self._lines(FUSED[0], judged[FUSED[0]], statistics.share, few[FUSED[0]], smoothed),
            *self._lines(FUSED[1], judged[FUSED[1]], statistics.share, few[FUSED[1]], self._smoothed_down(alphas)),
        ]

    def _down_scales(self, statistics: _Statistics, reached: list[Tensor], gate_up: Tensor, down: Tensor) -> ScaleChoice:
        """Smoothing scales of what goes into down, which divide the rows of up. gate_up, down: float32, of one expert."""
        one = ScaleChoice(down.new_ones(down.shape[1]), 0.0, "identity", 0.0, 0.0)
        if not self.folds_into_up:
            return one
        assert self.recipe.scale is not None
        gate: Any = self.module._apply_gate
        with self.report.timed("scale search"):
            weight = gate_up.to(self.gate_up.dtype)
            energies = statistics.energies(reached, lambda x: gate(linear(x.to(weight.dtype), weight)), down.shape[1])
            consumers, channels = [(down, nearest(self.specs[FUSED[1]]))], torch.arange(down.shape[1], device=down.device)
            return search_scales(consumers, channels, len(channels), *energies, self.recipe.scale, judges=self._judges_of_down(down))

    def _judges_of_down(self, _down: Tensor) -> list[Consumer] | None:
        """Where specs only resemble how matrices are stored: (some rows of an expert's down, their real rounding)."""
        return None

    def _smoothed_down(self, alphas: list[float]) -> Mapping[str, Any]:
        """`Smoothing.described` of what goes into down, whose scales are each expert's own."""
        if not self.folds_into_up:
            return {"fold": None, "alpha": 0.0, "family": "not folded"}
        return {"fold": f"{self.inside}.{FUSED[0]}", "alpha": fmean(alphas), "family": "by expert"}

    def _round(self, parameter: str, expert: int, into: Tensor, matrices: list[Matrix], train: Moments, held: Moments) -> list[Any]:
        """Quantize matrices of an expert that share an input, into its place in `into`; what `_lines` is to know of each."""
        spec, weights = self.specs[parameter], [matrix.folded(matrix.original) for matrix in matrices]
        found = round_together(weights, spec, self.recipe, train, held, self.report.timed)
        with self.report.timed("held-out check"):
            plain = [matrix.folded(fake_quantize(matrix.original, choose_grid(matrix.original, spec))) for matrix in matrices]
            judged = [judge(f, w, p, train, held, self.recipe) for f, w, p in zip(found, weights, plain, strict=True)]
        parts = [to_quantized_weight(each.best.codes, each.best.grid) for each in judged]
        joined = QuantizedWeight(spec=spec, **{n: torch.cat([getattr(part, n) for part in parts]) for n in ("q", "scales", "zero_points")})
        self.packed[parameter].append(pack_weight(joined))
        into[expert].copy_(torch.cat([each.best.dequantized() for each in judged]))
        return judged

    def _activation(self, expert: int, folded: Tensor) -> Callable[[Tensor, bool], Tensor]:
        """What goes into down: of x [tokens, H], with the quantized weights or with the float ones."""
        gate: Any = self.module._apply_gate
        weights = (folded.to(self.gate_up.dtype), self.gate_up[expert])
        return lambda x, quantized: gate(linear(x.to(self.gate_up.dtype), weights[quantized]))

    def _lines(
        self, parameter: str, judged: list[list[Any]], share: Tensor, few: list[int], smoothed: Mapping[str, Any]
    ) -> list[LayerReport]:
        """A line for a matrix of all experts; losses are weighted by the tokens that an expert gets."""
        matrices = [each for expert in judged for each in expert]
        weights = share.repeat_interleave(len(judged[0])).tolist()
        energy = max(sum(w * each.energy for w, each in zip(weights, matrices, strict=True)), 1e-30)
        mean = lambda of: sum(of(each) for each in matrices) / len(matrices)  # noqa: E731
        fallbacks = [each.best.fallback for each in matrices if each.best.fallback]
        spec, (_, out_features, in_features) = self.specs[parameter], self.module.get_parameter(parameter).shape
        line = LayerReport(
            name=f"{self.name}.{parameter}",
            shape=(out_features, in_features),
            bits=spec.bits,
            group_size=spec.group_size,
            **smoothed,
            clip=mean(lambda each: each.best.clip),
            correction=mean(lambda each: each.best.correction),
            rounding=self.recipe.rounding,
            loss_plain=sum(w * each.plain for w, each in zip(weights, matrices, strict=True)) / energy,
            loss=sum(w * each.loss for w, each in zip(weights, matrices, strict=True)) / energy,
            fallback=f"{len(fallbacks)} of {len(matrices)} matrices: {fallbacks[0]}" if fallbacks else None,
            experts=len(judged),
            few_tokens=few,
        )
        return [line]

    def module_of_integers(self) -> AwqExperts:
        weights = [ExpertWeights.from_packed(self.packed[parameter], self.specs[parameter]) for parameter in FUSED]
        return AwqExperts(self.module, *weights)


class _Statistics:
    """Moments of what reaches single experts, filled up from all tokens of the layer. share: of the tokens, by expert."""

    def __init__(self, tokens: Sequence[Tokens], experts: int, channels: int, in_scales: Tensor | None) -> None:
        self.tokens, self.experts, self.channels, self.in_scales = tokens, experts, channels, in_scales
        self.batches = [torch.arange(len(t.x0), device=t.x0.device) for t in tokens]

    @cached_property
    def share(self) -> Tensor:
        chosen = torch.cat([t.chosen.reshape(-1) for t in self.tokens])
        counts = torch.bincount(chosen[chosen < self.experts], minlength=self.experts)
        return counts.to(torch.float32) / counts.sum()

    @cached_property
    def _all_inputs(self) -> Statistic:
        return self._sum(self.batches, self._inputs)

    def _x0(self, t: Tokens, rows: Tensor) -> Tensor:
        return t.x0[rows] if self.in_scales is None else t.x0[rows].to(torch.float32) / self.in_scales

    def _inputs(self, t: Tokens, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        x0 = self._x0(t, rows)
        return (x0, None) if t.x is None else (t.x[rows], x0)

    def of_inputs(self, reached: list[Tensor]) -> Statistic:
        return _filled(self._sum(reached, self._inputs), lambda: self._all_inputs, self.channels)

    def of_activations(self, reached: list[Tensor], activation: Callable[[Tensor, bool], Tensor], channels: int) -> Statistic:
        def inputs(t: Tokens, rows: Tensor) -> tuple[Tensor, Tensor | None]:
            x0 = activation(self._x0(t, rows), False)
            return (x0, None) if t.x is None else (activation(t.x[rows], True), x0)

        return _filled(self._sum(reached, inputs), lambda: self._sum(self._spare_rows(channels), inputs), channels)

    def energies(self, reached: list[Tensor], activation: Callable[[Tensor], Tensor], channels: int) -> tuple[Tensor, Tensor]:
        """E[h^2] of the float stream's h = activation(x0), [channels]: (for the search, of the held-out slice)."""

        def sums(rows: list[Tensor], held_out: bool) -> tuple[Tensor, int]:
            taken = [(t, which) for t, which in zip(self.tokens, rows, strict=True) if t.held_out is held_out and len(which)]
            total = torch.zeros(channels, dtype=torch.float32, device=rows[0].device)
            for t, which in taken:
                total += activation(self._x0(t, which)).to(torch.float32).square().sum(0)
            return total, sum(len(which) for _, which in taken)

        own, spare = [sums(reached, held_out) for held_out in (False, True)], None
        means = []
        for held_out, enough in ((False, channels), (True, max(1, channels // HELD_OUT))):
            total, count = own[held_out]
            share = min(1.0, count / enough)
            mean = share * total / max(count, 1)
            if share < 1:
                spare = spare or [sums(self._spare_rows(channels), each) for each in (False, True)]
                total, count = spare[held_out] if spare[held_out][1] else spare[False]
                mean += (1 - share) * total / count
            means.append(mean)
        return means[0], means[1]

    def _spare_rows(self, channels: int) -> list[Tensor]:
        """Tokens of the layer, spread evenly, that stand in for those that did not reach an expert."""
        step = max(1, sum(map(len, self.batches)) // (SPARE_TOKENS * channels))
        return [rows[::step] for rows in self.batches]

    def _sum(self, rows: list[Tensor], inputs: Callable[[Tokens, Tensor], tuple[Tensor, Tensor | None]]) -> Statistic:
        train, held = Moments(), Moments()
        for t, which in zip(self.tokens, rows, strict=True):
            if len(which):
                (held if t.held_out else train).add(*inputs(t, which), want_ee=t.held_out)
        return train, held


def _filled(own: Statistic, spare: Callable[[], Statistic], channels: int) -> Statistic:
    (train, held), enough = own, max(1, channels // HELD_OUT)
    if train.tokens < channels or held.tokens < enough:
        all_train, all_held = spare()
        train = train.mixed(all_train, train.tokens / channels)
        held = held.mixed(all_held if all_held.tokens else all_train, held.tokens / enough)
    return train, held


@contextmanager
def same_routes(block: nn.Module, names: Iterable[str], routes: dict[str, Any]) -> Iterator[None]:
    """Have modules of experts take the tokens' experts from `routes`, which keeps those of the first call: where two experts are as good
    as equal to a router, rounding decides, and tells nothing of the experts."""

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args:
                return None
            chosen, options = routes.setdefault(name, (args[1:], kwargs))
            return (args[0], *chosen), options

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
