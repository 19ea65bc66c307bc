"""GGUF from any model: an AWQ checkpoint keeps its codes; a float one is searched for the target's types, calibrated on text."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel

from awq_hf import compat, renaming
from awq_hf.beside import remember_place
from awq_hf.blocks import experts_of, find_blocks, matrices_of
from awq_hf.calibration.data import Windows
from awq_hf.classes import class_of, positions_of
from awq_hf.config import AwqConfig
from awq_hf.encoded_experts import parts_of
from awq_hf.encoded_layer import Encoded
from awq_hf.encoding import encode_model
from awq_hf.experts import PARTS, reason_against
from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.gguf.budget import choose
from awq_hf.exporters.gguf.encode import n_bytes
from awq_hf.exporters.gguf.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from awq_hf.exporters.gguf.names import Plan
from awq_hf.exporters.gguf.types import AUTO, FLOATS, UNSEARCHED, check_name
from awq_hf.exporters.gguf.writer import export, plan_tensors, plan_types, prepare
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.hf_quantizer import calibration_windows
from awq_hf.pipeline import Progress
from awq_hf.report import Report
from awq_hf.sensitivity import candidates, measure
from awq_hf.streaming import InMemory, load_float
from awq_hf.wording import option

MEASURED_WINDOWS = 16  # of the calibration's, whose gradients say how much a Linear matters
DEFAULT = "Q4_K_M"  # of float models


@dataclass(frozen=True)
class GgufExport:
    """files: the path, or those of its parts; types: of the tensors, by name in the file; report: of the search, None without one."""

    files: list[Path]
    types: dict[str, Type]
    report: Report | None = None


def to_gguf(
    model: str | os.PathLike[str] | PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    type: str | None = None,
    exact: bool = False,
    search: bool = True,
    config: AwqConfig | None = None,
    target_bpw: float | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    save_imatrix: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    location: Mapping[str, Any] | None = None,
    **options: Any,
) -> GgufExport:
    """Write a model as a GGUF file that llama.cpp runs.

    model: a quantized or float model in memory, or a directory or Hub id of one; location: revision and so on, for the Hub.
    An AWQ checkpoint is repacked: the same codes, by default in the smallest type that holds them; exact: the same weights bit for bit.
    A float model becomes `type` (default Q4_K_M), from its float weights: smoothing scales, importance and codes of the blocks' Linears and
    experts, and of the head, are searched on the calibration text of `config`, whose bits and groups are of no use here. search=False:
    the type's plain quantizer. target_bpw: bits a weight, of all tensors of the file; the types of the blocks' matrices are then chosen by
    their measured sensitivity. imatrix: an importance matrix of llama.cpp's to use instead of a search; save_imatrix: write that of the
    search for llama.cpp's own tools, in their older format unless the name ends in .gguf. options: of `exporters.gguf.export`.
    Raises ValueError for what cannot be exported or found in the options, before anything is written.
    """
    if target_bpw is not None and type is not None:
        given, types_of = option("target_bpw", target_bpw), option("type", type)
        raise ValueError(f"{given} chooses the types itself, so {types_of} would be of no use; leave one out")
    checkpoint = open_checkpoint(model, **(location or {}))
    kind = check_name(type) if type else None
    _check_use(checkpoint.quantization is not None, kind, search, imatrix, config=config, save_imatrix=save_imatrix, target_bpw=target_bpw)
    plan = plan_tensors(checkpoint)
    columns = {} if imatrix is None else _importance(imatrix, plan)
    searched = checkpoint.quantization is None and search and not columns
    if save_imatrix is not None and Path(save_imatrix).exists():
        raise ValueError(f"the importance matrix {save_imatrix} exists; choose another name")
    if checkpoint.quantization is not None:
        types = plan_types(checkpoint, plan, kind or AUTO, exact)
        same = exact or (kind or AUTO) == AUTO
        options = _described(options, f"{'The integers of an' if same else 'An'} AWQ checkpoint, repacked by awq-hf")
        return GgufExport(export(checkpoint, path, type=kind or AUTO, exact=exact, importance=columns, **options), types)
    if exact:
        raise ValueError(
            f"{option('exact')} keeps the codes of a quantized checkpoint; this model is float: type F32, F16 or BF16 keeps its weights"
        )
    wanted = kind or (DEFAULT if target_bpw is None else _usual(target_bpw))
    if wanted == AUTO:
        raise ValueError(f"type auto is for quantized checkpoints, whose codes decide; choose a type for this float model: {DEFAULT}")
    types = plan_types(checkpoint, plan, wanted)
    if not searched or not set(types.values()) - {*FLOATS, Type.Q8_0}:
        return GgufExport(export(checkpoint, path, type=wanted, importance=columns, **options), types)
    if target_bpw is not None:
        _within_budget(target_bpw, plan, types, _block_matrices(plan, types))
    options = _described(options, "Quantized from float weights by awq-hf, which searched for these types")
    prepare(checkpoint, path, type=wanted, types=types, **{key: value for key, value in options.items() if key != "progress"})
    return _Search(checkpoint, model, plan, config or AwqConfig(), device, location or {}).export(
        types, path, wanted, target_bpw, save_imatrix, options
    )


def _check_use(quantized: bool, kind: str | None, search: bool, imatrix: Any, **of_search: Any) -> None:
    """Raises ValueError for options that would be ignored. kind: the type asked for; of_search: options of a float model's search."""
    if imatrix is not None and kind in UNSEARCHED:
        raise ValueError(f"{option('type', kind)} weighs nothing by importance, so {option('imatrix')} would be of no use; leave it out")
    if quantized:
        why = "a quantized checkpoint keeps its codes"
    elif imatrix is not None:
        why = f"{option('imatrix')} takes its place"
    elif not search:
        why = f"{option('search', False)} leaves it out"
    elif kind in UNSEARCHED:
        why = f"{option('type', kind)} needs none"
    else:
        return
    given = [option(name) for name, value in of_search.items() if value is not None]
    given += [option("search", False)] if quantized and not search else []
    if given:
        raise ValueError(f"{given[0]} is about the search of a float model, and there is none here: {why}; leave {given[0]} out")


