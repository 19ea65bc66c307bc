"""From a checkpoint to GGUF files, one tensor in memory at a time; they are there whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from awq_hf.exporters.gguf.architectures import find_architecture
from awq_hf.exporters.gguf.encode import Rows, encode, n_bytes, n_rows, rotary_order, select
from awq_hf.exporters.gguf.names import Place, Plan, add_shape, file_name, make_plan, origin
from awq_hf.exporters.gguf.rope import add_rope
from awq_hf.exporters.gguf.tokenizer import load_tokenizer, read_vocabulary
from awq_hf.exporters.gguf.types import assign, check_name, encoding, file_type
from awq_hf.output import check_writable
from awq_hf.spec import EncodedWeight
from awq_hf.wording import option

if TYPE_CHECKING:
    from awq_hf.exporters.checkpoint import Checkpoint

logger = logging.getLogger("awq_hf")

_CHUNK = 2**24  # values that are encoded at once: 64 MiB as float32


def export(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    encoded: Mapping[str, EncodedWeight] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    progress: bool = True,
    **options: Any,
) -> list[Path]:
    """Write `checkpoint` as a GGUF file and return its path; with shard_size, the paths of its parts.

    encoded: weights by their names in the checkpoint that are blocks already, and take the place of the checkpoint's. importance: E[x^2] of
    a matrix's input, [k] or [experts, k], by its name in the file. path, options: as `prepare` has them, which finds nearly all that can be
    wrong before anything is written; what a tensor holds may still not fit (ValueError), and a disk be full (OSError).
    """
    file = prepare(checkpoint, path, **options)
    with _new_files(file) as temporary:
        layout = _Layout(file.writer, temporary)
        with layout, _bar(layout.total, progress) as advance:
            for name, tensor in file.extra.items():
                layout.write(name, 0, encode(tensor, Type.F32), advance)
            for name, value in checkpoint.items(encoded):
                if (place := file.plan.places.get(name)) is not None:
                    shape, kind, columns = file.plan.shapes[place.target], file.types[place.target], (importance or {}).get(place.target)
                    try:
                        _write_tensor(layout, place, value, shape, kind, columns, advance)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error
                del value  # before the next is loaded
    return file.names


@dataclass(frozen=True)
class PreparedFile:
    """writer: knows all of the file but the tensors; extra: tensors that no checkpoint has, by name; names: of the files to be."""

    writer: GGUFWriter
    plan: Plan
    types: dict[str, Type]
    extra: Mapping[str, Tensor]
    target: Path
    names: list[Path]


def prepare(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    type: str = "auto",
    exact: bool = False,
    types: Mapping[str, Type] | None = None,
    tokenizer: Any = None,
    pre_tokenizer: str | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
) -> PreparedFile:
    """All that `export` does before it writes, for who has long work to do first.

    path: a file that ends in .gguf, or a directory for a file of the usual name, see `names.file_name`.
    type: of the matrices, or a mix, as `types.names` lists them; vectors are float32. auto: quantized weights keep their codes, in the
    smallest type that holds them, and float matrices become Q8_0. exact: quantized weights become the same weights bit for bit, and float
    matrices stay as they are. types: by name in the file, over what `type` says. tokenizer: where the one beside the model is not to be
    used. pre_tokenizer: llama.cpp's name for it, where it cannot be found out. metadata: general.* by name (name, version, license,
    quantized_by, ...), beyond what the model card says. shard_size: bytes of a part.
    Raises ValueError for what llama.cpp would not compute as transformers does, and FileExistsError.
    """
    config, wanted = checkpoint.config.get_text_config(), check_name(type)
    architecture = find_architecture(config)
    if config is not checkpoint.config:
        logger.warning("the file holds the text model of %s; images are not exported to GGUF", checkpoint.label)
    plan = plan_tensors(checkpoint)
    vocabulary = read_vocabulary(
        tokenizer or load_tokenizer(checkpoint.directory, checkpoint.label), plan.shapes["token_embd.weight"][0], config, pre_tokenizer
    )
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.arch], split_max_size=shard_size or 0)
    extra = add_rope(writer, config, architecture)
    add_shape(writer, config, architecture)
    vocabulary.add_to(writer)
    kinds = plan_types(checkpoint, plan, wanted, exact) | dict(types or {})
    for name, tensor in extra.items():
        _declare(writer, name, tuple(tensor.shape), Type.F32)
    for name, shape in plan.shapes.items():
        _declare(writer, name, shape, kinds[name])
    called = file_type(wanted, kinds)
    _describe(writer, checkpoint, called, metadata or {})
    target = Path(path) if Path(path).suffix == ".gguf" else Path(path) / file_name(checkpoint, encoding(called))
    return PreparedFile(writer, plan, kinds, extra, target, _free_names(writer, target, overwrite))


def plan_tensors(checkpoint: Checkpoint) -> Plan:
    """Where the checkpoint's tensors go in the file. Raises ValueError as `export` does."""
    config = checkpoint.config.get_text_config()
    return make_plan(((entry.name, entry.shape) for entry in checkpoint.names()), config, find_architecture(config))


