"""The compressed-tensors target: pack-quantized, which vLLM and llm-compressor use.

    weight_packed      int32 [out, ceil(in * bits / 32)], codes in order, low bits first
    weight_scale       [out, groups]
    weight_zero_point  int32 [ceil(out * bits / 32), groups], packed along dim 0; only where zero points are not all in the middle
    weight_shape       int64 [2]

The format speaks of signed integers and stores them with 2^(bits-1) added: the words hold our unsigned codes.
(compressed-tensors, compressors/pack_quantized)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.folder import MAX_SHARD_SIZE, Bar, items_with_bar, packed_tensors, write_folder
from awq_hf.exporters.modules import Modules, find_modules
from awq_hf.exporters.refusals import check_activations, check_linears, check_quantized
from awq_hf.kernels.layout import pack_in_order, unpack_in_order
from awq_hf.spec import QuantizedWeight, QuantSpec

NAME = "compressed-tensors"
FORMAT = "pack-quantized"


def export(checkpoint: Checkpoint, directory: Path, bar: Bar, max_shard_size: str | int = MAX_SHARD_SIZE) -> None:
    """Scales keep their dtype; loaders cast them to the model's. Raises ValueError for what the format cannot hold."""
    check_quantized(checkpoint, NAME)
    check_activations(checkpoint, NAME)
    modules = find_modules(checkpoint)
    check_linears(checkpoint, modules, NAME)
    specs = {owner: packed.spec for owner, packed in checkpoint.packed.items()}
    config = {"quantization_config": quantization_config(specs, modules)}
    write_folder(directory, checkpoint, packed_tensors(items_with_bar(checkpoint, NAME, bar), pack_weight), config, max_shard_size)


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    bits = weight.spec.bits
    tensors = {
        "weight_packed": pack_in_order(weight.q, bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.spec.symmetric:
        tensors["weight_zero_point"] = pack_in_order(weight.zero_points.T.contiguous(), bits).T.contiguous()
    return tensors


def unpack_weight(parts: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """parts: the tensors by the last part of their names. Inverse of `pack_weight`."""
    scales = parts["weight_scale"]
    n_out, n_in = parts["weight_shape"].tolist()
    if spec.symmetric:
        zero_points = torch.full(scales.shape, spec.middle_code, dtype=torch.uint8)
    else:
        zero_points = unpack_in_order(parts["weight_zero_point"].T.contiguous(), spec.bits, n_out).T.contiguous()
    return QuantizedWeight(unpack_in_order(parts["weight_packed"], spec.bits, n_in), scales, zero_points, spec)


def quantization_config(specs: dict[str, QuantSpec], modules: Modules) -> dict[str, Any]:
    """specs: of the quantized modules, by their names on disk. The commonest is that of all Linears, others name their modules."""
    groups = {}
    for number, (spec, _) in enumerate(Counter(specs.values()).most_common()):
        named = [name for owner, its in specs.items() if its == spec for name in modules.both_names(owner)]
        # vLLM's class for a head is not called Linear
        targets = named if number else ["Linear", *(name for name in named if name.endswith("lm_head"))]
        groups[f"group_{number}"] = {"targets": targets, "weights": _weights(spec), "format": FORMAT}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(modules),
    }


def _weights(spec: QuantSpec) -> dict[str, Any]:
    whole = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else spec.group_size,
        "dynamic": False,
    }


def ignored(modules: Modules) -> list[str]:
    """Full names, under both names that programs know: entries are matched exactly, or as regular expressions after "re:".

    Experts are one entry where none is quantized: a large model has tens of thousands of them.
    """
    names = modules.left_out()
    if not any(".experts." in owner for owner in modules.quantized) and any(".experts." in name for name in names):
        names = [name for name in names if not re.search(r"\.experts\.", name)] + [r"re:.*\.experts\..*"]
    return names
