"""What a checkpoint in another program's format holds, as far as awq_hf.exporters.reading reads it; else its sizes, and why not more."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from awq_hf.exporters.reading import NotReadHere, open_export
from awq_hf.inspection.contents import Contents, heads_of, of_report, writer
from awq_hf.inspection.source import Source, stored_bytes
from awq_hf.wording import starred

# The tensors of a quantized module, in both formats, by the last part of their name.
_PACKED = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_SCALES = ("scales", "weight_scale")


def read_export(source: Source, device: str) -> Contents:
    """Of a source whose quant_method is one of `reading.PACKAGES`. Raises ValueError where only headers are here."""
    stored = source.quantization
    assert stored is not None
    if source.directory is None:
        raise ValueError(
            f"{source.name} is {source.quant_method}, of which more is read than headers; download it: hf download {source.name}"
        )
    model = source.empty_model(source.dtype())
    split = {name: name.rpartition(".") for name in source.headers}
    owners = {owner for owner, _, part in split.values() if part in _PACKED}
    found = _read(source)
    heads = heads_of(model)
    sizes = {"quantized": 0, "embeddings": 0, "other": 0}
    for name, info in source.headers.items():
        owner, _, part = split[name]
        packed = owner in owners and part in _PACKED
        sizes["quantized" if packed else "embeddings" if name in heads else "other"] += stored_bytes(info)
    embeddings = {name for name in heads if not name.startswith("lm_head")}
    matrices = [name for name, info in source.headers.items() if len(info.shape) > 1 and split[name][0] not in owners]
    return Contents(
        model=source.name,
        class_name=type(model).__name__,
        dtype=str(source.dtype()).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        format=source.quant_method,
        version=stored.get("checkpoint_format") or stored.get("format"),
        layouts=[],
        written_by=writer(source, stored),
        quantized_modules=len(owners),
        bits_per_weight=8 * sizes["quantized"] / found["weights"] if "weights" in found else None,
        scales=sorted({info.dtype for name, info in source.headers.items() if split[name][2] in _SCALES and split[name][0] in owners}),
        left_in_float=dict(Counter(starred(name.removesuffix(".weight")) for name in matrices if name not in embeddings)),
        bytes=sizes,
        spec=found.get("spec"),
        overrides=found.get("overrides", {}),
        problem=found.get("problem"),
        device=device,
        kernels=[],
        serving=[],
        **of_report(source),
    )


def _read(source: Source) -> dict[str, Any]:
    """spec, overrides and the number of quantized weights; or the problem."""
    assert source.directory is not None
    try:
        checkpoint = open_export(source.directory)
    except NotReadHere as reason:
        return {"problem": str(reason)}
    assert checkpoint.quantization is not None
    weights = sum(packed.shape[0] * packed.shape[1] for packed in checkpoint.packed.values())
    overrides = {starred(owner): options for owner, options in checkpoint.quantization.overrides.items()}
    return {"spec": asdict(checkpoint.quantization.spec()), "overrides": overrides, "weights": weights}
