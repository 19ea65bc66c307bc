"""GGUF from any model: an AWQ checkpoint keeps its codes; a float one is searched for the target's types, calibrated on text."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel

from awq_hf import compat
from awq_hf.blocks import find_blocks, matrices_of
from awq_hf.config import AwqConfig
from awq_hf.encoding import Encoded, encode_model
from awq_hf.exporters.checkpoint import Checkpoint, open_checkpoint
from awq_hf.exporters.gguf.names import Plan
from awq_hf.exporters.gguf.types import AUTO, FLOATS, check_name
from awq_hf.exporters.gguf.writer import export, plan_tensors, plan_types, prepare
from awq_hf.hf_quantizer import calibration_windows
from awq_hf.report import Report

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
    importance: Mapping[str, np.ndarray[Any, Any]] | None = None,
    device: str = "cpu",
    location: Mapping[str, Any] | None = None,
    **options: Any,
) -> GgufExport:
    """Write a model as a GGUF file that llama.cpp runs.

    model: a quantized or float model in memory, or a directory or Hub id of one; location: revision and so on, for the Hub.
    An AWQ checkpoint is repacked: the same codes, by default in the smallest type that holds them; exact: the same weights bit for bit.
    A float model becomes `type` (default Q4_K_M), from its float weights: smoothing scales, importance and codes are searched on the
    calibration text of `config`, whose bits and groups are of no use here. search=False: the type's plain quantizer, with `importance`
    (E[x^2] by name in the file, as llama.cpp's importance matrices hold it) where given. options: of `exporters.gguf.export`.
    Raises ValueError for what cannot be exported or found in the options, before anything is written.
    """
    checkpoint = open_checkpoint(model, **(location or {}))
    columns = {name: torch.from_numpy(np.ascontiguousarray(values, np.float32)) for name, values in (importance or {}).items()}
    plan = plan_tensors(checkpoint)
    if unknown := sorted(columns.keys() - plan.shapes.keys()):
        raise ValueError(f"the importance matrix has an entry {unknown[0]}, which the model has not: it is of another model")
    if checkpoint.quantization is not None:
        types = plan_types(checkpoint, plan, check_name(type or AUTO), exact)
        return GgufExport(export(checkpoint, path, type=type or AUTO, exact=exact, importance=columns, **options), types)
    if exact:
        raise ValueError("exact keeps the codes of a quantized checkpoint; this model is float: type F32, F16 or BF16 keeps its weights")
    wanted = check_name(type or DEFAULT)
    if wanted == AUTO:
        raise ValueError(f"type auto is for quantized checkpoints, whose codes decide; choose a type for this float model: {DEFAULT}")
    types = plan_types(checkpoint, plan, wanted)
    if not search or columns or not set(types.values()) - {*FLOATS, Type.Q8_0}:
        return GgufExport(export(checkpoint, path, type=wanted, importance=columns, **options), types)
    prepare(checkpoint, path, type=wanted, types=types, **{key: value for key, value in options.items() if key != "progress"})
    return _searched(checkpoint, model, plan, types, path, wanted, config or AwqConfig(), device, location or {}, options)


def _searched(
    checkpoint: Checkpoint, model: Any, plan: Plan, types: dict[str, Type], path: Any, wanted: str, config: AwqConfig, device: str,
    location: Mapping[str, Any], options: dict[str, Any],
) -> GgufExport:  # fmt: skip
    if isinstance(model, PreTrainedModel):
        loaded: Any = copy.deepcopy(model)
    else:
        kind = compat.class_of(checkpoint.config.architectures)
        loaded = kind.from_pretrained(model, dtype="auto", device_map=device, **location)
    names = _linears(loaded, plan, types)
    config = copy.copy(config)
    config.tokenizer = config.tokenizer or options.get("tokenizer")
    recipe = config.recipe(getattr(loaded.config.get_text_config(), "max_position_embeddings", None))
    windows = calibration_windows(loaded, config, recipe)
    kinds = {module: types[plan.places[name].target] for name, module in names.items()}
    encoded = encode_model(loaded, kinds, recipe, windows, compat.progress_bar if options.get("progress", True) else None)
    weights = {name: encoded.weights[module] for name, module in names.items() if module in encoded.weights}
    smoothed = open_checkpoint(loaded)
    files = export(smoothed, path, type=wanted, encoded=weights, types=types, **options)
    return GgufExport(files, types, encoded.report)


def importance_of(encoded: Encoded, names: Mapping[str, str], plan: Plan) -> dict[str, Tensor]:
    """E[x^2] of the model's inputs by name in the file. names: tensor of the checkpoint -> module."""
    return {plan.places[name].target: encoded.importance[module] for name, module in names.items() if module in encoded.importance}


def _linears(model: Any, plan: Plan, types: Mapping[str, Type]) -> dict[str, str]:
    """Tensor of the checkpoint -> module of the model, for the Linears of its blocks that become blocks of the file."""
    prefix, blocks = find_blocks(model)
    inside = {f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name in matrices_of(block)}
    resolve, known = compat.resolver(model), model.state_dict()
    found = {}
    for name, place in plan.places.items():
        if types[place.target] not in FLOATS and place.expert is None:
            module, part = resolve(name, known)[0].rpartition(".")[::2]
            if part == "weight" and module in inside:
                found[name] = module
    return found
