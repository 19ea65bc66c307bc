"""What quantizing a float checkpoint will do: which matrices, folded where, how small, with how much memory and time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from awq_hf.blocks import block_signature, experts_of, find_blocks, matrices_of, routers_of
from awq_hf.classes import positions_of
from awq_hf.config import AwqConfig
from awq_hf.experts import FUSED, ExpertWeights, gate_is_linear_in_up
from awq_hf.inspection import costs
from awq_hf.inspection.folds import BlockFolds, find_folds
from awq_hf.inspection.source import Source, stored_bytes
from awq_hf.linear import AwqLinear, PackedModule
from awq_hf.matrices import shape_of
from awq_hf.pipeline import Progress
from awq_hf.preflight import Plan, expert_shapes, make_plan, sort_out
from awq_hf.recipe import Recipe
from awq_hf.serving import serving
from awq_hf.spec import group_sizes_for
from awq_hf.wording import starred


@dataclass(frozen=True)
class Kind:
    """Matrices of the blocks that have one name (numbers in it are replaced by *), one shape [out, in] and one fate.

    experts: how many of them each module holds. fold: what their input's smoothing scales are folded into, None where there is no place,
    or their block was not probed.
    bits_per_weight: as stored, None for those that stay float for `reason`; refused: with this among the rest, nothing is quantized.
    group_size: that was asked for, None where float was; group_sizes: that divide the rows.
    """

    name: str
    shape: tuple[int, int]
    count: int
    fold: str | None
    probed: bool
    bits_per_weight: float | None
    reason: str | None
    refused: bool
    group_size: int | None
    group_sizes: tuple[int, ...]
    experts: int = 1


@dataclass(frozen=True)
class Forecast:
    """model: as it was named; sizes and memory in bytes, by kind; memory_free: on the device, but for this program.

    left_in_float: modules that hold matrices and are not among the kinds -> (how many, why). refusal: why quantizing would end before
    any work, or None: then `kinds` says what fits, and the rest counts as left in float.
    probed: the blocks whose weights folds were looked for with, none of a model that is on the Hub only; not_probed: blocks where that
    failed -> why. seconds: (least, most) of the run without loading and saving. serving: see awq_hf.serving.
    """

    model: str
    class_name: str
    dtype: str
    parameters: int
    bytes_on_disk: int
    blocks: str
    block_count: int
    spec: dict[str, Any]
    calibration: dict[str, int]
    kinds: list[Kind]
    left_in_float: dict[str, tuple[int, str]]
    refusal: str | None
    probed: list[int]
    not_probed: dict[int, str]
    result_bytes: dict[str, int]
    result_bits_per_weight: float | None
    device: str
    memory: dict[str, int]
    memory_free: int | None
    seconds: tuple[float, float] | None
    serving: list[str]

    @property
    def fits(self) -> bool | None:
        """Whether the memory that is free is enough; None when it is not known, or nothing would be done."""
        return None if self.memory_free is None or not self.memory else sum(self.memory.values()) <= self.memory_free

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "float", **asdict(self), "fits": self.fits}


@dataclass(frozen=True)
class _Model:
    """The empty model, what is to be done with it, and what probing its blocks has shown.

    packed: what will be quantized; staying: other modules that hold matrices -> why; refused: those for which nothing is quantized.
    """

    empty: Any
    prefix: str
    blocks: nn.ModuleList
    recipe: Recipe
    packed: dict[str, PackedModule]
    staying: dict[str, str]
    refused: Collection[str]
    found: Mapping[Any, BlockFolds]


def forecast(source: Source, config: AwqConfig, dtype: str, device: str, progress: Progress | None) -> Forecast:
    """dtype: "auto" or a name of torch's."""
    program, free = costs.this_program(device), costs.free_memory(device)
    chosen = source.dtype() if dtype == "auto" else getattr(torch, dtype)
    text = source.config.get_text_config()
    recipe = config.recipe(positions_of(source.config))
    empty = source.empty_model(chosen)
    plan, misfits = sort_out(empty, recipe)
    found, failed = ({}, {}) if source.directory is None else find_folds(source.directory, empty, plan, chosen, device, progress)
    model = _sorted_out(empty, recipe, plan, misfits, found)
    memory, seconds = {}, None
    if model.packed:
        work = _block_costs(model, getattr(text, "num_experts_per_tok", None) or math.inf)
        result = sum(_result_bytes(model).values())
        memory = program | costs.peak_memory(work, recipe, device, result, text.hidden_size, chosen.itemsize)
        seconds = costs.estimated_seconds(work, recipe, device, chosen)
    return Forecast(
        model=source.name,
        class_name=type(empty).__name__,
        dtype=str(chosen).removeprefix("torch."),
        parameters=sum(p.numel() for p in empty.parameters()),
        bytes_on_disk=sum(map(stored_bytes, source.headers.values())),
        blocks=model.prefix,
        block_count=len(model.blocks),
        spec=asdict(recipe.spec),
        calibration={"samples": recipe.samples, "seq_len": recipe.seq_len},
        kinds=_kinds(model),
        left_in_float=_others(model),
        refusal=_refusal(empty, recipe),
        probed=sorted(block.index for block in found.values()),
        not_probed=failed,
        result_bytes=_result_bytes(model),
        result_bits_per_weight=_bits_per_weight(model.packed.values()) if model.packed else None,
        device=device,
        memory=memory,
        memory_free=None if free is None else free + sum(program.values()),
        seconds=seconds,
        serving=serving(empty, model.packed),
    )