def _described(options: dict[str, Any], how: str) -> dict[str, Any]:
    """The file says how it was made, in general.description, unless the caller says something else there."""
    return {**options, "metadata": {"description": how, **(options.get("metadata") or {})}}


def _importance(file: str | os.PathLike[str], plan: Plan) -> dict[str, Tensor]:
    """E[x^2] by name in the file, of matrices that a file of llama.cpp's has an entry for. Raises ValueError for one of another model."""
    matrix = read_imatrix(file)
    found = {name: matrix.importance(name, shape) for name, shape in plan.shapes.items() if len(shape) > 1}
    if not any(values is not None for values in found.values()):
        raise ValueError(f"{file} has no entry for any matrix of this model: it is of another one")
    return {name: torch.from_numpy(np.ascontiguousarray(values, np.float32)) for name, values in found.items() if values is not None}


def _within_budget(
    target_bpw: float, plan: Plan, types: Mapping[str, Type], free: Collection[str]
) -> tuple[dict[str, dict[Type, int]], int]:
    """Bytes of the tensors `free` in every type to choose from, and how many are left for them: the others stay as they are.

    Raises ValueError for a budget that even the smallest types do not keep.
    """
    sizes = {name: {kind: n_bytes(plan.shapes[name], kind) for kind in candidates(plan.shapes[name][-1])} for name in free}
    fixed = sum(n_bytes(shape, types[name]) for name, shape in plan.shapes.items() if name not in sizes)
    least, weights = fixed + sum(min(found.values()) for found in sizes.values()), sum(map(math.prod, plan.shapes.values()))
    if 8 * least > target_bpw * weights:
        bits = math.ceil(800 * least / weights) / 100
        raise ValueError(
            f"{option('target_bpw', target_bpw)} is too little: this model takes at least {bits:.2f} bits a weight, all tensors counted"
        )
    return sizes, int(target_bpw * weights / 8) - fixed


def _block_matrices(plan: Plan, types: Mapping[str, Type]) -> list[str]:
    """Names in the file of the matrices whose types can be chosen: of the blocks; the experts of a layer together."""
    return [name for name, shape in plan.shapes.items() if name.startswith("blk.") and len(shape) > 1 and types[name] not in FLOATS]


def _usual(bits_per_weight: float) -> str:
    """The usual mix of that size, for the embeddings and the head of a file whose other types are chosen."""
    return next((name for least, name in ((5.4, "Q5_K_M"), (4.4, "Q4_K_M"), (3.4, "Q3_K_M")) if bits_per_weight >= least), "Q2_K_M")


