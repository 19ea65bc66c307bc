"""What servers make of quantized weights: how fast their kernels are, and over how many GPUs a model can be split.

The rules are those of vLLM 0.32 and SGLang 0.5.23 (quantization/utils/marlin_utils.py and marlin_utils.py, auto_awq.py, awq.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from awq_hf.linear import PackedModule
from awq_hf.skip_list import FUSED
from awq_hf.spec import QuantSpec, group_sizes_for

FAST_GROUP_SIZES = (32, 64, 128, -1)  # of the Marlin kernels
GPUS = (2, 4, 8)


def serving(model: Any, packed: Mapping[str, PackedModule]) -> list[str]:
    """Sentences on serving `model` when `packed`, by name, is quantized."""
    widths = {module.spec.bits for module in packed.values()}
    if unknown := sorted(widths - {4, 8}):
        return [f"vLLM has no kernels for {_either(unknown)} bits, only for 4 and 8"]
    text = model.config.get_text_config()
    heads = (getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None))
    split = tensor_parallel(packed, getattr(model, "tp_plan", None) or {}, *(each if isinstance(each, int) else None for each in heads))
    ours = 8 in widths or len({module.spec for module in packed.values()}) > 1
    export = ["AWQ's format is 4 bits and one group size; vLLM and SGLang read this as compressed-tensors"] if ours else []
    return export + ([split] if split else []) + serving_notes(packed)


def slow_as_awq(spec: QuantSpec) -> bool:
    """Whether servers have no fast kernel for this as AWQ, but have one for the same weights in another format."""
    return spec.bits == 4 and spec.symmetric and spec.group_size in FAST_GROUP_SIZES


def serving_notes(packed: Mapping[str, PackedModule]) -> list[str]:
    """What is refused or slow there, a sentence each. Widths that they have no kernels for are not spoken of."""
    specs = {module.spec for module in packed.values()}
    four = [spec for spec in specs if spec.bits == 4]
    slow = sorted({spec.group_size for spec in four} - {*FAST_GROUP_SIZES})
    notes = [f"groups of {size}: vLLM and SGLang have fast kernels for groups of 32, 64 and 128 and for whole rows" for size in slow]
    if any(map(slow_as_awq, specs)):
        notes.append("symmetric: vLLM and SGLang run it with slow kernels as AWQ, with their fast ones as compressed-tensors or gptq")
    if any(spec.bits == 8 and not spec.symmetric for spec in specs):
        notes.append("8 bits with zero points: vLLM has a kernel for Hopper GPUs only (as compressed-tensors), for symmetric ones on all")
    return notes + _torn_apart(packed)


def _torn_apart(packed: Mapping[str, PackedModule]) -> list[str]:
    for group in FUSED:
        for name, module in packed.items():
            parent, _, last = name.rpartition(".")
            if last in group:
                for other in group:
                    theirs = packed.get(f"{parent}.{other}", module)
                    if theirs.spec != module.spec:
                        return [
                            f"vLLM loads {', '.join(group)} as one matrix and refuses {parent}: "
                            f"{last} has {_text(module.spec)}, {other} {_text(theirs.spec)}"
                        ]
    return []


def _text(spec: QuantSpec) -> str:
    return f"{spec.bits} {'symmetric ' * spec.symmetric}bits in {'whole rows' if spec.group_size == -1 else f'groups of {spec.group_size}'}"


def tensor_parallel(
    packed: Mapping[str, PackedModule], tp_plan: Mapping[str, str], heads: int | None, kv_heads: int | None = None
) -> str | None:
    """Over how many GPUs the model can be split, and what is in the way; None where transformers does not know how to split it.

    tp_plan: that of the model, names with * for numbers -> how they are split. The inputs of what is split by rows, "rowwise", have to
    fall apart into whole groups; heads of keys and values are dealt out, or each is held by as many GPUs as any other.
    """
    rowwise = [re.compile(re.escape(name).replace(r"\*", r"\d+")) for name, how in tp_plan.items() if how.startswith("rowwise")]
    split = {name: module for name, module in packed.items() if any(pattern.fullmatch(name) for pattern in rowwise)}
    if not split:
        return None
    obstacles = {gpus: found for gpus in GPUS if (found := _obstacle(gpus, split, heads, kv_heads))}
    possible = [gpus for gpus in GPUS if gpus not in obstacles]
    over = f"tensor parallelism over {_either(possible)} GPUs" if possible else "no tensor parallelism"
    return over if not obstacles else f"{over}; not {_either(obstacles)}: {next(iter(obstacles.values()))}"


def _obstacle(gpus: int, split: Mapping[str, PackedModule], heads: int | None, kv_heads: int | None) -> str | None:
    if heads and heads % gpus:
        return f"{heads} attention heads"
    if kv_heads and max(kv_heads, gpus) % min(kv_heads, gpus):
        return f"{kv_heads} heads of keys and values"
    for name, module in split.items():
        width, spec = module.in_features, module.spec
        if width % (gpus * max(spec.group_size, 1)):
            whole = [size for size in group_sizes_for(width // gpus) if size in FAST_GROUP_SIZES and size > 0 and width % gpus == 0]
            remedy = f"; groups of {' or '.join(map(str, whole))} would" if whole else ""
            grain = f"groups of {spec.group_size}" if spec.group_size > 0 else "channels"
            return f"the {width} inputs of {name} do not fall into {gpus} parts of whole {grain}{remedy}"
    return None


def _either(numbers: Collection[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
