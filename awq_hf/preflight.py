"""What a run will do, decided before any work: which matrices are quantized, how, what stays in float and why."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from awq_hf import compat, renaming, representable
from awq_hf.blocks import experts_of, find_blocks, linear_routers, matrices_of
from awq_hf.experts import FUSED, holds_experts, joins_words, reason_against
from awq_hf.kernels.layout import column_multiple
from awq_hf.matrices import is_matrix, shape_of
from awq_hf.recipe import Recipe
from awq_hf.report import overflow
from awq_hf.spec import GROUP_SIZES, QuantSpec
from awq_hf.wording import option

OUTSIDE = "outside the decoder's blocks"
SKIPPED = "modules_to_not_convert"
ROUTER = "it chooses experts"
REUSED = "a block whose weights are used several times cannot be quantized"
SMALL = 0.01  # of a block's weights: what does not fit and is no more than this is not worth refusing the model for


@dataclass(frozen=True)
class Plan:
    """specs: what is quantized, by its full name, in the model's order. left_in_float: modules that hold matrices and stay, and why.

    experts: modules that hold the matrices of a layer's experts -> (of gate_up_proj, of down_proj).
    """

    specs: dict[str, QuantSpec]
    left_in_float: dict[str, str]
    experts: dict[str, tuple[QuantSpec, QuantSpec]] = field(default_factory=dict)


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """All matrices of the decoder's blocks, less those the recipe skips and small ones that do not fit. No weight is read.

    Raises ValueError naming every larger one that cannot be stored, the sizes that would work, and how to leave it in float; and
    when nothing is left to quantize, blocks share weights, or an override or an entry of the skip list names nothing.
    """
    decodes = any(name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules())  # UMT5's encoder alone has the config of both
    if decodes and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder; only models of one of them can be quantized")
    _check_shared(model)
    plan, misfits = sort_out(model, recipe)
    _check_parts(model, recipe, plan)
    if not plan.specs and not plan.experts:
        raise ValueError(_nothing_to_quantize(model, plan.left_in_float))
    if misfits:
        shapes = {name: shape_of(model.get_submodule(name)) for name in plan.specs}
        shapes |= {f"{name}.{part}": shape for name in plan.experts for part, shape in expert_shapes(model.get_submodule(name)).items()}
        raise ValueError(_refusal(misfits, shapes, recipe.spec, plan.experts))
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
        routers = {f"{prefix}.{index}.{name}" for name in linear_routers(block)}
        for name, shape in inside.items():
            spec = recipe.spec_for(name)
            misfit = None if spec is None else _misfit(*shape, spec, recipe)
            if spec is None:
                left[name] = SKIPPED
            elif name in routers:
                left[name] = ROUTER
            elif misfit and shape[0] * shape[1] <= SMALL * weights:
                left[name] = f"small, and {misfit}"
            elif misfit:
                misfits[name] = misfit
            if spec is not None and name not in left:
                specs[name] = spec
    experts, unfit = _sort_out_experts(model, prefix, blocks, recipe)
    left |= {name: why for name, why in experts.items() if isinstance(why, str)}
    taken = {name: why for name, why in experts.items() if not isinstance(why, str)}
    left = {name: left.get(name, why) for name, why in _others(model, prefix, recipe) if name not in specs and name not in taken}
    return Plan(specs, left, taken), misfits | unfit


Fate = tuple[QuantSpec, QuantSpec] | str  # what becomes of a layer's experts, or why they stay in float


def _sort_out_experts(model: nn.Module, prefix: str, blocks: nn.ModuleList, recipe: Recipe) -> tuple[dict[str, Fate], dict[str, str]]:
    """For every module that holds experts what becomes of them; and which cannot be stored -> why."""
    fates: dict[str, Fate] = {}
    misfits: dict[str, str] = {}
    modules = {f"{prefix}.{i}.{name}": module for i, block in enumerate(blocks) for name, module in experts_of(block).items()}
    parts = renaming.expert_parts(model, list(modules)) if modules else {}
    for name, module in modules.items():
        fate = fates[name] = _fate_of({name, renaming.name_on_disk(model, name)}, module, parts[name], recipe)
        if not isinstance(fate, str):
            for (part, (rows, columns)), spec, count in zip(expert_shapes(module).items(), fate, (2, 1), strict=True):
                misfit = _misfit(rows // count, columns, spec, recipe)
                if misfit is None and count > 1 and not joins_words(rows // count, spec.bits):
                    misfit = f"{rows // count} output channels of {spec.bits} bits fill no whole words"
                if misfit:
                    misfits[f"{name}.{part}"] = misfit
    return fates, misfits


def _fate_of(names: set[str], module: nn.Module, parts: dict[str, tuple[str, ...]], recipe: Recipe) -> Fate:
    """names: in the model and in its files. parts: parameter of the module -> what its matrices are called in a checkpoint."""
    if why := reason_against(module):
        return why
    if [len(parts.get(parameter, ())) for parameter in FUSED] != [2, 1]:
        return "checkpoints of this architecture hold experts in one tensor, and AWQ's format one by one"
    count = len(module.get_parameter(FUSED[1]))
    matrices = [[f"{e}.{leaf}" for leaf in parts[parameter] for e in range(count)] for parameter in FUSED]
    specs = [{recipe.spec_for(*(f"{name}.{matrix}" for name in names)) for matrix in some} for some in matrices]
    if specs == [{None}, {None}]:
        return SKIPPED
    if any(len(each) > 1 or None in each for each in specs):
        return f"{SKIPPED} or overrides name some of their matrices, and those of a layer are stored alike"
    (gate_up,), (down,) = specs
    assert gate_up is not None and down is not None
    return gate_up, down


def _expert_names(model: nn.Module) -> list[str]:
    """The matrices of experts that transformers fuses, by all names that the recipe may call them."""
    modules = {name: module for name, module in model.named_modules() if holds_experts(module)}
    found = []
    for name, parts in (renaming.expert_parts(model, list(modules)) if modules else {}).items():
        leaves, count = [leaf for each in parts.values() for leaf in each], len(modules[name].get_parameter(FUSED[1]))
        found += [f"{called}.{e}.{leaf}" for called in (name, renaming.name_on_disk(model, name)) for leaf in leaves for e in range(count)]
    return found


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter of a module of experts -> (out, in) of one expert's."""
    shapes = {parameter: module.get_parameter(parameter).shape for parameter in FUSED}
    return {parameter: (shape[1], shape[2]) for parameter, shape in shapes.items()}


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
        return f"no Linear of {type(model).__name__} is left to quantize; shorten {option(SKIPPED)}"
    reasons = sorted(set(left.values()) - {OUTSIDE}) or ["they hold no matrices"]
    return f"{type(model).__name__} has no Linear to quantize in its blocks: {', '.join(reasons)}"


