"""What an exporter reads: the tensors of a model, quantized ones unpacked, one in memory at a time, under their names on disk."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from awq_hf import compat, renaming
from awq_hf.beside import subfolder_of
from awq_hf.config import AwqConfig
from awq_hf.exporters.rope_keys import with_older_rope_keys
from awq_hf.freed import drop_file_pages
from awq_hf.headers import INDEX, WEIGHTS, Headers, TensorInfo, read_headers, weight_files
from awq_hf.kernels.foreign import to_gemm
from awq_hf.kernels.layout import GEMM, WIDE, unpack
from awq_hf.linear import unpack_weight
from awq_hf.spec import QuantizedWeight, QuantSpec
from awq_hf.stored import DTYPES, NAMES, ZEROS, Packed, find_packed, is_finite
from awq_hf.unfinished import check_whole
from awq_hf.wording import no_model

# What lies beside weights and belongs to the model: generation config, tokenizer, processor, chat template, remote code, licence.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.codes", "*.spm", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = {"config.json", "evaluation.json", "quantize_config.json", "quant_config.json", "requirements.txt"}
# Of a repository. The same wherever it is looked at: the client takes a cache that lacks a file for incomplete
_WANTED: dict[str, Any] = dict(
    allow_patterns=[*_COMPANIONS, WEIGHTS, INDEX, "model-*.safetensors"], ignore_patterns=["original/*", "onnx/*"]
)
_FOLDERS = ("additional_chat_templates",)

MAPPED = 1 << 16  # bytes of a tensor from which it is worth looking up whose memory it is, to give it back


C = TypeVar("C", bound="Checkpoint")


class Entry(NamedTuple):
    """A tensor that a checkpoint will give. shape: [out, in] for a quantized matrix, whose kind is its spec; else as stored."""

    name: str
    shape: tuple[int, ...]
    kind: QuantSpec | torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A model, quantized by AWQ or not, wherever it is.

    label: what a user calls it. config_dict: config.json's content without quantization, with the rope keys of transformers 4 too.
    config: the same as transformers' object, a plain PreTrainedConfig for an architecture whose code is not in transformers.
    quantization: what the config said, None for a float model. directory: where its files lie, None for a model in memory that came
    from nowhere. headers: of the tensors as they are stored.
    """

    label: str
    config: PreTrainedConfig
    config_dict: dict[str, Any]
    quantization: AwqConfig | None
    directory: Path | None
    headers: Headers
    load: Callable[[str], Tensor]  # a stored tensor by its name
    model: PreTrainedModel | None = None  # where it is in memory

    @property
    def dtype(self) -> torch.dtype:
        """Of the float tensors: what the config says, else that of the first one."""
        named = getattr(torch, str(self.config_dict.get("dtype", self.config_dict.get("torch_dtype"))), None)
        floats = (DTYPES[info.dtype] for info in self.headers.values() if info.dtype in ("F16", "BF16", "F32"))
        return named if isinstance(named, torch.dtype) else next(floats, torch.float32)

    @functools.cached_property
    def packed(self) -> dict[str, Packed]:
        """Quantized matrices: name of the module -> what its tensors are. Raises ValueError for tensors that do not fit the config.

        A matrix is symmetric if the config says so and its zero points are, which are read.
        """
        if self.quantization is None:
            return {}
        config = self.quantization
        specs = [spec for _, spec in config.recipe().overrides if spec is not None] + [config.spec()]
        owners = sorted({name.rpartition(".")[0] for name in self.headers if name.rpartition(".")[2] in ("qweight", *ZEROS)})
        found = {owner: find_packed(owner, self.headers, [config.spec_of(owner), *specs], config.version) for owner in owners}
        return {owner: packed if self._says_so(owner, packed) else _asymmetric(packed) for owner, packed in found.items()}

    def _says_so(self, owner: str, packed: Packed) -> bool:
        """Whether a matrix that the config calls symmetric is."""
        if not packed.spec.symmetric:
            return True
        if packed.layout in (GEMM, WIDE):
            zeros = unpack(self.load(f"{owner}.{packed.zeros}"), packed.spec.bits, packed.shape[0])
        else:
            zeros = self._quantized(owner, packed).zero_points
        return bool((zeros == packed.spec.middle_code).all())

    @functools.cached_property
    def activation_scales(self) -> list[str]:
        """Tensors that outputs of an activation are divided by, which AutoAWQ gives models with GELU: see linear.ScaledActivation."""
        vectors = [name for name, info in self.headers.items() if name.endswith(".scales") and len(info.shape) == 1]
        return sorted(vectors, key=_natural) if self.packed else []

    def names(self) -> list[Entry]:
        """What `items` will give, in its order; no tensor is read."""
        parts = {f"{owner}.{part}" for owner, packed in self.packed.items() for part in self._parts_of(packed)}
        entries = [Entry(f"{owner}.weight", packed.shape, packed.spec) for owner, packed in self.packed.items()]
        entries += [Entry(name, info.shape, DTYPES[info.dtype]) for name, info in self.headers.items() if name not in parts]
        return sorted(entries, key=lambda entry: _natural(entry.name))

    def items(self, known: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
        """Name (that of the original checkpoint, ending in .weight for quantized matrices as well) and value, sorted by name: a Tensor, a
        QuantizedWeight, or what is in `known`, which is not read.

        Layers are sorted by number; biases are items of their own; a head that is tied to the embeddings is none. Scales keep the dtype
        of the file. Raises ValueError naming a tensor that holds NaN or infinity, and for zero points that are no integers.
        """
        for name, _, kind in self.names():
            if known is not None and name in known:
                yield name, known[name]
            elif isinstance(kind, QuantSpec):
                yield name, self._quantized(owner := name.removesuffix(".weight"), self.packed[owner])
            else:
                yield name, self._finite(name)

    __iter__ = items

    def _parts_of(self, packed: Packed) -> tuple[str, ...]:
        """The last parts of the names of the tensors that a quantized matrix consists of."""
        return ("qweight", packed.zeros, "scales")

    def _finite(self, name: str) -> Tensor:
        tensor = self.load(name)
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"{name} of {self.label} holds NaN or infinity: the checkpoint is damaged")
        return tensor

    def _quantized(self, owner: str, packed: Packed) -> QuantizedWeight:
        qweight, zeros, scales = self.load(f"{owner}.qweight"), self._finite(f"{owner}.{packed.zeros}"), self._finite(f"{owner}.scales")
        if packed.layout not in (GEMM, WIDE):
            try:
                qweight, zeros, scales = to_gemm(packed.layout, qweight, zeros, scales, packed.spec.group_width(packed.shape[1]))
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from None
        return unpack_weight(qweight, zeros, scales, packed.spec)

    def files(self) -> list[Path]:
        """What comes along: generation config, tokenizer or processor, chat template, remote code, licence, report.json."""
        if self.directory is None:
            return []
        found = {path for pattern in _COMPANIONS for path in self.directory.glob(pattern)}
        found |= {path for folder in _FOLDERS for path in (self.directory / folder).glob("*")}
        return sorted(
            path for path in found if path.is_file() and path.name not in _NOT_COMPANIONS and not path.name.endswith(".index.json")
        )


def _asymmetric(packed: Packed) -> Packed:
    return packed._replace(spec=replace(packed.spec, symmetric=False))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts layers by number."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


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
