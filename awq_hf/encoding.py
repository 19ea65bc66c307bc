"""From float weights to the blocks of GGUF files, by the same search: smoothing judged by the target's own quantizer, importance from the
same calibration, and codes chosen together, on the scales that the quantizer found.

K-quants start from the float weights and never from int4. The importance matrix is that of the smoothed model, E[x^2] / s^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from awq_hf import unfinished
from awq_hf.affine import MIN_SCALE, Grid
from awq_hf.block import BlockWork
from awq_hf.blocks import find_blocks
from awq_hf.calibration.data import Windows
from awq_hf.calibration.stats import Moments, OutputError, output_energy
from awq_hf.calibration.stream import Call
from awq_hf.exporters.gguf.blocks.steps import KINDS, steps_of, with_codes
from awq_hf.exporters.gguf.encode import encode as encode_rows
from awq_hf.exporters.gguf.ggml import row_bytes
from awq_hf.matrices import as_kind, shape_of
from awq_hf.pipeline import Progress, run
from awq_hf.preflight import Plan
from awq_hf.recipe import Recipe
from awq_hf.report import LayerReport, Report
from awq_hf.rounding.descent import codes_by_descent
from awq_hf.rounding.gptq import RoundingFailed
from awq_hf.spec import EncodedWeight, QuantSpec
from awq_hf.transforms.awq_scale import Consumer
from awq_hf.transforms.correction import Corrected, corrected_target

JUDGED_ROWS = 256  # of a weight, that the target's own quantizer judges smoothing scales by

# Of the correlations of inputs, towards none: what codes are fitted to should hold for other text as well. KL of the demonstration model
# with 0.3, 0.5, 0.7 and 0.9: Q2_K .110 .107 .112 .122, Q3_K .0278 .0282 .0300 .0334, Q4_K .0074 .0072 .0074 .0084; calibrated on text of
# another kind .149 .138 .137 .142, .0349 .0361 .0368 .0399 and .0100 .0093 .0091 .0097. No other is better by more than 4 % anywhere.
SHRINKAGE = 0.5

# What resembles a type closely enough to leave the best few scales to its own quantizer.
PROXIES = {
    Type.Q2_K: QuantSpec(2, 16),
    Type.Q3_K: QuantSpec(3, 16, symmetric=True),
    Type.Q4_0: QuantSpec(4, 32, symmetric=True),
    Type.IQ4_NL: QuantSpec(4, 32, symmetric=True),
    Type.IQ4_XS: QuantSpec(4, 32, symmetric=True),
    Type.Q6_K: QuantSpec(8, 16, symmetric=True),
    Type.Q8_0: QuantSpec(8, 32, symmetric=True),
}
PROXY = QuantSpec(4, 32)


@dataclass
class EncodedLayer(LayerReport):
    """kind: the type; bits: of a code, rounded down from bits per weight. loss_plain: of the type's quantizer without importance;
    loss_importance: with the float model's. Both of the original weight.
    """

    kind: str = ""
    loss_importance: float = 0.0


@dataclass
class Encoded:
    """weights: module -> its blocks, rows in the model's order; importance: module -> E[x^2] of the float model's inputs, [in]."""

    weights: dict[str, EncodedWeight] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    report: Report | None = None


def encode(rows: Tensor, kind: Type, importance: Tensor | None) -> Tensor:
    """rows: float32 [n, in]; importance: float32 [in]. Returns uint8 [n, bytes]."""
    return torch.from_numpy(encode_rows(rows.cpu(), kind, None if importance is None else importance.cpu()))


def decode(data: Tensor, kind: Type, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [n, bytes] -> float32 [n, in]."""
    return torch.from_numpy(gguf.dequantize(data.numpy(), kind)).to(device)


def encode_model(
    model: nn.Module, kinds: Mapping[str, Type], recipe: Recipe, windows: Windows, progress: Progress | None = None
) -> Encoded:
    """Encode Linears of the model's decoder blocks; the model is left smoothed, with the decoded weights in its Linears.

    kinds: full name of a Linear -> its type. Raises ValueError before any work where a row does not divide into blocks.
    """
    prefix, _ = find_blocks(model)
    plan = Plan({name: PROXIES.get(kind, PROXY) for name, kind in kinds.items() if name.startswith(f"{prefix}.")}, {})
    for name in plan.specs:
        _check_width(name, shape_of(model.get_submodule(name))[1], kinds[name])
    result = Encoded()

    def make_work(name: str, *rest: Any) -> EncodingWork:
        return EncodingWork(name, *rest, kinds=kinds, result=result)

    result.report = run(model, recipe, plan, windows, progress, make_work)
    unfinished.end(model)
    return result


