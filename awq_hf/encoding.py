"""From float weights to the blocks of GGUF files, by the same search: smoothing judged by the target's own quantizer, importance from the
same calibration, and codes chosen together (encoded_layer.py). Experts are in encoded_experts.py, embedding and head in encoded_ends.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from torch import nn

from awq_hf import unfinished
from awq_hf.block import BlockWork
from awq_hf.blocks import find_blocks
from awq_hf.calibration.data import Windows
from awq_hf.calibration.stats import Moments
from awq_hf.calibration.stream import Call
from awq_hf.encoded_ends import encode_ends
from awq_hf.encoded_experts import EncodedExperts, parts_of
from awq_hf.encoded_layer import PROXIES, PROXY, Encoded, EncodedLayer, decode, encode, encode_together, judge_blocks, judge_of, kind_of
from awq_hf.expert_block import Specs
from awq_hf.experts import FUSED, PARTS
from awq_hf.exporters.gguf.ggml import row_bytes
from awq_hf.matrices import as_kind, shape_of
from awq_hf.pipeline import BlockLoop, Progress
from awq_hf.preflight import Plan
from awq_hf.recipe import Recipe
from awq_hf.spec import EncodedWeight, QuantSpec
from awq_hf.streaming import InMemory
from awq_hf.transforms.awq_scale import Consumer


def encode_model(
    model: nn.Module,
    kinds: Mapping[str, Type],
    recipe: Recipe,
    windows: Windows,
    progress: Progress | None = None,
    source: InMemory | None = None,
) -> Encoded:
    """Encode matrices of the model: Linears and experts of its decoder blocks, its embedding and its head. The model is left smoothed, with
    the decoded weights in their places.

    kinds: full name -> its type; of experts, the name of their module with each of experts.PARTS behind it. source: where the blocks'
    weights are, if they are not in memory; what is encoded of those is let go of then, block by block. Raises ValueError before any work
    where a row does not divide into blocks.
    """
    plan = _plan(model, kinds)
    result, source = Encoded(), source or InMemory()

    def make_work(name: str, *rest: Any) -> EncodingWork:
        return EncodingWork(name, *rest, kinds=kinds, result=result, keep=source.later is None)

    ends = partial(encode_ends, model, kinds, recipe, result, source, progress)
    result.report = BlockLoop(model, recipe, plan, windows, progress, make_work, source=source, between=ends).run()
    unfinished.end(model)
    return result


def _plan(model: nn.Module, kinds: Mapping[str, Type]) -> Plan:
    """What resembles the types, of the blocks' matrices."""
    prefix, _ = find_blocks(model)
    modules = dict(model.named_modules())
    specs: dict[str, QuantSpec] = {}
    experts: dict[str, Specs] = {}
    for name, kind in kinds.items():
        module, _, part = name.rpartition(".")
        if name not in modules:
            _check_width(name, modules[module].get_parameter(PARTS[part][0]).shape[2], kind)
            gate, down = (PROXIES.get(kinds[f"{module}.{of}"], PROXY) for of in (parts_of(parameter)[0] for parameter in FUSED))
            experts[module] = gate, down
        else:
            _check_width(name, _width(modules[name]), kind)
            if name.startswith(f"{prefix}."):
                specs[name] = PROXIES.get(kind, PROXY)
            elif not bool(torch.isfinite(modules[name].get_parameter("weight")).all()):
                raise ValueError(f"{name}.weight holds NaN or infinity: the checkpoint is damaged, or does not fit its dtype")
    return Plan(specs, {}, experts)


def _width(module: nn.Module) -> int:
    return module.embedding_dim if isinstance(module, nn.Embedding) else shape_of(module)[1]