def _refusal(misfits: dict[str, str], shapes: dict[str, tuple[int, int]], spec: QuantSpec, experts: Collection[str]) -> str:
    works = [g for g in GROUP_SIZES if all(QuantSpec(spec.bits, g).divides(columns) for _, columns in shapes.values())]
    whole = lambda name: module if (module := name.rpartition(".")[0]) in experts else name  # noqa: E731  (experts stay float together)
    leaving = {*map(whole, misfits)}
    leave = sorted({_shortest_pattern(name, [other for other in shapes if whole(other) not in leaving]) for name in leaving})
    return (
        f"{len(misfits)} layers do not fit {option('bits', spec.bits)}, {option('group_size', spec.group_size)}:\n"
        + "\n".join(f"  {name}: {reason}" for name, reason in list(misfits.items())[:8])
        + (f"\n  and {len(misfits) - 8} more" if len(misfits) > 8 else "")
        + f"\nGroup sizes that divide every layer: {works}. Or leave these layers in float: {option(SKIPPED, leave)}"
    )


def _shortest_pattern(name: str, others: Iterable[str]) -> str:
    """The shortest end of a dotted name that is in none of the other names."""
    parts = name.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(end in other for other in others)), name)


def _check_parts(model: nn.Module, recipe: Recipe, plan: Plan) -> None:
    """Raise ValueError for an override that is in no layer's name, or an entry of the skip list that is in no module's.

    What stays in float may be called as in the files: the skip list that a quantized model is saved with names it so as well.
    """
    experts = _expert_names(model)
    layers = [*plan.specs, *plan.left_in_float, *experts]
    modules = [*(name for name, _ in model.named_modules() if name), *experts]
    modules += [renaming.name_on_disk(model, name) for name in plan.left_in_float] if recipe.skip else []
    for name, parts, names, kind in (
        ("overrides", [part for part, _ in recipe.overrides], layers, "layer"),
        (SKIPPED, recipe.skip, modules, "module"),
    ):
        for part in parts:
            if not any(part in known for known in names):
                near = _near(part, names)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"names look like {layers[0]!r}"
                raise ValueError(f"{option(name)}: {part!r} is in no {kind}'s name, and has to be a part of one; {hint}")