def _sorted_out(empty: Any, recipe: Recipe, plan: Plan, misfits: dict[str, str], found: Mapping[Any, BlockFolds]) -> _Model:
    prefix, blocks = find_blocks(empty)
    staying = plan.left_in_float | misfits
    for i, block in enumerate(blocks):
        probed = found.get(block_signature(block))
        for name, why in (probed.not_run_once if probed else {}).items():
            staying.setdefault(f"{prefix}.{i}.{name}", why)
    packed: dict[str, PackedModule] = {}
    for module, specs in plan.experts.items():
        experts = empty.get_submodule(module)
        for (part, shape), spec in zip(expert_shapes(experts).items(), specs, strict=True):
            if not {module, f"{module}.{part}"} & staying.keys():
                packed[f"{module}.{part}"] = ExpertWeights(len(experts.down_proj), shape[1], shape[0], spec, device="meta")
    for name, spec in plan.specs.items():
        if name not in staying:
            out_features, in_features = shape_of(empty.get_submodule(name))
            packed[name] = AwqLinear(in_features, out_features, spec, device="meta")
    return _Model(empty, prefix, blocks, recipe, packed, staying, misfits.keys(), found)


def _refusal(empty: nn.Module, recipe: Recipe) -> str | None:
    try:
        make_plan(empty, recipe)
    except ValueError as error:
        return str(error)
    return None


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _bits_per_weight(linears: Collection[PackedModule]) -> float:
    return 8 * sum(map(_bytes, linears)) / sum(linear.matrices * linear.in_features * linear.out_features for linear in linears)


def _kinds(model: _Model) -> list[Kind]:
    found: Counter[Kind] = Counter()
    for i, block in enumerate(model.blocks):
        probed = model.found.get(block_signature(block))
        for name, module in matrices_of(block).items():
            full, shape = f"{model.prefix}.{i}.{name}", shape_of(module)
            spec, producer = model.recipe.spec_for(full), probed.producer_of(name) if probed else None
            kind = Kind(
                name=starred(name),
                shape=shape,
                count=0,
                fold=starred(producer) if producer else None,
                probed=probed is not None,
                bits_per_weight=_bits_per_weight([model.packed[full]]) if full in model.packed else None,
                reason=model.staying.get(full),
                refused=full in model.refused,
                group_size=None if spec is None else spec.group_size,
                group_sizes=tuple(group_sizes_for(shape[1])),
            )
            found[kind] += 1
        for name, part, full in _expert_parts(model, i):
            experts = block.get_submodule(name)
            into_up = f"{name}.{FUSED[0]}" if gate_is_linear_in_up(experts) else None
            producer = (probed.producer_of(name) if part == FUSED[0] else into_up) if probed else None
            shape, packed = expert_shapes(experts)[part], model.packed.get(full)
            kind = Kind(
                name=starred(f"{name}.{part}"),
                shape=shape,
                count=0,
                fold=starred(producer) if producer else None,
                probed=probed is not None,
                bits_per_weight=_bits_per_weight([packed]) if packed else None,
                reason=model.staying.get(full),
                refused=full in model.refused,
                group_size=model.recipe.spec.group_size,
                group_sizes=tuple(group_sizes_for(shape[1])),
                experts=len(experts.get_parameter(part)),
            )
            found[kind] += 1
    return [replace(kind, count=count) for kind, count in found.items()]