def plan_types(checkpoint: Checkpoint, plan: Plan, wanted: str, exact: bool = False) -> dict[str, Type]:
    """The types of the file's tensors, as `types.assign` says."""
    kinds = {entry.name: entry.kind for entry in checkpoint.names()}
    return assign(plan, kinds, checkpoint.config.get_text_config(), wanted, exact)


def _declare(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: Type) -> None:
    writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes(shape, kind), raw_dtype=kind)


def _describe(writer: GGUFWriter, checkpoint: Checkpoint, kind: gguf.LlamaFileType, given: Mapping[str, str]) -> None:
    """Write general.*"""
    total, shared, expert, experts = writer.get_total_parameter_count()
    about = origin(checkpoint, total, given)
    about.size_label = about.size_label or gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    about.set_gguf_meta_model(writer)
    _check_name(str(about.name), writer)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _check_name(name: str, writer: GGUFWriter) -> None:
    """Raises ValueError for a name from which llama.cpp concludes that there are tokens, and fails to load the file when there are not."""
    tokens = set(writer.kv_data[0]["tokenizer.ggml.tokens"].value)
    missing = sorted({"</s>", "<unk>", "<s>", "<|endoftext|>"} - tokens)
    if missing and any(part in name.lower() for part in ("phi-3", "phi3")):
        raise ValueError(
            f"llama.cpp takes a model named {name!r} for Phi-3 and looks for tokens that this tokenizer lacks ({missing[0]}): "
            "give another name in metadata"
        )


class _Layout:
    """Open files of which everything but the tensors is written, and where each tensor goes."""

    def __init__(self, writer: GGUFWriter, target: Path) -> None:
        sizes = [{name: info.nbytes for name, info in part.items()} for part in writer.tensors]
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        self.files = writer.fout
        self.places: dict[str, tuple[int, int]] = {}  # number of the file, offset in it
        for number, (file, part) in enumerate(zip(self.files, sizes, strict=True)):
            end = file.tell()
            for name, size in part.items():
                start = GGUFWriter.ggml_pad(end, writer.data_alignment)
                self.places[name] = number, start
                end = start + size
            file.truncate(GGUFWriter.ggml_pad(end, writer.data_alignment))
        self.total = sum(size for part in sizes for size in part.values())

    def write(self, name: str, offset: int, data: np.ndarray[Any, Any], advance: Any) -> None:
        number, start = self.places[name]
        self.files[number].seek(start + offset)
        self.files[number].write(data.data)
        advance(data.nbytes)

    def __enter__(self) -> _Layout:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        for file in self.files:
            if failure is None:
                file.flush()
                os.fsync(file.fileno())  # before it gets its name
            file.close()


def _write_tensor(
    layout: _Layout, place: Place, value: Rows, shape: tuple[int, ...], kind: Type, importance: Tensor | None, advance: Any
) -> None:
    if place.heads:
        value = select(value, rotary_order(n_rows(value), place.heads))
    if place.offset:
        assert isinstance(value, Tensor)
        value = value.float() + place.offset
    width = shape[-1]
    start = (place.expert or 0) * n_bytes(shape[1:], kind)
    step = max(1, _CHUNK // width) if len(shape) > 1 else n_rows(value)
    for first in range(0, n_rows(value), step):
        data = encode(select(value, slice(first, first + step)), kind, _of_expert(importance, place))
        layout.write(place.target, start, data, advance)
        start += data.nbytes


def _of_expert(importance: Tensor | None, place: Place) -> Tensor | None:
    """[k] of [experts, k]."""
    return importance[place.expert] if importance is not None and importance.ndim == 2 and place.expert is not None else importance


def _free_names(writer: GGUFWriter, target: Path, overwrite: bool) -> list[Path]:
    """Of the files to write. Raises FileExistsError, and OSError where there is no room."""
    files: list[Path] = writer.format_shard_names(target)
    if not overwrite and (found := [file for file in files if file.exists()]):
        raise FileExistsError(f"{found[0]} exists; choose another name, or say {option('overwrite', True)}")
    parent = next(folder for folder in target.parents if folder.exists())
    check_writable(parent)
    needed, free = sum(info.nbytes for part in writer.tensors for info in part.values()), shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(f"{target.parent} has {free / 1e6:,.1f} MB free, {target.name} needs {needed / 1e6:,.1f} MB")
    return files


@contextmanager
def _new_files(file: PreparedFile) -> Iterator[Path]:
    """A name to write under first; renamed when all went well, removed when not."""
    target = file.target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.stem}.", dir=target.parent))
    try:
        yield partial / target.name
        for name in file.names:
            (partial / name.name).replace(name)
    except OSError as error:
        if error.filename is not None:  # what failed was opening another file
            raise
        raise OSError(error.errno, f"{target} could not be written ({error.strerror}); nothing of it is left") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("writing GGUF", total=total)
        yield lambda size: bar.advance(task, size)
