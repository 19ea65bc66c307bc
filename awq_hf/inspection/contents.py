"""What an AWQ checkpoint holds, from its config.json, the headers of its tensors, and report.json where there is one. Others: export.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from awq_hf.checkpoint import convert_modules, match_tensors
from awq_hf.config import AwqConfig
from awq_hf.inspection.kernel_use import KernelUse, kernel_uses
from awq_hf.inspection.source import Source, stored_bytes
from awq_hf.linear import PackedModule, packed_modules
from awq_hf.model_cards.summary import loss_ratio
from awq_hf.serving import serving
from awq_hf.wording import starred

_PACKED = ("qweight", "qzeros", "scaled_zeros", "scales")


@dataclass(frozen=True)
class Contents:
    """model: as it was named; sizes in bytes, by kind; parameters of the model that the checkpoint stands for.

    format: "awq", "gptq" or "compressed-tensors"; version: what the config calls the layout; layouts: what an AWQ checkpoint's tensors
    are in. spec: the most frequent one; overrides: the others, as in AwqConfig.
    problem: why awq-hf cannot read it, None when every tensor fits the config. bits_per_weight: of the quantized modules, with scales and
    zero points; None where the problem hides it, as it may the spec. left_in_float: modules that hold matrices -> how many.
    loss_ratio, calibration: from report.json, or None. kernels: that would run the modules on `device`. serving: see awq_hf.serving.
    """

    model: str
    class_name: str
    dtype: str
    parameters: int
    version: str | None
    layouts: list[str]
    spec: dict[str, Any] | None
    overrides: dict[str, Any]
    written_by: str | None
    quantized_modules: int
    bits_per_weight: float | None
    scales: list[str]
    left_in_float: dict[str, int]
    bytes: dict[str, int]
    problem: str | None
    loss_ratio: float | None
    calibration: dict[str, Any] | None
    device: str
    kernels: list[KernelUse]
    serving: list[str]
    format: str = "awq"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.format, **asdict(self)}


def read_contents(source: Source, dtype: str, device: str) -> Contents:
    """dtype: "auto" or a name of torch's, in which the model would run."""
    stored = source.quantization
    assert stored is not None
    config = AwqConfig.from_dict(stored)
    chosen = source.dtype() if dtype == "auto" else getattr(torch, dtype)
    model = source.empty_model(source.dtype())
    parameters = sum(p.numel() for p in model.parameters())
    heads = heads_of(model)
    layouts: set[str] = set()
    problem = None
    try:
        layouts = set(convert_modules(model, source.headers, config.spec_of, config.version).values())
        tensors = match_tensors(model, source.headers)
        heads = {tensors.get(name, name) for name in heads}
    except ValueError as error:
        problem = str(error)
    owners = {name.rpartition(".")[0] for name in source.headers if name.endswith(".qweight")}
    sizes = {"quantized": 0, "embeddings": 0, "other": 0}
    for name, info in source.headers.items():
        owner, _, part = name.rpartition(".")
        packed = owner in owners and part in _PACKED
        sizes["quantized" if packed else "embeddings" if name in heads else "other"] += stored_bytes(info)
    linears = packed_modules(model)
    weights = sum(module.matrices * module.in_features * module.out_features for module in linears.values())
    return Contents(
        model=source.name,
        class_name=type(model).__name__,
        dtype=str(source.dtype()).removeprefix("torch."),
        parameters=parameters,
        version=config.version,
        layouts=sorted(layouts),
        spec=asdict(config.spec()),
        overrides=config.overrides,
        written_by=writer(source, stored),
        quantized_modules=len(owners),
        bits_per_weight=8 * sizes["quantized"] / weights if problem is None else None,
        scales=sorted({info.dtype for name, info in source.headers.items() if name.endswith(".scales")}),
        left_in_float=dict(Counter(map(starred, _float_modules(model)))) if problem is None else {},
        bytes=sizes,
        problem=problem,
        **of_report(source),
        device=device,
        kernels=kernel_uses(linears, chosen, device) if problem is None else [],
        serving=serving(model, linears) if problem is None else [],
    )


def of_report(source: Source) -> dict[str, Any]:
    """Contents' loss_ratio and calibration."""
    report = source.report
    return {"loss_ratio": loss_ratio(report["layers"]) if report else None, "calibration": report["calibration"] if report else None}


def heads_of(model: Any) -> set[str]:
    """The model's names of the embeddings' weights."""
    heads = [head for head in (model.get_input_embeddings(), model.get_output_embeddings()) if head is not None]
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is head for head in heads)}


def _float_modules(model: nn.Module) -> list[str]:
    """Modules that hold matrices and are neither quantized nor embeddings."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, (PackedModule, nn.Embedding)) and any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]


def writer(source: Source, stored: dict[str, Any]) -> str | None:
    """The program that wrote the checkpoint, by the marks that programs leave."""
    if source.report and "awq-hf" in source.report.get("versions", {}):
        return f"awq-hf {source.report['versions']['awq-hf']}"
    meta = stored.get("meta")
    marks = (meta.get("quantizer") if isinstance(meta, dict) else None, stored.get("provider"))
    named = next((mark for mark in marks if mark), None)
    if named is None and "autoround_version" in stored:
        named = f"auto-round {stored['autoround_version']}"
    return None if named is None else ", ".join(named) if isinstance(named, list) else str(named)
