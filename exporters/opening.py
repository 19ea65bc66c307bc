"""Opens what an exporter reads: a directory, a repository of the Hub, or a model in memory."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from awq_hf import compat, renaming
from awq_hf.beside import subfolder_of
from awq_hf.config import AwqConfig
from awq_hf.exporters.checkpoint import COMPANIONS, Checkpoint
from awq_hf.exporters.rope_keys import with_older_rope_keys
from awq_hf.freed import drop_file_pages
from awq_hf.headers import INDEX, WEIGHTS, Headers, TensorInfo, read_headers, weight_files
from awq_hf.stored import DTYPES, NAMES
from awq_hf.unfinished import check_whole
from awq_hf.wording import no_model

# Of a repository. The same wherever it is looked at: the client takes a cache that lacks a file for incomplete
_WANTED: dict[str, Any] = dict(
    allow_patterns=[*COMPANIONS, WEIGHTS, INDEX, "model-*.safetensors"], ignore_patterns=["original/*", "onnx/*"]
)

MAPPED = 1 << 16  # bytes of a tensor from which it is worth looking up whose memory it is, to give it back

C = TypeVar("C", bound=Checkpoint)


def open_checkpoint(model: str | os.PathLike[str] | PreTrainedModel, *, known: Collection[str] = (), **location: Any) -> Checkpoint:
    """A model in memory, or the name of a directory or of a Hub repository that holds safetensors; no tensor is read.

    known: names of tensors that nobody will ask it for; those of a model in memory may be somewhere else.
    location: revision, cache_dir, token, local_files_only, for the Hub. Raises ValueError for what cannot be exported, naming the reason.
    """
    compat.check_is_model(model)
    if isinstance(model, PreTrainedModel):
        if location:
            raise TypeError(f"{', '.join(location)}: options for the Hub have no use with a model that is in memory")
        return _in_memory(model, known)
    directory, label = directory_of(os.fspath(model), location), os.fspath(model)
    if not (directory / "config.json").is_file():
        raise ValueError(no_model(label, directory))
    stored = _quantization(json.loads((directory / "config.json").read_text(encoding="utf-8")), label)
    return _checked(open_files(directory, label, functools.partial(Checkpoint, quantization=stored)))


def open_files(directory: Path, label: str, kind: Callable[..., C]) -> C:
    """kind(fields of a Checkpoint, without quantization) of the files in a directory."""
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    headers = read_headers(weight_files(directory, label), str(directory))
    return kind(
        label=label,
        config=_without_quantization(_config(directory, content)),
        config_dict=_rest(content),
        directory=directory,
        headers=headers,
        load=_Files(headers).load,
    )


def directory_of(name: str, location: dict[str, Any]) -> Path:
    if (path := Path(name).expanduser()).is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{name} is a file; give the directory that holds config.json and *.safetensors, or a Hub id")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"there is no directory {name}, and it cannot be a Hub id (owner/name) either") from None
    try:
        return Path(snapshot_download(name, **_WANTED, **location))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{name} is no directory here, and the Hub does not give such a model: {str(error).splitlines()[0]}") from error


def _config(directory: Path, content: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, OSError):  # an architecture whose code comes with the checkpoint
        return PreTrainedConfig.from_dict(copy.deepcopy(content))


def _in_memory(model: PreTrainedModel, known: Collection[str]) -> Checkpoint:
    check_whole(model)
    label = model.name_or_path or type(model).__name__
    tensors = renaming.state_dict_on_disk(model)
    if elsewhere := sorted(name for name, tensor in tensors.items() if tensor.is_meta and name not in known):
        raise ValueError(f'{elsewhere[0]} of {label} is offloaded; load the model with device_map="cpu", or export its directory')
    headers = {name: TensorInfo(tuple(tensor.shape), _name_of(name, tensor), "memory") for name, tensor in tensors.items()}
    content = compat.config_on_disk(model)
    directory = _beside(model)
    config = _without_quantization(copy.deepcopy(model.config))
    rest, stored = _rest(content), _quantization(content, label)
    return _checked(Checkpoint(label, config, rest, stored, directory, headers, lambda name: tensors[name].cpu(), model))


def _name_of(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in NAMES:
        raise ValueError(f"{name} is {tensor.dtype}, which is not exported")
    return NAMES[tensor.dtype]


def _beside(model: PreTrainedModel) -> Path | None:
    """The directory that a model in memory was loaded from, if it is still there; of the Hub's, the one in the cache."""
    name = model.name_or_path
    if not name or Path(name).is_dir():
        return Path(name, subfolder_of(model)) if name else None
    try:
        root = Path(snapshot_download(name, revision=getattr(model.config, "_commit_hash", None), local_files_only=True, **_WANTED))
        return root / subfolder_of(model)
    except (LocalEntryNotFoundError, ValueError):  # an id that is none is a ValueError
        return None


_QUANTIZATION = ("quantization_config", "compression_config")


def _rest(content: dict[str, Any]) -> dict[str, Any]:
    """config.json's content without its description of quantization."""
    return with_older_rope_keys({key: value for key, value in content.items() if key not in _QUANTIZATION})


def _quantization(content: dict[str, Any], label: str) -> AwqConfig | None:
    """That description. Raises ValueError when it is not AWQ."""
    stored = content.get("quantization_config") or content.get("compression_config")
    if not stored:
        return None
    if (method := stored.get("quant_method")) != "awq":
        raise ValueError(f"{label} is quantized ({method or 'of unknown method'}); AWQ checkpoints and float ones can be exported")
    config: AwqConfig = AwqConfig.from_dict(stored)
    return config


def _without_quantization(config: Any) -> PreTrainedConfig:
    for name in _QUANTIZATION:
        config.__dict__.pop(name, None)
    return config


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The same, after everything that the headers can tell: config and tensors agree on being quantized, and all can be read."""
    quantized = [name for name in checkpoint.headers if name.endswith(".qweight")]
    if checkpoint.quantization is None and quantized:
        raise ValueError(f"{quantized[0]} of {checkpoint.label} is quantized, which config.json should say in quantization_config")
    if checkpoint.quantization is not None and not checkpoint.packed:
        raise ValueError(f"config.json of {checkpoint.label} says AWQ, but no tensor is named *.qweight: it is not quantized")
    for name, info in checkpoint.headers.items():
        if info.dtype not in DTYPES:
            raise ValueError(f"{name} of {checkpoint.label} is {info}, which is not exported")
    return checkpoint


class _Files:
    """The tensors of safetensors files, which are opened once each, when they are first asked for.

    They are copies: a file stays mapped while it is open, and with it all pages that were read, in the end the whole checkpoint.
    """

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        self.opened: dict[str, Any] = {}

    def load(self, name: str) -> Tensor:
        file = self.headers[name].file
        if file not in self.opened:
            self.opened[file] = safe_open(file, framework="pt")
        mapped: Tensor = self.opened[file].get_tensor(name)
        tensor = mapped.clone()
        if mapped.nbytes >= MAPPED:
            drop_file_pages(mapped)
        return tensor
