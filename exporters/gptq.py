"""The gptq target: GPTQ's layout, which vLLM (symmetric weights), SGLang, GPTQModel and transformers (with it) read.

    qweight  int32 [in * bits / 32, out], codes of a column in order, low bits first
    qzeros   int32 [groups, out * bits / 32], in order along out
    scales   [groups, out]
    g_idx    int32 [in], the group of an input channel

Symmetric weights are written as checkpoint_format "gptq", whose qzeros hold z - 1: every reader has it. It has no z = 0: readers that
add 1 to whole words carry from one zero point into the next, others come to 2^bits. Asymmetric weights are therefore written as
"gptq_v2", whose qzeros hold z; GPTQModel and SGLang read it, vLLM 0.32 does not. (GPTQModel, gptqmodel/utils/model.py and
nn_modules/qlinear)
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.folder import MAX_SHARD_SIZE, Bar, items_with_bar, packed_tensors, write_folder, write_json
from awq_hf.exporters.modules import Modules, find_modules
from awq_hf.exporters.refusals import check_activations, check_linears, check_quantized
from awq_hf.kernels.layout import pack_in_order, unpack_in_order
from awq_hf.skip_list import FUSED
from awq_hf.spec import QuantizedWeight, QuantSpec

NAME = "gptq"
V1, V2 = "gptq", "gptq_v2"
_FUSED_NAMES = dict(zip((group[0] for group in FUSED), ("qkv_proj", "gate_up_proj"), strict=True))  # vLLM's, by the first of each


def export(checkpoint: Checkpoint, directory: Path, bar: Bar, max_shard_size: str | int = MAX_SHARD_SIZE) -> None:
    """Scales keep their dtype. Raises ValueError for shapes that do not fill whole words."""
    check_quantized(checkpoint, NAME)
    check_activations(checkpoint, NAME)
    modules = find_modules(checkpoint)
    check_linears(checkpoint, modules, NAME)
    for owner, packed in checkpoint.packed.items():
        check_shape(owner, packed.shape, packed.spec.bits)
    config = quantization_config({owner: packed.spec for owner, packed in checkpoint.packed.items()}, modules)
    v1 = config["checkpoint_format"] == V1
    tensors = packed_tensors(items_with_bar(checkpoint, NAME, bar), functools.partial(pack_weight, v1=v1))
    write_folder(directory, checkpoint, tensors, {"quantization_config": config}, max_shard_size)
    write_json(directory / "quantize_config.json", config)


def check_shape(owner: str, shape: tuple[int, int], bits: int) -> None:
    for what, size in zip(("out_features", "in_features"), shape, strict=True):
        if size * bits % 32:
            raise ValueError(
                f"{owner}: {what} {size} of {bits} bits does not fill whole 32-bit words, as the target {NAME} needs; "
                "the target compressed-tensors takes it"
            )


def pack_weight(weight: QuantizedWeight, v1: bool) -> dict[str, Tensor]:
    """v1: zero points are stored less 1, and none may be 0."""
    bits, in_features = weight.spec.bits, weight.shape[1]
    zero_points = weight.zero_points - 1 if v1 else weight.zero_points
    return {
        "qweight": pack_in_order(weight.q, bits).T.contiguous(),
        "qzeros": pack_in_order(zero_points.T.contiguous(), bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // weight.spec.group_width(in_features),
    }


def unpack_weight(parts: Mapping[str, Tensor], spec: QuantSpec, v1: bool) -> QuantizedWeight:
    """parts: the tensors by the last part of their names, of which g_idx is in order. Inverse of `pack_weight`.

    Raises ValueError for a zero point of 2^bits, which v1 can mean.
    """
    scales = parts["scales"].T.contiguous()
    zero_points = unpack_in_order(parts["qzeros"], spec.bits, len(scales)).T.contiguous()
    if v1 and bool((zero_points == spec.max_code).any()):
        raise ValueError(f"a zero point is {spec.max_code + 1} or 0, which readers of GPTQ's first format do not agree on")
    q = unpack_in_order(parts["qweight"].T.contiguous(), spec.bits, len(parts["g_idx"]))
    return QuantizedWeight(q, scales, zero_points + 1 if v1 else zero_points, spec)


def quantization_config(specs: dict[str, QuantSpec], modules: Modules) -> dict[str, Any]:
    """specs: of the quantized modules, by their names on disk. Modules that are not as the commonest have rules of their own."""
    common = Counter(specs.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    for owner, spec in specs.items():
        if spec != common:
            rule = {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}
            dynamic |= {f"+:{pattern}": rule for name in modules.both_names(owner) for pattern in _patterns(name)}
    for name in modules.left_out():
        if not name.endswith("lm_head"):  # has a key of its own
            dynamic |= {f"-:{pattern}": {} for pattern in _patterns(name)}
    if not any(".experts." in owner for owner in specs) and any(r"\.experts\." in pattern for pattern in dynamic):
        dynamic = {pattern: rule for pattern, rule in dynamic.items() if r"\.experts\." not in pattern} | {r"-:.*\.experts\..*": {}}
    config = {
        "quant_method": "gptq",
        "bits": common.bits,
        "group_size": common.group_size,
        "sym": common.symmetric,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": any(owner.endswith("lm_head") for owner in specs),
        "checkpoint_format": V1 if all(spec.symmetric for spec in specs.values()) else V2,
        "pack_dtype": "int32",
    }
    return {**config, "dynamic": dynamic} if dynamic else config


def _patterns(name: str) -> list[str]:
    """Regular expressions for a module, and for the matrix that vLLM makes of it and others."""
    parent, _, last = name.rpartition(".")
    names = [name, *([f"{parent}.{_FUSED_NAMES[last]}"] if last in _FUSED_NAMES else [])]
    return [f"^{re.escape(name)}$" for name in names]
