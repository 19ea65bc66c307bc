"""Checks that need no weights: they run before any work, so that nothing fails after hours."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from awq_hf.blocks import find_blocks, linears_of
from awq_hf.kernels.layout import column_multiple
from awq_hf.recipe import Recipe
from awq_hf.spec import GROUP_SIZES, QuantSpec

OUTSIDE = "outside the decoder's blocks"


def targets(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """The Linears to quantize, by their full name: all of the decoder's blocks, less those the recipe skips."""
    prefix, blocks = find_blocks(model)
    named = {f"{prefix}.{i}.{name}": linear for i, block in enumerate(blocks) for name, linear in linears_of(block).items()}
    return {name: linear for name, linear in named.items() if not recipe.skips(name)}


def left_in_float(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Modules that hold matrices and will not be quantized, and why: other Linears, and what is no Linear inside the blocks."""
    taken, (prefix, _) = targets(model, recipe), find_blocks(model)
    left = {}
    for name, module in model.named_modules():
        if name in taken:
            continue
        if recipe.skips(name) and isinstance(module, nn.Linear):
            left[name] = "modules_to_not_convert"
        elif isinstance(module, nn.Linear) and not name.startswith(f"{prefix}."):
            left[name] = OUTSIDE
        elif name.startswith(f"{prefix}.") and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            left[name] = f"{type(module).__name__} is not a plain Linear"
    return left


def check_shapes(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError naming every Linear that cannot be stored, the sizes that would work, and how to leave it in float."""
    found = targets(model, recipe)
    if not found:
        left = left_in_float(model, recipe)
        if "modules_to_not_convert" in left.values():
            raise ValueError(f"no Linear of {type(model).__name__} is left to quantize; shorten modules_to_not_convert")
        reasons = sorted(set(left.values()) - {OUTSIDE}) or ["they hold no matrices"]
        raise ValueError(f"{type(model).__name__} has no Linear to quantize in its blocks: {', '.join(reasons)}")
    bad = {name: reason for name, linear in found.items() if (reason := _misfit(linear, recipe.spec))}
    if bad:
        works = [g for g in GROUP_SIZES if all(QuantSpec(recipe.spec.bits, g).divides(lin.in_features) for lin in found.values())]
        leave = sorted({_shortest_pattern(name, found.keys() - bad.keys()) for name in bad})
        raise ValueError(
            f"{len(bad)} layers do not fit bits={recipe.spec.bits}, group_size={recipe.spec.group_size}:\n"
            + "\n".join(f"  {name}: {reason}" for name, reason in list(bad.items())[:8])
            + (f"\n  and {len(bad) - 8} more" if len(bad) > 8 else "")
            + f"\nGroup sizes that divide every layer: {works}. Or leave these layers in float: modules_to_not_convert={leave}"
        )


def _shortest_pattern(name: str, others: Iterable[str]) -> str:
    """The shortest end of a dotted name that is in none of the other names."""
    parts = name.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(end in other for other in others)), name)


def _misfit(linear: nn.Linear, spec: QuantSpec) -> str | None:
    if not spec.divides(linear.in_features):
        return f"in_features {linear.in_features} is not divisible by group_size {spec.group_size}"
    if linear.out_features % (multiple := column_multiple(spec.bits)):
        return f"out_features {linear.out_features} is not a multiple of {multiple}, which the 4-bit format needs"
    return None


def check_weights(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError when weights were not loaded (disk offload leaves them on the meta device) or are not finite."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(
            f"{len(missing)} weights are not in memory (the first is {missing[0]}): disk offload cannot be quantized; "
            'load on one device, e.g. device_map="cpu" or device_map=0'
        )
    for name, linear in targets(model, recipe).items():
        if not bool(torch.isfinite(linear.weight).all()):
            raise ValueError(f"{name}.weight holds NaN or infinity: the checkpoint is damaged, or does not fit its dtype")
