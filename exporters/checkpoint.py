"""What an exporter reads: the tensors of a model, quantized ones unpacked, one in memory at a time, under their names on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from awq_hf.config import AwqConfig
from awq_hf.headers import Headers
from awq_hf.kernels.foreign import to_gemm
from awq_hf.kernels.layout import GEMM, WIDE, unpack
from awq_hf.linear import unpack_weight
from awq_hf.spec import QuantizedWeight, QuantSpec
from awq_hf.stored import DTYPES, ZEROS, Packed, find_packed, is_finite

# What lies beside weights and belongs to the model: generation config, tokenizer, processor, chat template, remote code, licence.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.codes", "*.spm", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = {"config.json", "evaluation.json", "quantize_config.json", "quant_config.json", "requirements.txt"}
_FOLDERS = ("additional_chat_templates",)


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
        found = {path for pattern in COMPANIONS for path in self.directory.glob(pattern)}
        found |= {path for folder in _FOLDERS for path in (self.directory / folder).glob("*")}
        return sorted(
            path for path in found if path.is_file() and path.name not in _NOT_COMPANIONS and not path.name.endswith(".index.json")
        )


def _asymmetric(packed: Packed) -> Packed:
    return packed._replace(spec=replace(packed.spec, symmetric=False))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts layers by number."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
