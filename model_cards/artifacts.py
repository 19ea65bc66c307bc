"""The models that a directory holds: safetensors checkpoints in its root and in folders named for export targets, GGUF files."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq_hf.exporters.table import TARGETS
from awq_hf.headers import INDEX, WEIGHTS, Headers, read_headers, weight_files
from awq_hf.model_cards.chat import Template
from awq_hf.serving import slow_as_awq
from awq_hf.skip_list import caveats
from awq_hf.spec import GROUP_SIZES, QuantSpec

ROOT = "."
_PACKED = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}  # format -> what holds the codes
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_NAMES = {"awq": "AWQ", "gptq": "GPTQ", "compressed-tensors": "compressed-tensors"}
_READERS = {"gptq": ("SGLang", "GPTQModel"), "awq": ("vLLM", "SGLang", "transformers", "MLX")}
SERVERS = ("vLLM", "SGLang")
_OF_ANY_CLASS = ("awq-hf", "transformers", "compressed-tensors", "GPTQModel")  # the others run models that write text
AUTO_CLASSES = {  # how the names of classes that write text end
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
}
_SHARD = re.compile(r"-(\d{5})-of-\d{5}(?=\.gguf$)")


@dataclass(frozen=True)
class Artifact:
    """One model that can be taken by itself.

    path: relative to the directory, as evaluation.json names it; files: of the weights, likewise. format: awq, gptq, compressed-tensors,
    gguf, float, or another's quant_method. bits: widths of the codes. tag: what the Hub, llama.cpp and Ollama call a GGUF file's type,
    None where its name has no such part. readers: programs; slow: those of them that have fast kernels for these weights, but not in this
    format. made: how, and template: of chats, as a GGUF file has them. obstacles: why vLLM and SGLang refuse it, in spite of the format.
    """

    path: str
    format: str
    label: str
    files: tuple[str, ...]
    size: int
    bits: tuple[int, ...] = ()
    bits_per_weight: float | None = None
    tag: str | None = None
    readers: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    made: str | None = None
    template: Template | None = None
    obstacles: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config of config.json, {} of a float model and of GGUF."""
        return self.config.get("quantization_config") or {}

    @property
    def class_name(self) -> str | None:
        """Of the model in transformers: the first of architectures, if that is a name."""
        named = self.config.get("architectures")
        first = named[0] if isinstance(named, list) and named else None
        return first if isinstance(first, str) and re.fullmatch(r"[A-Za-z]\w*", first) else None


def writes_text(class_name: str | None) -> bool:
    return (class_name or "").endswith(tuple(AUTO_CLASSES))


def find_artifacts(directory: Path, shapes: dict[str, tuple[int, int]]) -> list[Artifact]:
    """Checkpoints first, the root's before folders', then GGUF files by size. shapes: of Linears, as report.json has them.

    Raises ValueError for files that cannot be read, or whose name no command line can hold.
    """
    folders = [directory, *(directory / target for target in TARGETS)]
    found = [_checkpoint(directory, folder, shapes) for folder in folders if _holds_weights(folder)]
    gguf = [_gguf(directory, files) for files in _gguf_files(directory)]
    for name in (name for artifact in (*found, *gguf) for name in artifact.files):
        if not name.isprintable():
            raise ValueError(f"the file name {name!r} holds characters that cannot be shown; rename the file")
    return [*found, *sorted(gguf, key=lambda artifact: (-artifact.size, artifact.path))]


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, with the path, for what is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); make it again, or remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__} and not an object; make it again, or remove it")
    return found


def _holds_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def _checkpoint(directory: Path, folder: Path, shapes: dict[str, tuple[int, int]]) -> Artifact:
    config = read_json(folder / "config.json")
    stored = config.get("quantization_config") or {}
    method = str(stored.get("quant_method", "float"))
    paths = weight_files(folder, str(folder))
    headers = read_headers(paths, str(folder))
    bits = _widths(method, stored)
    obstacles = _obstacles(stored, headers) if method == "awq" else ()
    named = config.get("architectures") or [None]
    readers = [name for name in _readers(method, stored, bits) if writes_text(str(named[0])) or name in _OF_ANY_CLASS]
    readers = [name for name in readers if not obstacles or name not in SERVERS]
    return Artifact(
        path=folder.relative_to(directory).as_posix(),
        format=method,
        label=_label(method, bits, config, headers, folder != directory),
        files=tuple(path.relative_to(directory).as_posix() for path in paths),
        size=sum(path.stat().st_size for path in paths),
        bits=bits,
        bits_per_weight=_bits_per_weight(method, bits, headers, shapes),
        readers=tuple(readers),
        slow=tuple(name for name in readers if name in SERVERS and _is_slow(method, stored, bits)),
        obstacles=obstacles,
        config=config,
    )


