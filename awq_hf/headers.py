"""The headers of safetensors files: what a checkpoint holds, without reading a tensor of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    file: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Headers = dict[str, TensorInfo]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # as transformers names them


def weight_files(directory: Path, name: str) -> list[Path]:
    """The files that transformers would load. Raises ValueError when there are none; name: what the user calls the directory."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if index.is_file():
        return sorted({directory / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise ValueError(
            f"{name} holds pickled weights only ({pickled[0]}), which can run code when they are opened; "
            "load the model with transformers and save it again with save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{name} holds no weights: neither {WEIGHTS} nor {INDEX} is there")


def read_headers(files: Iterable[str | os.PathLike[str]], folder: str | None = None) -> Headers:
    """Name -> shape, dtype and file of every tensor in the files; no tensor is read.

    folder: where a local checkpoint lives. Raises ValueError for a file that is missing, damaged, no safetensors file, or outside
    of `folder`; for a tensor that is in two files; and for one that an index beside the files places where it is not.
    """
    found: Headers = {}
    paths = [Path(path) for path in files]
    for path in paths:
        _check_path(path, folder)
        for name, info in _read_header(path).items():
            if name in found:
                raise ValueError(f"{name} is in {found[name].file} and in {path}; which is meant cannot be known: remove the stale file")
            found[name] = info
    for index in paths[0].parent.glob("*.safetensors.index.json") if paths else ():
        _check_index(index, {path.name for path in paths}, found)
    return found


def _check_path(path: Path, folder: str | None) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a safetensors file, and pickled files are not opened, as they can run code; "
            "load it with the program that wrote it and save it as safetensors"
        )
    if folder and Path(folder).is_dir() and not _plain(path).is_relative_to(_plain(folder)):
        raise ValueError(f"the checkpoint's index names {path}, which is outside of {folder}: files elsewhere are not read")


def _plain(path: str | Path) -> Path:
    """The absolute path without `..`; links are not followed, as caches consist of them."""
    return Path(os.path.normpath(Path(path).absolute()))


def _read_header(path: Path) -> Headers:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return {name: TensorInfo(tuple(part.get_shape()), part.get_dtype(), str(path)) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); is it there, and was it downloaded to its end?") from error


def _check_index(index: Path, files: set[str], headers: Headers) -> None:
    try:
        weight_map = {name: Path(shard).name for name, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return  # not the index that transformers followed to the files: it could read that one
    if set(weight_map.values()) <= files:
        for name, shard in weight_map.items():
            if name not in headers or Path(headers[name].file).name != shard:
                raise ValueError(f"{index} places {name} in {shard}, which does not hold it: the files are not of one checkpoint")
