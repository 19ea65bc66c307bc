"""What a run will do, decided before any work: which matrices are quantized, how, what stays in float and why."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from awq_hf import representable
from awq_hf.blocks import find_blocks, matrices_of
from awq_hf.kernels.layout import column_multiple
from awq_hf.matrices import is_matrix, shape_of
from awq_hf.recipe import Recipe
from awq_hf.spec import GROUP_SIZES, QuantSpec

OUTSIDE = "outside the decoder's blocks"
SKIPPED = "modules_to_not_convert"
SMALL = 0.01  # of a block's weights: what does not fit and is no more than this is not worth refusing the model for


@dataclass(frozen=True)
class Plan:
    """specs: what is quantized, by its full name, in the model's order. left_in_float: modules that hold matrices and stay, and why."""

    specs: dict[str, QuantSpec]
    left_in_float: dict[str, str]


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """All matrices of the decoder's blocks, less those the recipe skips and small ones that do not fit. No weight is read.

    Raises ValueError naming every larger one that cannot be stored, the sizes that would work, and how to leave it in float; and
    when nothing is left to quantize, or an override names nothing.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder; only models of one of them can be quantized")
    plan, misfits = sort_out(model, recipe)
    if not plan.specs:
        raise ValueError(_nothing_to_quantize(model, plan.left_in_float))
    if misfits:
        shapes = {name: shape_of(model.get_submodule(name)) for name in plan.specs}
        raise ValueError(_refusal(misfits, shapes, recipe.spec))
    _check_overrides(recipe, plan.specs.keys() | plan.left_in_float.keys())
    return plan


def sort_out(model: nn.Module, recipe: Recipe) -> tuple[Plan, dict[str, str]]:
    """The plan before it is judged, and those in it that cannot be stored -> why: `make_plan` refuses them."""
    prefix, blocks = find_blocks(model)
    specs: dict[str, QuantSpec] = {}
    left: dict[str, str] = {}
    misfits: dict[str, str] = {}
    for index, block in enumerate(blocks):
        inside = {f"{prefix}.{index}.{name}": shape_of(module) for name, module in matrices_of(block).items()}
        weights = sum(rows * columns for rows, columns in inside.values())
        for name, shape in inside.items():
            spec = recipe.spec_for(name)
            misfit = None if spec is None else _misfit(*shape, spec, recipe)
            if spec is None:
                left[name] = SKIPPED
            elif misfit and shape[0] * shape[1] <= SMALL * weights:
                left[name] = f"small, and {misfit}"
            elif misfit:
                misfits[name] = misfit
            if spec is not None and name not in left:
                specs[name] = spec
    left = {name: left.get(name, why) for name, why in _others(model, prefix, recipe) if name not in specs}
    return Plan(specs, left), misfits


def _others(model: nn.Module, prefix: str, recipe: Recipe) -> Iterable[tuple[str, str]]:
    """Every module that holds matrices, and why it stays in float if it does."""
    for name, module in model.named_modules():
        if recipe.spec_for(name) is None and is_matrix(module):
            yield name, SKIPPED
        elif isinstance(module, nn.Linear) and not name.startswith(f"{prefix}."):
            yield name, OUTSIDE
        elif name.startswith(f"{prefix}.") and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            yield name, f"{type(module).__name__} is not a plain Linear"


def _misfit(out_features: int, in_features: int, spec: QuantSpec, recipe: Recipe) -> str | None:
    if not spec.divides(in_features):
        return f"in_features {in_features} is not divisible by group_size {spec.group_size}"
    if out_features % (multiple := column_multiple(spec.bits)):
        return f"out_features {out_features} is not a multiple of {multiple}, which the 4-bit format needs"
    return None if recipe.scales_for is None else representable.misfit(spec, in_features, recipe.scales_for)


def _nothing_to_quantize(model: nn.Module, left: dict[str, str]) -> str:
    if SKIPPED in left.values():
        return f"no Linear of {type(model).__name__} is left to quantize; shorten modules_to_not_convert"
    reasons = sorted(set(left.values()) - {OUTSIDE}) or ["they hold no matrices"]
    return f"{type(model).__name__} has no Linear to quantize in its blocks: {', '.join(reasons)}"


def _refusal(misfits: dict[str, str], shapes: dict[str, tuple[int, int]], spec: QuantSpec) -> str:
    works = [g for g in GROUP_SIZES if all(QuantSpec(spec.bits, g).divides(columns) for _, columns in shapes.values())]
    leave = sorted({_shortest_pattern(name, shapes.keys() - misfits.keys()) for name in misfits})
    return (
        f"{len(misfits)} layers do not fit bits={spec.bits}, group_size={spec.group_size}:\n"
        + "\n".join(f"  {name}: {reason}" for name, reason in list(misfits.items())[:8])
        + (f"\n  and {len(misfits) - 8} more" if len(misfits) > 8 else "")
        + f"\nGroup sizes that divide every layer: {works}. Or leave these layers in float: modules_to_not_convert={leave}"
    )


def _shortest_pattern(name: str, others: Iterable[str]) -> str:
    """The shortest end of a dotted name that is in none of the other names."""
    parts = name.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(end in other for other in others)), name)


def _check_overrides(recipe: Recipe, names: Iterable[str]) -> None:
    for pattern, _ in recipe.overrides:
        if not any(pattern in name for name in names):
            raise ValueError(f"overrides: {pattern!r} is in no layer's name; names look like {next(iter(names))!r}")


def stored_bytes(model: nn.Module, plan: Plan) -> int:
    """Size of the quantized model's weights on disk. No weight is read; tied ones count once."""
    total = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in plan.specs:
            in_features = shape_of(model.get_submodule(module))[1]
            total += round(parameter.numel() * plan.specs[module].bits_per_weight(in_features) / 8)
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def check_room(directory: Path, needed: int) -> None:
    """Raise ValueError when the file system of `directory` has no room for `needed` bytes and a tenth more."""
    free = shutil.disk_usage(directory).free
    if free < 1.1 * needed:
        room = f"{free / 1e6:,.0f} MB free, and the result takes {needed / 1e6:,.0f} MB"
        raise ValueError(f"{directory} has {room}; make room or write elsewhere")


def check_calls(order: list[int], prefix: str, blocks: nn.ModuleList) -> None:
    """Raise ValueError when the model does not call its blocks one after the other, each once. order: as they were called."""
    for index in range(len(blocks)):
        if (times := order.count(index)) != 1:
            why = "it needs other inputs than text" if times == 0 else "a block whose weights are used several times cannot be quantized"
            raise ValueError(f"the model calls {prefix}.{index} {times} times for one text, and not once: {why}")
    if order != sorted(order):
        raise ValueError(f"the model calls its blocks {prefix} in the order {order}; only first to last can be quantized")


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError when weights were not loaded (disk offload leaves them on the meta device), or are not finite or all zero."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(
            f"{len(missing)} weights are not in memory (the first is {missing[0]}): disk offload cannot be quantized; "
            'load on one device, e.g. device_map="cpu" or device_map=0'
        )
    for name in plan.specs:
        weight = model.get_submodule(name).get_parameter("weight")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight holds NaN or infinity: the checkpoint is damaged, or does not fit its dtype")
        if not bool(weight.any()):
            raise ValueError(
                f"{name}.weight is zero throughout: the checkpoint is damaged, or if this is meant, modules_to_not_convert=[{name!r}]"
            )
