"""Checkpoints in the formats of the targets compressed-tensors and gptq, as `Checkpoint`s: exports read back, and others that are alike.

What those formats can say beyond integers in groups, with scales and zero points, is refused by name.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from awq_hf.compat import progress_bar
from awq_hf.config import AwqConfig
from awq_hf.exporters import awq, compressed_tensors, gptq
from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.opening import directory_of, open_files
from awq_hf.kernels.layout import words_per_row
from awq_hf.spec import BITS, QuantizedWeight, QuantSpec
from awq_hf.stored import Packed

PACKAGES = {gptq.NAME: "gptqmodel", compressed_tensors.NAME: "compressed-tensors"}  # quant_method -> what transformers reads all of it with


class NotReadHere(ValueError):
    """A checkpoint in one of the formats that uses a part of it which is not read here."""


def open_export(directory: str | os.PathLike[str]) -> Checkpoint:
    """A directory whose config.json has one of PACKAGES as its quant_method. Raises NotReadHere naming what is in the way."""
    content = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    stored = content["quantization_config"]
    kind = _Gptq if stored["quant_method"] == gptq.NAME else _CompressedTensors
    return open_files(Path(directory), os.fspath(directory), functools.partial(kind.of, stored))


def load_export(kind: Any, name: str, location: Mapping[str, Any], **options: Any) -> Any:
    """kind.from_pretrained of such a checkpoint: of a copy in our own format, which lies in a temporary directory for as long as it takes.

    name: a directory or a Hub id; location: its revision and so on. Raises NotReadHere.
    """
    checkpoint = open_export(directory_of(name, dict(location)))
    with TemporaryDirectory(prefix="awq-hf-") as room:
        awq.export(checkpoint, Path(room) / "awq", functools.partial(progress_bar, disable=True))
        return kind.from_pretrained(Path(room) / "awq", **options)


@dataclass(frozen=True)
class _Export(Checkpoint):
    """stored: the quantization_config. A subclass says which tensor shows that a module is quantized, and what all of them mean."""

    stored: Mapping[str, Any] = field(default_factory=dict)
    MARK = ""

    @classmethod
    def of(cls, stored: Mapping[str, Any], **fields: Any) -> _Export:
        """With a config of ours, for what is made of the checkpoint."""
        found = cls(**fields, quantization=None, stored=stored)
        specs = {owner: packed.spec for owner, packed in found.packed.items()}
        if not specs:
            raise NotReadHere(f"no tensor is named *.{cls.MARK}")
        common = Counter(specs.values()).most_common(1)[0][0]
        others = {owner: _options(spec) for owner, spec in specs.items() if spec != common}
        return replace(found, quantization=AwqConfig(**_options(common), overrides=others))

    @functools.cached_property
    def packed(self) -> dict[str, Packed]:
        owners = [name.removesuffix(f".{self.MARK}") for name in self.headers if name.endswith(f".{self.MARK}")]
        return {owner: self._packed(owner) for owner in owners}

    @property
    def activation_scales(self) -> list[str]:  # a cached property there
        return []

    def _parts(self, owner: str) -> dict[str, Tensor]:
        names = (f"{owner}.{part}" for part in self._parts_of(self.packed[owner]))
        return {name.rpartition(".")[2]: self._finite(name) for name in names}

    def _packed(self, owner: str) -> Packed:
        raise NotImplementedError

    def _spec(self, owner: str, bits: int | float, n_in: int, groups: int, symmetric: bool) -> QuantSpec:
        """Raises NotReadHere for what we have no spec for."""
        if bits not in BITS or n_in % groups:
            raise NotReadHere(f"{owner} has {bits:g} bits and {groups} groups for {n_in} inputs")
        try:
            return QuantSpec(int(bits), -1 if groups == 1 else n_in // groups, symmetric)
        except ValueError as error:
            raise NotReadHere(f"{owner}: {error}") from None


class _CompressedTensors(_Export):
    MARK = "weight_packed"

    @functools.cached_property
    def widths(self) -> set[int]:
        found = set()
        for name, group in self.stored["config_groups"].items():
            weights = group.get("weights") or {}
            kind = group.get("format") or self.stored.get("format")
            if kind != compressed_tensors.FORMAT or weights.get("type") != "int":
                raise NotReadHere(f"{name} is stored as {kind}, type {weights.get('type')}")
            if group.get("input_activations") or group.get("output_activations"):
                raise NotReadHere(f"{name} quantizes activations")
            found.add(weights["num_bits"])
        if self.stored.get("kv_cache_scheme"):
            raise NotReadHere("it quantizes the cache of keys and values")
        return found

    def _packed(self, owner: str) -> Packed:
        if f"{owner}.weight_g_idx" in self.headers:
            raise NotReadHere(f"{owner} has its input channels in an order of its own (weight_g_idx)")
        n_out, n_in = self.load(f"{owner}.weight_shape").tolist()
        words, groups = self.headers[f"{owner}.weight_packed"].shape[1], self.headers[f"{owner}.weight_scale"].shape[1]
        bits = [width for width in self.widths if words_per_row(n_in, width) == words]
        symmetric = f"{owner}.weight_zero_point" not in self.headers
        return Packed((n_out, n_in), self._spec(owner, bits[0] if bits else 0, n_in, groups, symmetric), "", "weight_zero_point")

    def _parts_of(self, packed: Packed) -> tuple[str, ...]:
        zeros = () if packed.spec.symmetric else (packed.zeros,)
        return ("weight_packed", "weight_scale", "weight_shape", *zeros)

    def _quantized(self, owner: str, packed: Packed) -> QuantizedWeight:
        return compressed_tensors.unpack_weight(self._parts(owner), packed.spec)


class _Gptq(_Export):
    MARK = "qweight"

    def _packed(self, owner: str) -> Packed:
        form = self.stored.get("checkpoint_format") or gptq.V1
        if form not in (gptq.V1, gptq.V2):
            raise NotReadHere(f"its checkpoint_format is {form}")
        if f"{owner}.g_idx" not in self.headers:
            raise NotReadHere(f"{owner} has no g_idx")
        (n_in,) = self.headers[f"{owner}.g_idx"].shape
        rows, _ = self.headers[f"{owner}.qweight"].shape
        groups, n_out = self.headers[f"{owner}.scales"].shape
        spec = self._spec(owner, rows * 32 / n_in, n_in, groups, bool(self.stored.get("sym")))
        if not torch.equal(self.load(f"{owner}.g_idx").long(), torch.arange(n_in) // spec.group_width(n_in)):
            raise NotReadHere(f"{owner} has its input channels in an order of its own (g_idx, desc_act)")
        return Packed((n_out, n_in), spec, form, "qzeros")

    def _parts_of(self, packed: Packed) -> tuple[str, ...]:
        return ("qweight", packed.zeros, "scales", "g_idx")

    def _quantized(self, owner: str, packed: Packed) -> QuantizedWeight:
        try:
            weight = gptq.unpack_weight(self._parts(owner), packed.spec, packed.layout == gptq.V1)
        except ValueError as error:
            raise NotReadHere(f"{owner}: {error}") from None
        if packed.spec.symmetric and not bool((weight.zero_points == packed.spec.middle_code).all()):
            raise NotReadHere(f"{owner} is called symmetric, and its zero points are not in the middle")
        return weight


def _options(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "zero_point": not spec.symmetric}