class _Search:
    """A float model on its way to a file: loaded, calibrated, searched."""

    def __init__(self, checkpoint: Checkpoint, model: Any, plan: Plan, config: AwqConfig, device: str, location: Mapping[str, Any]) -> None:
        self.checkpoint, self.source, self.plan, self.device, self.location = checkpoint, model, plan, device, location
        self.config = copy.copy(config)
        self.progress: Progress | None = None

    def export(
        self, types: dict[str, Type], path: Any, wanted: str, target_bpw: float | None, save_imatrix: Any, options: dict[str, Any]
    ) -> GgufExport:
        self.config.tokenizer = self.config.tokenizer or options.get("tokenizer")
        model, source = self._load()
        recipe = self.config.recipe(positions_of(model.config))
        windows = calibration_windows(model, self.config, recipe)
        names = _matrices(model, self.plan, types)
        self.progress = compat.progress_bar if options.get("progress", True) else None
        if target_bpw is not None:
            types, wanted = self._within(target_bpw, types, model, source, windows, names), AUTO
        kinds = {found.name: types[self.plan.places[name].target] for name, found in names.items()}
        encoded = encode_model(model, kinds, recipe, windows, self.progress, source)
        names = {name: found for name, found in names.items() if found.full in encoded.weights}  # not those that run twice in a block
        weights = {name: encoded.weights[found.full] for name, found in names.items()}
        assert encoded.report is not None
        encoded.report.notes += _alone(self.plan, types, names)
        files = export(open_checkpoint(model, known=weights), path, type=wanted, encoded=weights, types=types, **options)
        if save_imatrix is not None:
            targets = {found.name: self.plan.places[name].target for name, found in names.items() if found.name in encoded.importance}
            entries = {target: _entry(encoded, name, windows.tokens) for name, target in targets.items()}
            write_imatrix(save_imatrix, Imatrix(entries, (windows.source,), len(windows.input_ids), recipe.seq_len))
        return GgufExport(files, types, encoded.report)

    def _load(self) -> tuple[Any, InMemory]:
        """The model, and where its blocks' weights are."""
        if isinstance(self.source, PreTrainedModel):
            return copy.deepcopy(self.source), InMemory()
        kind = class_of(self.checkpoint.config.architectures)
        model, source = load_float(kind, self.source, dtype="auto", device_map=self.device, **self.location)
        if self.checkpoint.directory is not None:
            remember_place(model, [str(self.checkpoint.directory / "config.json")])  # the tokenizer is of the same
        return model, source

    def _within(
        self, target_bpw: float, types: dict[str, Type], model: Any, source: InMemory, windows: Windows, names: Mapping[str, Matrix]
    ) -> dict[str, Type]:
        """Types of the least predicted divergence for a file of target_bpw bits a weight, of all its tensors."""
        targets = {found.name: self.plan.places[name].target for name, found in names.items() if found.in_block}
        few = windows.sample(min(MEASURED_WINDOWS, len(windows.input_ids)), self.config.seed)
        costs = {targets[name]: cost for name, cost in measure(model, few, list(targets), None, self.progress, source).items()}
        return {**types, **choose(costs, *_within_budget(target_bpw, self.plan, types, costs))}


def _alone(plan: Plan, types: Mapping[str, Type], searched: Collection[str]) -> list[str]:
    """What a person should know of blocks that were not searched for."""
    others = {place.target for name, place in plan.places.items() if name not in searched and types[place.target] not in FLOATS}
    return [f"{len(others)} tensors were left to their types' own quantizers, the first of them {min(others)}"] if others else []


def _entry(encoded: Encoded, name: str, tokens: int) -> Entry:
    counts = encoded.counts.get(name, torch.tensor([tokens]))
    return Entry(encoded.importance[name].numpy(), counts.numpy())


class Matrix(NamedTuple):
    """A matrix of the model. name: of its module, or of a part of all experts of a layer (encoded_experts.py); expert: which of them."""

    name: str
    expert: int | None
    in_block: bool

    @property
    def full(self) -> str:
        return self.name if self.expert is None else f"{self.name}.{self.expert}"


def _matrices(model: Any, plan: Plan, types: Mapping[str, Type]) -> dict[str, Matrix]:
    """Tensor of the checkpoint -> what it is in the model, for those that become blocks of the file and can be searched for."""
    prefix, blocks = find_blocks(model)
    linears = {f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name in matrices_of(block)}
    experts = {f"{prefix}.{i}.{name}": module for i, block in enumerate(blocks) for name, module in experts_of(block).items()}
    experts = {name: module for name, module in experts.items() if reason_against(module) is None}
    resolve, known = renaming.resolver(model), model.state_dict()
    ends = _ends(model)
    found = {}
    for name, place in plan.places.items():
        if types[place.target] in FLOATS:
            continue
        parameter, conversion = resolve(name, known)
        module, part = parameter.rpartition(".")[::2]
        if place.expert is not None and module in experts and conversion is not None and conversion.parts:
            found[name] = Matrix(f"{module}.{parts_of(part)[conversion.part]}", place.expert, True)
        elif place.expert is None and part == "weight" and (module in linears or module in ends):
            found[name] = Matrix(ends.get(module, module), None, module in linears)
    present = {each.name for each in found.values()}
    whole = {module for module in experts if all(f"{module}.{part}" in present for part in PARTS)}
    return {name: each for name, each in found.items() if each.expert is None or each.name.rpartition(".")[0] in whole}


def _ends(model: Any) -> dict[str, str]:
    """Module of the embedding or the head -> the one that it is searched for as: of a tensor that serves as both, the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    tied = head.weight is embedding.weight
    return {names[embedding]: names[head if tied else embedding], names[head]: names[head]}
