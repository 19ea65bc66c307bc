"""One block on its way from float to integers: folds, scales, then its Linears in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from awq_hf.affine import choose_grid, fake_quantize, to_quantized_weight
from awq_hf.blocks import block_signature, experts_of, matrices_of, routers_of
from awq_hf.calibration.data import Batch
from awq_hf.calibration.paused import PausedForwards
from awq_hf.calibration.stats import Moments
from awq_hf.calibration.stream import Call, capture_inputs
from awq_hf.expert_block import ExpertsWork, Specs, same_routes, tokens_of
from awq_hf.folding import BlockProbe, FoldPoint, discover
from awq_hf.folding.fold import weight_of
from awq_hf.folding.probe import verify
from awq_hf.freed import give_back
from awq_hf.layer import Rounded, judge, round_together
from awq_hf.linear import AwqLinear
from awq_hf.matrices import as_kind, as_linear
from awq_hf.parallel import in_parallel
from awq_hf.products import run
from awq_hf.recipe import Recipe
from awq_hf.report import LayerReport, Report
from awq_hf.residual_errors import ResidualErrors
from awq_hf.smoothing import Smoothing
from awq_hf.spec import QuantizedWeight, QuantSpec
from awq_hf.transforms.awq_scale import Consumer, Loss, nearest, search_scales
from awq_hf.wording import option

LARGE = 1 << 22  # weights of a block: what a smaller one leaves behind costs more time to be given back than it is worth
SAME = 0.02  # relative difference that the order of sums can make in bfloat16 within a block; a wrong code costs far more


class BlockWork:
    """The state of one block while it is being quantized. Module names are relative to the block.

    quantized: the result, Linear -> QuantizedWeight. While it fills up, the block's Linears hold the dequantized weights, so that
    later ones are fitted to the inputs they will really get.
    """

    def __init__(
        self, name: str, block: nn.Module, recipe: Recipe, specs: Mapping[str, QuantSpec], batches: Sequence[Batch], report: Report,
        experts: Mapping[str, Specs] | None = None,
    ) -> None:  # fmt: skip
        """specs, experts: of the whole model's layers, and modules of experts, that are to be quantized, by their full names."""
        self.name, self.block, self.recipe, self.batches, self.report = name, block, recipe, batches, report
        self.kinds = {name: type(module) for name, module in matrices_of(block).items()}
        self.linears = {name: as_linear(module) for name, module in matrices_of(block).items()}
        self.specs = {inside: specs[f"{name}.{inside}"] for inside in self.linears if f"{name}.{inside}" in specs}
        for inside, linear in self.linears.items():
            block.set_submodule(inside, linear)  # a Conv1D is a Linear until the block is done
        found = {inside: f"{name}.{inside}" for inside in experts_of(block)} if experts else {}
        self.experts = {
            inside: self._experts_work(inside, block.get_submodule(inside), experts[full])
            for inside, full in found.items()
            if experts and full in experts
        }
        self.readers = {**self.linears, **(experts_of(block) | routers_of(block) if self.experts else {})}  # of hidden states
        self.order: list[str] = []  # in which they run
        self.quantized: dict[str, QuantizedWeight] = {}
        self.layers: dict[str, LayerReport] = {}
        self.groups: list[tuple[str, ...]] = []  # Linears that share an input, in order of execution
        self.smoothing = Smoothing(block, self.specs.keys(), self.experts.keys())
        self.float_inputs: dict[str, list[Tensor]] = {}  # a group's first Linear -> x0 of each batch
        self.float_routes: dict[str, list[Tensor]] = {}  # experts -> those of each token, of each batch
        self.residuals = ResidualErrors(batches)
        self.large = sum(parameter.numel() for parameter in block.parameters()) > LARGE

    def _experts_work(self, inside: str, module: nn.Module, specs: Specs) -> ExpertsWork:
        return ExpertsWork(self.name, inside, module, specs, self.recipe, self.report)

    # Folds

    def discover_folds(self, call: Call, known: dict[Any, list[FoldPoint]]) -> None:
        """Find the block's folds, or take over those of an equal block and verify them on this one."""
        probe = BlockProbe(self.block, *call, self.readers)
        self.groups = probe.groups_run_once()
        self.order = [entry.removeprefix("> ") for entry in probe.baseline.order if entry.startswith("> ")]
        for name, why in probe.not_run_once().items():
            if name in self.specs or name in self.experts:
                (self.specs if name in self.specs else self.experts).pop(name)
                self.report.left_in_float[f"{self.name}.{name}"] = why
        if self.recipe.mends_residuals:
            alone = [group[0] for group in self.groups if len(group) == 1 and group[0] in self.specs]
            self.residuals.find(probe, alone, self.experts)
        if self.recipe.scale is None:
            return
        signature = block_signature(self.block)
        if signature not in known or not verify(probe, known[signature]):
            known[signature] = discover(probe)
        self.smoothing.folds = known[signature]

    def run_float(self, calls: Sequence[Call]) -> list[Any]:
        """Run the float block on every batch and keep the inputs of its Linears; returns the block's outputs."""
        leaders = [group[0] for group in self.groups]
        self.float_inputs = {name: [] for name in leaders}
        self.float_routes = {name: [] for name in self.experts}
        names = [*dict.fromkeys([*leaders, *self.experts, *self.residuals.sources])]
        captured = capture_inputs(self.block, calls, names, self.experts)
        self.residuals.keep_float([inputs for inputs, _ in captured])
        for batch, (inputs, _) in zip(self.batches, captured, strict=True):
            for name in self.experts:
                inputs[name], index = inputs[name]
                self.float_routes[name].append(batch.real_tokens(index))
            if missing := [name for name in leaders if name not in inputs]:
                raise ValueError(
                    f"{self.name}.{missing[0]} does not run on every calibration window; layers that run conditionally cannot be quantized "
                    f"yet: {option('modules_to_not_convert', [missing[0]])} leaves it in float"
                )
            for name in leaders:
                self.float_inputs[name].append(batch.real_tokens(inputs.pop(name)))
        return [output for _, output in captured]

    def _float_moments(self, leader: str) -> tuple[Moments, Moments]:
        """Moments of the float stream's input: (for the search, of the held-out slice)."""
        train, held = Moments(), Moments()
        for batch, x in zip(self.batches, self.float_inputs[leader], strict=True):
            (held if batch.held_out else train).add(x)
        return train, held if held.tokens else train

    def _energies(self, leader: str) -> tuple[Tensor, Tensor]:
        """E[x^2] of each channel of the float stream's input, [in]: (for the search, of the held-out slice)."""
        xs = self.float_inputs[leader]
        sums = in_parallel(lambda x: x.to(torch.float32).square().sum(0), xs)

        def mean(held_out: bool) -> Tensor | None:
            of = [i for i, batch in enumerate(self.batches) if batch.held_out is held_out]
            return torch.stack([sums[i] for i in of]).sum(0) / sum(len(xs[i]) for i in of) if of else None

        train, held = mean(False), mean(True)
        assert train is not None
        return train, train if held is None else held

    def _leader(self, name: str) -> str:
        return next(group[0] for group in self.groups if name in group)

    # Smoothing scales

    def choose_scales(self) -> None:
        """Search the scales of every fold, and divide the norms by them. Linears take their share when they are rounded."""
        for fold in self.smoothing.folds:
            names = [name for name in fold.consumers if name in self.specs]
            consumers = [(self.linears[name].weight.data.to(torch.float32), nearest(self.specs[name])) for name in names]
            consumers += [consumer for name in fold.consumers if name in self.experts for consumer in self.experts[name].consumers()]
            if not consumers:
                continue
            channels = len(weight_of(self.block.get_submodule(fold.producer)))
            assert self.recipe.scale is not None
            with self.report.timed("scale search"):
                energies, loss_of = self._energies(self._leader(fold.consumers[0])), self._scale_loss(fold)
                judges = self._judges(fold.consumers)
                choice = search_scales(consumers, fold.channel_map, channels, *energies, self.recipe.scale, loss_of, judges)
            self.smoothing.take(fold, choice)

    def _scale_loss(self, _fold: FoldPoint) -> Loss | None:
        """The loss of smoothing scales, where it is not the second-moment loss (an experiment overrides this)."""
        return None

    def _judges(self, _names: Sequence[str]) -> list[Consumer] | None:
        """Where specs only resemble how a fold's consumers are stored: (some of their rows, their real rounding)."""
        return None

    # Rounding

    def round_groups(self, calls: Sequence[Call]) -> list[Any]:
        """Quantize the Linears, group by group in the order of execution.

        calls: the block's calls in the quantized stream; returns what the quantized block puts out for them.
        """
        targets = {group[0]: [name for name in group if name in self.specs] for group in self.groups}
        stops = sorted({leader for leader, names in targets.items() if names} | self.experts.keys(), key=self.order.index)
        with PausedForwards(self.block, calls, stops, self.experts, self.residuals.sources) as forwards:
            for stop in stops:
                with self.report.timed("quantized stream and statistics"):
                    reached = forwards.inputs(stop) if self.recipe.stream == "quantized" else []
                if stop in self.experts:
                    self._round_experts(stop, reached)
                    reached = [pair and pair[0] for pair in reached]
                if names := targets.get(stop, []):
                    with self.report.timed("quantized stream and statistics"):
                        train, held = self._moments(stop, reached, self.residuals.before(stop, forwards))
                        if self.large:
                            give_back()  # pieces of activations, as much as all the statistics
                    for spec in dict.fromkeys(self.specs[name] for name in names):
                        self._round([name for name in names if self.specs[name] == spec], spec, train, held)
                    del train, held
                del reached
                self._let_go(stop)
            with self.report.timed("quantized stream and statistics"):
                return forwards.outputs()

    def _let_go(self, stop: str) -> None:
        """Free the inputs of groups that are done when the block stands at `stop`; experts still need those of their group's leader."""
        after = {self._leader(name) for name in self.experts if self.order.index(name) > self.order.index(stop)}
        for leader in [leader for leader in self.float_inputs if self.order.index(leader) <= self.order.index(stop)]:
            if leader not in after:
                del self.float_inputs[leader]

    def _round_experts(self, name: str, reached: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """reached: what the experts really get, (input, experts of each token) of each batch; none where the stream is not followed."""
        tokens = tokens_of(self.batches, self.float_inputs[self._leader(name)], reached, self.float_routes[name])
        lines = self.experts[name].round(tokens, self.smoothing.in_scales.get(name), self.smoothing.described(name))
        self.layers.update({line.name: line for line in lines})
        self.report.layers += lines

    def _moments(self, leader: str, reached: Sequence[Tensor | None], lacking: Iterable[Tensor | None]) -> tuple[Moments, Moments]:
        """Moments of what the group really gets, with smoothing folded in: (for the search, of the held-out slice).

        lacking: what its output, added to the residual stream, is to make up for in each batch.
        """
        scales = self.smoothing.in_scales.get(leader)
        if self.recipe.stream == "float":
            train, held = self._float_moments(leader)
            return (train, held) if scales is None else (train.scaled(scales), held.scaled(scales))
        train, held = Moments(), Moments()
        for batch, x, x0, d in zip(self.batches, reached, self.float_inputs[leader], lacking, strict=True):
            if x is not None:
                into = held if batch.held_out else train
                into.add(batch.real_tokens(x), x0 if scales is None else x0.to(torch.float32) / scales, want_ee=batch.held_out, d=d)
        return train, held if held.tokens else train

    def _folded(self, name: str) -> Tensor:
        """The Linear's weight with both of its folds carried out: float32 [out, in]."""
        return self.smoothing.carried_out(name, self.linears[name].weight.data.to(torch.float32))

    def _round(self, names: list[str], spec: QuantSpec, train: Moments, held: Moments) -> None:
        weights = [self._folded(name) for name in names]
        rounded = round_together(weights, spec, self.recipe, train, held, self.report.timed)
        with self.report.timed("held-out check"):
            for name, weight, found in zip(names, weights, rounded, strict=True):
                self._store(name, weight, found, train, held)

    def _store(self, name: str, weight: Tensor, found: Rounded, train: Moments, held: Moments) -> None:
        """Judge what was found for a Linear on the held-out slice, put it in place, and report it. weight: folded, float32 [out, in]."""
        original, spec, linear = self.linears[name].weight.data.to(torch.float32), self.specs[name], self.linears[name]
        rounded = self.smoothing.carried_out(name, fake_quantize(original, choose_grid(original, spec)))
        best, plain, loss, energy = judge(found, weight, rounded, train, held, self.recipe)
        self.quantized[name] = to_quantized_weight(best.codes, best.grid)
        linear.weight.data.copy_(best.dequantized())
        self.smoothing.divide_bias(name, linear)
        energy = max(energy, 1e-30)
        self.layers[name] = LayerReport(
            name=f"{self.name}.{name}",
            shape=(weight.shape[0], weight.shape[1]),
            bits=spec.bits,
            group_size=spec.group_size,
            **self.smoothing.described(name),
            clip=best.clip,
            correction=best.correction,
            residual=best.residual,
            rounding=best.rounding,
            loss_plain=plain / energy,
            loss=loss / energy,
            dead_channels=int((train.H.diagonal() == 0).sum()),
            fallback=best.fallback,
        )
        self.report.layers.append(self.layers[name])

    # The result

    @torch.no_grad()
    def replace(self, call: Call) -> None:
        """Put packed modules in the place of what was quantized; the rest gets its class back. Raises ValueError where they do not fit in.

        call: one on which the block must compute the same before and after.
        """
        routes: dict[str, Any] = {}
        experts = list(experts_of(self.block))  # also those that stay in float
        with same_routes(self.block, experts, routes):
            expected = run(self.block, *call[0], **call[1])
        self._put_in_place()
        try:
            with same_routes(self.block, experts, routes):
                packed = run(self.block, *call[0], **call[1])
        except Exception as error:
            raise ValueError(f"{self.name} does not run with quantized layers: {type(error).__name__}: {error}") from error
        for a, b in zip(*(filter(torch.is_tensor, tree_flatten(output)[0]) for output in (packed, expected)), strict=True):
            if a.is_floating_point() and float((a - b).float().norm()) > SAME * float(b.float().norm()):
                raise RuntimeError(f"{self.name} computes something else with its weights packed; please report this")

    def _put_in_place(self) -> None:
        for name, linear in self.linears.items():
            if name in self.quantized:
                self.block.set_submodule(name, AwqLinear.from_quantized(self.quantized[name], linear.bias, self.kinds[name]))
            elif type(linear) is not self.kinds[name]:
                self.block.set_submodule(name, as_kind(self.kinds[name], linear.weight.data, linear.bias))

        for name, experts in self.experts.items():
            self.block.set_submodule(name, experts.module_of_integers())

    def loss_line(self) -> str:
        """For the progress bar: the block's mean loss against plain rounding's."""
        ours, plain = (sum(getattr(layer, key) for layer in self.layers.values()) for key in ("loss", "loss_plain"))
        return f"loss {ours / max(len(self.layers), 1):.2e}, plain rounding {plain / max(len(self.layers), 1):.2e}"
