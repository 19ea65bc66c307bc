"""What an AWQ checkpoint on disk holds, read from the headers of its safetensors files, and the modules that fit it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import nn

from awq_hf.blocks import find_blocks
from awq_hf.kernels.layout import GEMM, layout_for, words_per_row
from awq_hf.linear import AwqLinear
from awq_hf.spec import QuantSpec

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it


def read_headers(files: Iterable[str]) -> dict[str, TensorInfo]:
    """Name -> shape and dtype of every tensor in the files; no tensor is read."""
    found = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path} is not a safetensors file; AWQ checkpoints are read from safetensors only")
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                found[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype())
    return found


def convert_modules(model: nn.Module, headers: dict[str, TensorInfo], spec: QuantSpec, version: str) -> list[str]:
    """Replace the Linears that own a .qweight in the checkpoint by empty AwqLinears; returns their names.

    Raises ValueError naming the tensor when something is missing, unexpected or of another shape.
    """
    if version != layout_for(spec.bits):
        raise ValueError(
            f"checkpoint version {version!r} with {spec.bits} bits cannot be read; versions that can: "
            f"{GEMM!r} (4 bits) and {layout_for(8)!r} (2, 3 and 8 bits)"
        )
    if not any(name.endswith(".qweight") for name in headers):
        raise ValueError("config.json says AWQ, but no tensor of the checkpoint is named *.qweight: it is not quantized")
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in headers if name.endswith((".qweight", ".qzeros"))))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    converted = []
    for owner in owners:
        name = _resolve(owner, linears, model)
        linear = linears[name]
        _check(owner, linear, headers, spec)
        awq = AwqLinear(linear.in_features, linear.out_features, spec, f"{owner}.bias" in headers, linear.weight.dtype, "meta")
        awq.scales = nn.Parameter(awq.scales.to(_DTYPES[headers[f"{owner}.scales"].dtype]), requires_grad=False)
        model.set_submodule(name, awq)
        converted.append(name)
    _check_others(model, headers)
    return converted


def _check_others(model: nn.Module, headers: dict[str, TensorInfo]) -> None:
    """Raise ValueError when the checkpoint has neither a .weight nor a .qweight for a Linear of the blocks: it would stay random."""
    prefix, _ = find_blocks(model)
    base = getattr(model, "base_model_prefix", "")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"{prefix}."):
            aliases = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
            if not any(f"{alias}.weight" in headers for alias in aliases):
                raise ValueError(f"the checkpoint has neither {name}.qweight nor {name}.weight: a layer of the model is missing")


def _resolve(owner: str, linears: dict[str, nn.Linear], model: nn.Module) -> str:
    """The model's name of a checkpoint's module: checkpoints may or may not carry the base model's prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    for name in (owner, f"{prefix}.{owner}", owner.removeprefix(f"{prefix}.")):
        if name in linears:
            return name
    raise ValueError(f"{owner}.qweight is in the checkpoint, but the model has no Linear {owner!r} to hold it")


def _check(owner: str, linear: nn.Linear, headers: dict[str, TensorInfo], spec: QuantSpec) -> None:
    try:
        groups = linear.in_features // spec.group_width(linear.in_features)
    except ValueError as error:
        raise ValueError(f"{owner} does not fit the checkpoint's quantization_config: {error}") from None
    words = words_per_row(linear.out_features, spec.bits)
    expected = {
        "qweight": ((linear.in_features, words), ("I32",)),
        "qzeros": ((groups, words), ("I32",)),
        "scales": ((groups, linear.out_features), ("F16", "BF16", "F32")),
    }
    for suffix, (shape, dtypes) in expected.items():
        info = headers.get(f"{owner}.{suffix}")
        if info is None:
            raise ValueError(f"{owner}.{suffix} is missing from the checkpoint")
        if info.shape != shape or info.dtype not in dtypes:
            raise ValueError(
                f"{owner}.{suffix} is {info.dtype} {list(info.shape)}, expected {' or '.join(dtypes)} {list(shape)} "
                f"for {spec.bits} bits and group_size {spec.group_size}"
            )