def _near(part: str, names: Iterable[str]) -> list[str]:
    """Parts of the names, of as many words, that resemble one that is in none."""
    words = part.count(".") + 1
    split = [name.split(".") for name in names]
    runs = {".".join(each[i : i + words]): None for each in split for i in range(len(each) - words + 1)}
    return difflib.get_close_matches(part, runs, 3)


def stored_bytes(model: nn.Module, plan: Plan) -> int:
    """Size of the quantized model's weights on disk. No weight is read; tied ones count once."""
    total = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module in plan.experts and kind in FUSED:
            bits = plan.experts[module][FUSED.index(kind)].bits_per_weight(parameter.shape[2])
            total += round(parameter.numel() * bits / 8)
        elif kind == "weight" and module in plan.specs:
            in_features = shape_of(model.get_submodule(module))[1]
            total += round(parameter.numel() * plan.specs[module].bits_per_weight(in_features) / 8)
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def check_room(directory: Path, needed: int) -> None:
    """Raise ValueError when the file system of `directory` has no room for `needed` bytes and a tenth more."""
    free = shutil.disk_usage(directory).free
    if free < 1.1 * needed:
        room = f"{free / 1e6:,.1f} MB free, and the result takes {needed / 1e6:,.1f} MB"
        raise ValueError(f"{directory} has {room}; make room or write elsewhere")


def check_calls(order: list[int], prefix: str, blocks: nn.ModuleList) -> None:
    """Raise ValueError when the model does not call its blocks one after the other, each once. order: as they were called."""
    for index in range(len(blocks)):
        if (times := order.count(index)) != 1:
            why = "it needs other inputs than text" if times == 0 else REUSED
            raise ValueError(f"the model calls {prefix}.{index} {times} times for one text, and not once: {why}")
    if order != sorted(order):
        raise ValueError(f"the model calls its blocks {prefix} in the order {order}; only first to last can be quantized")


def _check_shared(model: nn.Module) -> None:
    """Raise ValueError where a weight is in several blocks: what is made of it in one would change the others."""
    (prefix, blocks), tied = find_blocks(model), compat.tied_weights(model)
    first: dict[int, str] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            full = f"{prefix}.{index}.{name}"
            other = tied.get(full) or first.setdefault(id(parameter), full)
            if other.startswith(f"{prefix}.") and not other.startswith(f"{prefix}.{index}."):
                raise ValueError(f"{full} is {other} as well: {REUSED}")


def check_in_memory(model: nn.Module, later: str | None) -> None:
    """Raise ValueError when weights were not loaded (disk offload leaves them on the meta device). later: the module whose are loaded in
    their turn."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta and not name.startswith(f"{later}.")]
    if missing:
        raise ValueError(
            f"{len(missing)} weights are not in memory (the first is {missing[0]}): disk offload cannot be quantized; "
            f"load on one device: {option('device_map', 'cpu')} or {option('device_map', 'cuda:0')}"
        )


def check_hidden_states(output: Any, block: str) -> None:
    """Raise ValueError where hidden states that a block puts out are not finite."""
    hidden = next((value for value in tree_flatten(output)[0] if isinstance(value, Tensor) and value.is_floating_point()), None)
    if hidden is not None and not bool(torch.isfinite(hidden).all()):
        raise ValueError(overflow(block))


def check_weights(model: nn.Module, plan: Plan, inside: str) -> None:
    """Raise ValueError when weights of the module `inside` that are to be quantized are not finite or all zero."""
    names = [f"{name}.weight" for name in plan.specs] + [f"{name}.{parameter}" for name in plan.experts for parameter in FUSED]
    for name in names:
        if not name.startswith(f"{inside}."):
            continue
        weight = model.get_parameter(name)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} holds NaN or infinity: the checkpoint is damaged, or does not fit its dtype")
        if not bool(weight.any()):
            raise ValueError(
                f"{name} is zero throughout: the checkpoint is damaged, or if this is meant, {option(SKIPPED, [name.rpartition('.')[0]])}"
            )