def _widths(method: str, stored: dict[str, Any]) -> tuple[int, ...]:
    groups = stored.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, dict):
        found = [(group.get("weights") or {}).get("num_bits") for group in groups.values() if isinstance(group, dict)]
    else:
        others = [*dict(stored.get("overrides") or {}).values(), *dict(stored.get("dynamic") or {}).values()]
        first = stored.get("bits", stored.get("w_bit"))
        found = [first, *(other.get("bits", first) for other in others if isinstance(other, dict))]
    return tuple(sorted({bits for bits in found if isinstance(bits, int)}))


def _label(method: str, bits: tuple[int, ...], config: dict[str, Any], headers: Headers, exported: bool) -> str:
    if method == "float":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or next(iter(headers.values())).dtype)
        return f"Dequantized, {dtype}" if exported else dtype
    width = f", {' and '.join(map(str, bits))} bit{'s' * (bits != (1,))}" if bits else ""
    return f"{_NAMES.get(method, method)}{width}"


def _readers(method: str, stored: dict[str, Any], bits: tuple[int, ...]) -> tuple[str, ...]:
    """Programs that read what is stored so, as README.md's table of targets has it."""
    if method == "awq" and (bits != (4,) or str(stored.get("version", "gemm")).lower() != "gemm"):
        return ("awq-hf",)
    if method == "compressed-tensors":
        return SERVERS if {*bits} <= {4, 8} else ("compressed-tensors",)
    if method == "gptq" and stored.get("sym") and {*bits} <= {4, 8}:
        return ("vLLM", *_READERS["gptq"])
    return _READERS.get(method, ())


def _is_slow(method: str, stored: dict[str, Any], bits: tuple[int, ...]) -> bool:
    group = stored.get("group_size", stored.get("q_group_size"))
    symmetric = stored.get("zero_point", not stored.get("sym", False)) is False
    return method == "awq" and len(bits) == 1 and group in GROUP_SIZES and slow_as_awq(QuantSpec(bits[0], group, symmetric))


def _obstacles(stored: dict[str, Any], headers: Headers) -> tuple[str, ...]:
    """What other programs stumble over, by the skip list; see skip_list.caveats."""
    quantized = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    left = [name.removesuffix(".weight") for name, info in headers.items() if name.endswith(".weight") and len(info.shape) == 2]
    entries = [entry for entry in stored.get("modules_to_not_convert") or () if isinstance(entry, str)]
    return tuple(caveats(entries, left, quantized))


def _bits_per_weight(method: str, bits: tuple[int, ...], headers: Headers, shapes: dict[str, tuple[int, int]]) -> float | None:
    """Stored bits for each weight of the blocks' Linears, with scales and zero points; None where their number is not known."""
    suffix = _PACKED.get(method, "weight")
    stored: Counter[str] = Counter()
    weights: dict[str, int] = {}
    for name, info in headers.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS and method in _PACKED:
            stored[module] += _nbytes(info.dtype, info.shape)
        elif part == "weight" and len(info.shape) == 2 and any(piece.isdigit() for piece in module.split(".")):
            stored[module], weights[module] = _nbytes(info.dtype, info.shape), math.prod(info.shape)
        if part == suffix and method in _PACKED:
            if module in shapes:
                weights[module] = math.prod(shapes[module])
            elif len(bits) == 1 and 32 % bits[0] == 0:
                weights[module] = math.prod(info.shape) * int(info.dtype[1:]) // bits[0]
            else:
                return None
    total = sum(weights.values())
    return 8 * sum(size for module, size in stored.items() if module in weights) / total if total else None


def _nbytes(dtype: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * int((re.search(r"\d+", dtype) or ["8"])[0]) // 8


def _gguf_files(directory: Path) -> list[list[Path]]:
    """Parts of one model together."""
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("*.gguf")):
        if not path.name.startswith("mmproj"):
            found.setdefault(_SHARD.sub("", path.name), []).append(path)
    return list(found.values())


def _gguf(directory: Path, files: list[Path]) -> Artifact:
    from gguf import LlamaFileType  # not above: importing awq_hf does without it

    from awq_hf.model_cards.gguf_header import read_header

    headers = [read_header(path) for path in files]
    tensors = [tensor for header in headers for tensor in header.tensors]
    inside: Counter[str] = Counter()  # bytes of the blocks' types, which the file is named for
    for tensor in tensors:
        inside[tensor.kind.name] += tensor.nbytes if tensor.name.startswith("blk.") else 0
    weights = sum(tensor.weights for tensor in tensors)
    known = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind for kind in LlamaFileType}
    parts = [part.upper() for part in re.split(r"[-.]", _SHARD.sub("", files[0].name))]
    tag = next((part for part in reversed(parts) if part in known), None)
    said = next((name for name, kind in known.items() if kind == headers[0].file_type), None)
    return Artifact(
        path=files[0].name,
        format="gguf",
        label=f"GGUF {tag or said or inside.most_common(1)[0][0]}" if inside else "GGUF",
        files=tuple(path.name for path in files),
        size=sum(path.stat().st_size for path in files),
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors) / weights if weights else None,
        tag=tag,
        readers=("llama.cpp", "Ollama"),
        made=headers[0].description,
        template=headers[0].chat_template,
    )
