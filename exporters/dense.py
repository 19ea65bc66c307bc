"""The dense target: plain Linears in place of quantized ones, for programs that know nothing of quantization.

In memory (`make_dense`), and in files, where the model is read tensor by tensor (`export`): the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from awq_hf.affine import dequantize_weight
from awq_hf.experts import AwqExperts
from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.folder import MAX_SHARD_SIZE, Bar, items_with_bar, write_folder
from awq_hf.exporters.modules import find_modules
from awq_hf.exporters.refusals import check_activations
from awq_hf.linear import AwqLinear
from awq_hf.matrices import as_kind
from awq_hf.spec import QuantizedWeight
from awq_hf.stored import is_finite
from awq_hf.wording import option

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export(checkpoint: Checkpoint, directory: Path, bar: Bar, dtype: str = "auto", max_shard_size: str | int = MAX_SHARD_SIZE) -> None:
    """dtype: float16, bfloat16, float32, or auto for the checkpoint's. Tensors that are kept wider than the rest stay as they are.

    Raises ValueError for a value that is beyond the dtype.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"{option('dtype', dtype)} is not known; choose one of auto, {', '.join(DTYPES)}")
    check_activations(checkpoint, "dense")
    chosen = DTYPES.get(dtype, checkpoint.dtype)
    config = checkpoint.config_dict if dtype == "auto" else with_dtype(checkpoint.config_dict, dtype)
    write_folder(directory, checkpoint, _tensors(checkpoint, chosen, bar), config, max_shard_size)


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of a config.json's content that says `dtype`, under whichever key, and in the configs inside it."""
    result = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return result | {key: dtype for key in ("dtype", "torch_dtype") if config.get(key)}


def _tensors(checkpoint: Checkpoint, dtype: torch.dtype, bar: Bar) -> Iterator[tuple[str, Tensor]]:
    transposed = find_modules(checkpoint).transposed if checkpoint.packed else frozenset()
    for name, value in items_with_bar(checkpoint, "dense", bar):
        if isinstance(value, QuantizedWeight):
            tensor = dequantize_weight(value, dtype)
            tensor = tensor.T if name.removesuffix(".weight") in transposed else tensor
        else:
            wide = value.itemsize > checkpoint.dtype.itemsize
            tensor = value.to(dtype) if value.is_floating_point() and not wide else value
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"{name} has values beyond {dtype}; export it with {option('dtype', 'bfloat16')} or float32")
        yield name, tensor


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every AwqLinear and AwqExperts of `model`, in place, by what it had replaced, holding its dequantized weight in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AwqLinear):
            model.set_submodule(name, dense_module(module, dtype))
        elif isinstance(module, AwqExperts):
            model.set_submodule(name, module.dequantized(dtype))


def cast(model: nn.Module, old: torch.dtype, dtype: torch.dtype, kept: Collection[str] = ()) -> None:
    """Cast what a checkpoint of `model` would hold, in place, but for tensors that are kept wider than `old`, the model's dtype; those
    named in `kept` to float32.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.itemsize <= old.itemsize:
            tensor.data = tensor.data.to(torch.float32 if name in kept else dtype)


def cast_unsaved(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give buffers that no checkpoint holds, such as computed positions, the dtype that they have in a model of its class that is made in
    `dtype`: rotary frequencies stay in float32 whatever it is.
    """
    with torch.device("meta"):
        made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    saved = model.state_dict()
    dtypes = {name: buffer.dtype for name, buffer in made.named_buffers() if name not in saved}
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(dtypes.get(name, buffer.dtype))


def dense_module(module: AwqLinear, dtype: torch.dtype) -> nn.Module:
    """The Linear (or Conv1D) whose weight is the one `module` stands for, rounded once to `dtype`."""
    return as_kind(module.replaces, module.dequantize(dtype), None if module.bias is None else module.bias.data.to(dtype))