def _expert_parts(model: _Model, block: int) -> Iterator[tuple[str, str, str]]:
    """(module of experts in the block, parameter, full name of both) of those that will be quantized, or are refused."""
    for name in experts_of(model.blocks[block]):
        for part in FUSED:
            full = f"{model.prefix}.{block}.{name}.{part}"
            if full in model.packed or full in model.refused:
                yield name, part, full


def _others(model: _Model) -> dict[str, tuple[int, str]]:
    """What stays float and is not among the kinds."""
    listed = {f"{model.prefix}.{i}.{name}" for i, block in enumerate(model.blocks) for name in matrices_of(block)}
    listed |= {full for i in range(len(model.blocks)) for _, _, full in _expert_parts(model, i)}
    rest = Counter((starred(name), reason) for name, reason in model.staying.items() if name not in listed)
    return {name: (count, reason) for (name, reason), count in rest.items()}


def _result_bytes(model: _Model) -> dict[str, int]:
    """Bytes of the tensors that will be saved; tied ones are saved once."""
    names = [name if isinstance(module, ExpertWeights) else f"{name}.weight" for name, module in model.packed.items()]
    replaced = {id(model.empty.get_parameter(name)) for name in names}
    heads = (model.empty.get_input_embeddings(), model.empty.get_output_embeddings())
    embeddings = {id(parameter): parameter.nbytes for head in heads if head is not None for parameter in head.parameters()}
    parameters = {id(parameter): parameter.nbytes for parameter in model.empty.parameters()}
    known = {name for name, _ in model.empty.named_parameters(remove_duplicate=False)}
    buffers = sum(tensor.nbytes for name, tensor in model.empty.state_dict().items() if name not in known)
    other = sum(size for key, size in parameters.items() if key not in replaced and key not in embeddings)
    return {"quantized": sum(map(_bytes, model.packed.values())), "embeddings": sum(embeddings.values()), "other": other + buffers}


def _block_costs(model: _Model, experts_per_token: float) -> list[costs.BlockCost]:
    """One entry for every kind of block. Where nothing was probed, every matrix counts as having an input and a fold of its own."""
    alike: dict[Any, list[int]] = {}
    for i, block in enumerate(model.blocks):
        to_quantize = frozenset(name for name in matrices_of(block) if f"{model.prefix}.{i}.{name}" in model.packed)
        to_quantize |= {f"{name}.{part}" for name, part, full in _expert_parts(model, i) if full in model.packed}
        alike.setdefault((block_signature(block), to_quantize), []).append(i)
    entries = []
    for (signature, to_quantize), indices in alike.items():
        block, probed = model.blocks[indices[0]], model.found.get(signature)
        shapes = {name: shape_of(module) for name, module in matrices_of(block).items()}
        shapes |= {name: shape_of(router) for name, router in routers_of(block).items()}
        known = [tuple(name for name in names if name in shapes) for names in probed.groups] if probed else [(name,) for name in shapes]
        groups = [
            costs.Group(
                in_features=shapes[names[0]][1],
                rows=tuple(shapes[name][0] for name in names if name in to_quantize),
                outputs=sum(shapes[name][0] for name in names),
                folded=probed is None or any(probed.producer_of(name) for name in names),
            )
            for names in known
            if names
        ]
        for name, part, full in _expert_parts(model, indices[0]):
            experts, (rows, columns) = block.get_submodule(name), expert_shapes(block.get_submodule(name))[part]
            count, halves = len(experts.get_parameter(part)), (rows // 2, rows // 2) if part == FUSED[0] else (rows,)
            share = min(1, experts_per_token / count)
            groups += [costs.Group(columns, halves, rows, folded=False, share=share, count=count)] if full in model.packed else []
        matrices = [p for p in block.parameters() if p.ndim > 1]
        active = sum(p.numel() * (min(1, experts_per_token / len(p)) if p.ndim == 3 else 1) for p in matrices)  # [experts, ., .]
        searched = None if probed is None else probed.seconds if probed.index in indices else 0.0  # once for all that are alike
        entries.append(costs.BlockCost(len(indices), sum(p.numel() for p in matrices), active, tuple(groups), searched))
    return entries
