"""Experts of a checkpoint, one quantized matrix each in the file, for a model in which transformers fuses those of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from awq_hf.experts import FUSED, AwqExperts, ExpertWeights, joins_words, reason_against
from awq_hf.headers import Headers
from awq_hf.kernels.layout import GEMM, WIDE
from awq_hf.renaming import Conversion, last_parts
from awq_hf.spec import QuantSpec
from awq_hf.stored import DTYPES, Stored

SpecOf = Callable[[str], QuantSpec]
Layouts = dict[str, str]


@dataclass
class ExpertTensors:
    """Quantized matrices that the loader fuses into parameters of modules of experts. found: parameter -> (part, expert) -> owner."""

    model: Any
    headers: Headers
    found: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)

    def take(self, owner: str, parameter: str, conversion: Conversion) -> bool:
        """Note that `owner` goes into `parameter`. False where it is no expert's matrix, or the module's class is not understood."""
        module, _, name = parameter.rpartition(".")
        number = _number(owner, conversion)
        if number is None or name not in FUSED or reason_against(self.model.get_submodule(module)) is not None:
            return False
        self.conversions[parameter] = conversion
        self.found.setdefault(parameter, {})[conversion.part, number] = owner
        return True

    def place(self, spec_of: SpecOf, declared: str | None, version: str | None) -> Layouts:
        """Put empty AwqExperts into the model. Returns the layout of each of their weights, by its name.

        Raises ValueError naming the tensor when one is missing, too many, of another shape or in float beside quantized ones.
        """
        layouts: Layouts = {}
        for module in dict.fromkeys(parameter.rpartition(".")[0] for parameter in self.found):
            weights = []
            for name in FUSED:
                weight, layouts[f"{module}.{name}"] = self._empty(f"{module}.{name}", module, spec_of, declared, version)
                weights.append(weight)
            self.model.set_submodule(module, AwqExperts(self.model.get_submodule(module), *weights))
        return layouts

    def _empty(self, parameter: str, module: str, spec_of: SpecOf, declared: str | None, version: str | None) -> tuple[ExpertWeights, str]:
        experts, rows, columns = self.model.get_parameter(parameter).shape
        if parameter not in self.found:
            raise ValueError(f"{parameter} is in float, but other matrices of its experts are quantized, which is not supported")
        parts = len(self.conversions[parameter].parts)
        owners = self._complete(parameter, experts, parts)
        specs = {spec_of(f"{module}.{expert}.{_leaf(self.conversions[parameter], part)}"): owner for (part, expert), owner in owners}
        if len(specs) > 1:
            raise ValueError(
                f"overrides give {' and '.join(list(specs.values())[:2])} different widths; experts of a layer are stored alike"
            )
        spec, shape = next(iter(specs)), (rows // parts, columns)
        dtypes: dict[str, str] = {}
        for _, owner in owners:
            layout = Stored(owner, shape, self.headers, spec).layout(declared, version)
            if layout not in (GEMM, WIDE) or (parts > 1 and not joins_words(shape[0], spec.bits)):
                raise ValueError(
                    f"{owner} is stored as {layout} with {shape[0]} output channels, which cannot be fused with other experts; write "
                    "the checkpoint again with version gemm"
                )
            dtypes[self.headers[f"{owner}.scales"].dtype] = f"{owner}.scales"
        if len(dtypes) > 1:
            raise ValueError(f"{' and '.join(dtypes.values())} are {' and '.join(dtypes)}; scales of a layer's experts need one dtype")
        weight = ExpertWeights(experts, columns, rows, spec, device="meta")
        scales = torch.empty(weight.scales.shape, dtype=DTYPES[next(iter(dtypes))], device="meta")
        weight.scales = nn.Parameter(scales, requires_grad=False)
        return weight, layout

    def _complete(self, parameter: str, experts: int, parts: int) -> list[tuple[tuple[int, int], str]]:
        """The matrices of a parameter in order. Raises ValueError when there are others than one for every expert and part."""
        found = self.found[parameter]
        for (_, expert), owner in found.items():
            if expert >= experts:
                raise ValueError(f"{owner}.qweight is in the checkpoint, but {type(self.model).__name__} has {experts} experts a layer")
        for expert, part in ((expert, part) for part in range(parts) for expert in range(experts)):
            if (part, expert) not in found:
                owner = self._name_of(parameter, part, expert)
                if f"{owner}.weight" in self.headers:
                    raise ValueError(f"{owner}.weight is in float, but other experts of its layer are quantized, which is not supported")
                raise ValueError(f"{owner}.qweight is missing from the checkpoint")
        return sorted(found.items())

    def _name_of(self, parameter: str, part: int, expert: int) -> str:
        """What the matrix of an expert would be called, by the name of another one."""
        conversion = self.conversions[parameter]
        (other, _), owner = next(iter(self.found[parameter].items()))
        start = ".".join(owner.split(".")[: -1 - _depth(_leaf(conversion, other))])
        return f"{start}.{expert}.{_leaf(conversion, part)}"


def _leaf(conversion: Conversion, part: int) -> str:
    """The last parts of a matrix's name, behind the expert's number."""
    return last_parts(conversion.parts[part])


def _depth(name: str) -> int:
    return name.count(".") + 1


def _number(owner: str, conversion: Conversion) -> int | None:
    if not conversion.parts:
        return None
    parts = owner.split(".")
    place = len(parts) - 1 - _depth(_leaf(conversion, conversion.part))
    return int(parts[place]) if place >= 0 and parts[place].isdigit() else None