def _check_width(name: str, width: int, kind: Type) -> None:
    try:
        row_bytes(kind, width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class EncodingWork(BlockWork):
    """One block on its way to GGUF's."""

    def __init__(self, name: str, *rest: Any, kinds: Mapping[str, Type], result: Encoded) -> None:
        super().__init__(name, *rest)
        self.types = {inside: kinds[f"{name}.{inside}"] for inside in self.specs}
        self.result = result

    def _judges(self, names: list[str]) -> list[Consumer]:
        return [(_sample(self.linears[name].weight.data.to(torch.float32)), self._rounding(name)) for name in names]

    def _rounding(self, name: str) -> Any:
        kind = self.types[name]
        return lambda rows, energy: decode(encode(rows, kind, energy), kind, rows.device)

    def _round(self, names: list[str], spec: QuantSpec, train: Moments, held: Moments) -> None:
        for kind in dict.fromkeys(self.types[name] for name in names):
            self._encode([name for name in names if self.types[name] is kind], kind, train, held)

    def _encode(self, names: list[str], kind: Type, train: Moments, held: Moments) -> None:
        """Encode Linears that share an input and a type, as one matrix."""
        timed, weights = self.report.timed, [self._folded(name) for name in names]
        corrected = [Corrected(weight, 0.0, None) for weight in weights]
        if self.recipe.correction:
            with timed("correction"):
                corrected = [corrected_target(w, train, held) for w in weights]
        energy, together = train.H.diagonal(), torch.cat([each.target for each in corrected])
        with timed("encoding"):
            candidates = {"importance": encode(torch.cat(weights), kind, energy)}
            aimed = candidates["importance"]
            if any(each.strength or each.residual for each in corrected):
                aimed = candidates["corrected"] = encode(together, kind, energy)
        if kind in KINDS and self.recipe.rounding != "nearest":
            with timed("rounding"):
                try:
                    candidates["descent"] = codes_together(together, aimed, kind, train.H)
                except RoundingFailed as error:
                    self.report.notes.append(f"{self.name}.{names[0]}: {error}; codes were rounded one by one")
        row = 0
        with timed("held-out check"):
            for name, weight, aim in zip(names, weights, corrected, strict=True):
                rows = slice(row, row := row + len(weight))
                self._keep(name, weight, {how: data[rows] for how, data in candidates.items()}, aim, train, held)

    def _keep(self, name: str, weight: Tensor, candidates: dict[str, Tensor], aim: Corrected, train: Moments, held: Moments) -> None:
        """Take the best candidate of each row on the held-out slice. weight: folded, float32 [out, in]."""
        kind, linear, error_of = self.types[name], self.linears[name], OutputError(weight, held)
        device, original = weight.device, self.linears[name].weight.data.to(torch.float32)
        errors = torch.stack([error_of(decode(data, kind, device)) for data in candidates.values()])  # [candidates, out]
        winner = errors.argmin(0)
        data = torch.stack(list(candidates.values()))[winner.cpu(), torch.arange(len(weight))]
        chosen = [how for i, how in enumerate(candidates) if bool((winner == i).any())]
        importance = self._energies(self._leader(name))[0]
        plain, alone = (
            float(error_of(self._with_folds(name, decode(encode(original, kind, by), kind, device))).sum()) for by in (None, importance)
        )
        self.result.weights[f"{self.name}.{name}"] = EncodedWeight(data, kind.name, (weight.shape[0], weight.shape[1]))
        self.result.importance[f"{self.name}.{name}"] = importance.cpu()
        linear.weight.data.copy_(decode(data, kind, device))
        if name in self.out_scales and linear.bias is not None:
            linear.bias.data.copy_(linear.bias.data.to(torch.float32) / self.out_scales[name])
        choice, output = self.choices.get(name), max(float(output_energy(weight, held).sum()), 1e-30)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        self.layers[name] = EncodedLayer(
            name=f"{self.name}.{name}",
            shape=(weight.shape[0], weight.shape[1]),
            bits=8 * size // block,
            group_size=block,
            fold=next((fold.producer for fold in self.folds if name in fold.consumers), None),
            alpha=choice.alpha if choice else 0.0,
            family=choice.family if choice else "not folded",
            clip=1.0,
            correction=aim.strength,
            residual=aim.residual,
            rounding=" and ".join(chosen),
            loss_plain=plain / output,
            loss=float(errors.amin(0).sum()) / output,
            dead_channels=int((train.H.diagonal() == 0).sum()),
            kind=kind.name,
            loss_importance=alone / output,
        )
        self.report.layers.append(self.layers[name])

    def replace(self, call: Call) -> None:
        """Modules get their classes back; they hold the decoded weights."""
        for name, linear in self.linears.items():
            if type(linear) is not self.kinds[name]:
                self.block.set_submodule(name, as_kind(self.kinds[name], linear.weight.data, linear.bias))


def codes_together(weight: Tensor, data: Tensor, kind: Type, H: Tensor) -> Tensor:  # noqa: N803
    """The blocks `data` of weight [out, in], with codes chosen by coordinate descent for E[x x^T] = H: uint8 [out, bytes]."""
    found = steps_of(data.numpy(), kind)
    steps, offsets = (torch.from_numpy(values).to(weight.device) for values in (found.steps, found.offsets))
    scales = torch.where(steps == 0, MIN_SCALE, steps)  # of sub-blocks that are constant, whatever their codes
    codes = codes_by_descent(weight, Grid(scales, offsets / scales, _Codes(found.top)), H, SHRINKAGE)
    return torch.from_numpy(with_codes(data.numpy(), kind, codes.to(torch.uint8).cpu().numpy()))


@dataclass(frozen=True)
class _Codes:
    max_code: int


def _sample(weight: Tensor) -> Tensor:
    rows = torch.linspace(0, len(weight) - 1, min(JUDGED_ROWS, len(weight)), device=weight.device).long()
    return weight[rows]