def _check_width(name: str, width: int, kind: Type) -> None:
    try:
        row_bytes(kind, width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class EncodingWork(BlockWork):
    """One block on its way to GGUF's. keep: the decoded weights, when it is done."""

    def __init__(self, name: str, *rest: Any, kinds: Mapping[str, Type], result: Encoded, keep: bool) -> None:
        self.all_types, self.result, self.keep = kinds, result, keep
        self.encoded_experts: dict[str, EncodedExperts] = {}
        super().__init__(name, *rest)
        self.types = {inside: kinds[f"{name}.{inside}"] for inside in self.specs}

    def _experts_work(self, inside: str, module: nn.Module, specs: Specs) -> EncodedExperts:
        work = EncodedExperts(self.all_types, self.result, self.name, inside, module, specs, self.recipe, self.report)
        self.encoded_experts[inside] = work
        return work

    def _judges(self, names: Sequence[str]) -> list[Consumer]:
        of_linears = [judge_of(self.linears[name].weight.data, self.types[name]) for name in names if name in self.specs]
        return of_linears + [judge for name in names if name in self.experts for judge in self.encoded_experts[name].judges()]

    def _round_experts(self, name: str, reached: Any) -> None:
        with self.report.timed("importance of experts"):
            self.encoded_experts[name].measure(self.batches, self.float_inputs[self._leader(name)], self.float_routes[name])
        super()._round_experts(name, reached)

    def _round(self, names: list[str], spec: QuantSpec, train: Moments, held: Moments) -> None:
        for kind in dict.fromkeys(self.types[name] for name in names):
            self._encode([name for name in names if self.types[name] is kind], kind, train, held)

    def _encode(self, names: list[str], kind: Type, train: Moments, held: Moments) -> None:
        """Encode Linears that share an input and a type, as one matrix."""
        weights, note = [self._folded(name) for name in names], lambda text: self.report.notes.append(f"{self.name}.{names[0]}: {text}")
        found = encode_together(weights, kind, self.recipe, train, held, self.report.timed, note)
        importance = self._energies(self._leader(names[0]))[0]
        with self.report.timed("held-out check"):
            for name, weight, candidates in zip(names, weights, found, strict=True):
                original = self.linears[name].weight.data.to(weight.dtype)
                plain, alone = (
                    self.smoothing.carried_out(name, decode(encode(original, kind, by), kind, weight.device)) for by in (None, importance)
                )
                self._keep(name, judge_blocks(candidates, weight, kind, (plain, alone), held), kind, train)
                self.result.importance[f"{self.name}.{name}"] = importance.cpu()

    def _keep(self, name: str, best: Any, kind: Type, train: Moments) -> None:
        """Put what was found for a Linear in place, and report it."""
        linear, shape = self.linears[name], (best.weight.shape[0], best.weight.shape[1])
        self.result.weights[f"{self.name}.{name}"] = EncodedWeight(best.data, kind.name, shape)
        linear.weight.data.copy_(best.weight)
        self.smoothing.divide_bias(name, linear)
        self.layers[name] = EncodedLayer(
            name=f"{self.name}.{name}",
            shape=shape,
            **self.smoothing.described(name),
            clip=1.0,
            correction=best.correction,
            residual=best.residual,
            rounding=" and ".join(best.rounding),
            loss_plain=best.plain / best.energy,
            loss=best.loss / best.energy,
            dead_channels=int((train.H.diagonal() == 0).sum()),
            loss_importance=best.importance / best.energy,
            **kind_of(kind),
        )
        self.report.layers.append(self.layers[name])

    def replace(self, call: Call) -> None:
        """Modules get their classes back; they hold the decoded weights, or none."""
        if not self.keep:
            for name in self.layers.keys() & self.linears.keys():
                _empty(self.linears[name], "weight")
            for experts in self.experts.values():
                for parameter in FUSED:
                    _empty(experts.module, parameter)
        for name, linear in self.linears.items():
            if type(linear) is not self.kinds[name]:
                self.block.set_submodule(name, as_kind(self.kinds[name], linear.weight.data, linear.bias))


def _empty(module: nn.Module, name: str) -> None:
    module.register_parameter(name, nn.Parameter(module.get_parameter(name).to("meta"), requires_grad=False))
