"""What the user gave, as a stream of documents: files, datasets by name, and data in memory."""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from awq_hf.calibration.records import Document, as_ids, is_message, to_document
from awq_hf.calibration.tables import SYNTAX, dataset, order, parquet, parse_name

SMALL = 4_000_000  # bytes of text; what is smaller is used whole and in its own order, of more, documents are drawn
PIECE = 8192  # bytes of a plain text file that are drawn together

Items = Callable[[int | None], Iterable[tuple[str, Any]]]  # seed -> (where it is, item); in their own order when the seed is None


@dataclass(frozen=True)
class Source:
    """Documents that can be read more than once, in their own order or in one drawn with a seed. size: bytes of text, where known."""

    name: str
    items: Items
    size: int | None = None

    def documents(self, seed: int | None, role: str) -> Iterator[tuple[str, Document]]:
        """(where it is, for messages; document) one after the other, read as they are asked for."""
        for place, item in self.items(seed):
            where = f"{role} ({self.name}{place and ', '}{place})"
            yield where, to_document(item, where)

    @property
    def is_small(self) -> bool:
        return self.size is not None and self.size < SMALL


def open_source(given: Any, role: str) -> Source:
    """The documents of a file, a directory, a dataset's name, or data in memory. `role` is what messages call it.

    Raises ValueError for what cannot hold documents, and ImportError where a package that reads it is not installed; whether
    every item does hold a document shows as it is read.
    """
    return _named(given, role) if isinstance(given, (str, os.PathLike)) else _in_memory(given, role)


def listed(items: Sequence[Any], name: str, size: int | None = None) -> Source:
    """What can be asked for its length and for any item."""
    return Source(name, lambda seed: ((f"item {i}", items[i]) for i in order(len(items), seed)), size)


def _in_memory(given: Any, role: str) -> Source:
    if isinstance(given, Tensor):
        given = [given] if given.ndim < 2 else list(given)
    if hasattr(given, "iterrows"):  # a pandas.DataFrame, which iterates over the names of its columns
        given = given.to_dict("records")
    if isinstance(given, (list, tuple)):
        return _list(given, role)
    kind = type(given).__name__
    if isinstance(given, Mapping):
        raise ValueError(f"{role} is a {kind} with the keys {', '.join(map(str, given)):.200}; give one of its values, or a list")
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):  # a datasets.Dataset
        return listed(given, f"{kind} of {len(given)}")
    if isinstance(given, Iterable):
        return Source(kind, lambda _seed: ((f"item {i}", item) for i, item in enumerate(given)))  # in the order it comes
    raise ValueError(f"{role} is {given!r:.60}; give a file, a dataset's name, or a list of texts, token tensors, records or conversations")


def _list(given: Sequence[Any], role: str) -> Source:
    if given and is_message(given[0]):
        given = [given]
    given = [as_ids(item) for item in given]
    kinds: dict[str, Any] = {"texts": str, "token tensors": Tensor, "records": Mapping, "conversations": (list, tuple)}
    name = next((name for name, kind in kinds.items() if all(isinstance(item, kind) for item in given)), None)
    if name is None:
        found = ", ".join(sorted({type(item).__name__ for item in given}))
        raise ValueError(
            f"{role} is a list of {found}; give strings, or 1-D integer tensors of token ids, or records (dicts), "
            "or conversations (lists of messages)"
        )
    size = sum(map(len, given)) if name == "texts" else 0 if name == "token tensors" else None  # tokens cost nothing to take whole
    return listed(given, f"{len(given)} {name}", size)


# Names


def _named(given: str | os.PathLike[str], role: str) -> Source:
    path = Path(given).expanduser()
    what = f"{role} {str(given)!r:.200}"
    try:
        found = path.exists()
    except (OSError, ValueError):  # too long for a name, or with NUL bytes: a text rather
        found = False
    if found and not path.is_dir():
        return _file(path, what)
    if found:
        return Source(path.resolve().name, dataset(str(path), None, None, what))
    if isinstance(given, str) and (parts := parse_name(given)):
        if Path(parts[0]).expanduser().is_dir():
            return Source(path.name, dataset(*parts, what))
        return Source(given, dataset(*parts, f"{what} (no such file, so a dataset's name)"))
    raise ValueError(
        f"{what} does not exist as a file or directory, and is not a dataset's name ({SYNTAX}) either; "
        "give the path of a text, .jsonl, .json or .parquet file, or a list of strings"
    )


def _file(path: Path, what: str) -> Source:
    size, suffix = path.stat().st_size, path.suffix.lower()
    if suffix == ".parquet":
        return Source(path.name, parquet(path, what))
    if suffix in (".jsonl", ".ndjson"):
        return Source(path.name, _json_lines(path, what), size)
    if suffix == ".json":
        return _json(path, what, size)
    return Source(path.name, _text(path, what), size)


# Text


def _text(path: Path, what: str) -> Items:
    """One document when it is read in order; pieces of it when they are drawn."""

    def items(seed: int | None) -> Iterator[tuple[str, str]]:
        if seed is None:
            yield "", _decoded(path.read_bytes(), what)
            return
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            ends = _piece_ends(data)
            for i in order(len(ends), seed):
                start = ends[i - 1] if i else 0
                yield f"byte {start}", _decoded(data[start : ends[i]], what, start)

    return items


def _piece_ends(data: mmap.mmap) -> array[int]:
    """Ends of pieces of at most PIECE bytes: the last end of a paragraph in the second half of each, else of a line, word or character."""
    ends = array("q")
    end = 0
    while (start := end) < len(data):
        end = min(start + PIECE, len(data))
        if end < len(data):
            found = ((data.rfind(mark, start + PIECE // 2, end), mark) for mark in (b"\n\n", b"\n", b" "))
            end = next((at + len(mark) for at, mark in found if at >= 0), end)
            end -= next((back for back in range(4) if data[end - back] & 0xC0 != 0x80), 0)  # not inside a character
        ends.append(end)
    return ends


def _decoded(data: bytes, what: str, offset: int = 0) -> str:
    """UTF-8 with or without a byte order mark, lines ending in "\\n"."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text ({error.reason} at byte {offset + error.start})") from None
    if "\0" in text:
        raise ValueError(f"{what} is not text: it holds NUL bytes, the first at byte {offset + data.index(0)}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


# JSON


def _json_lines(path: Path, what: str) -> Items:
    def items(seed: int | None) -> Iterator[tuple[str, Any]]:
        with path.open("rb") as file:
            starts = array("q", [0])
            for line in file:
                starts.append(starts[-1] + len(line))
            for i in order(len(starts) - 1, seed):
                file.seek(starts[i])
                text = _decoded(file.readline(), f"{what}, line {i + 1},")
                if text.strip():
                    yield f"line {i + 1}", _parsed(text, f"{what}, line {i + 1},")

    return items


def _json(path: Path, what: str, size: int) -> Source:
    """A list of documents, or a single one; or in spite of the name, one a line, as several programs write it."""
    text = _decoded(path.read_bytes(), what)
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return Source(path.name, _json_lines(path, what), size)
        raise ValueError(f"{what} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    items = content if isinstance(content, list) else [content]
    return listed([items] if items and is_message(items[0]) else items, path.name, size)


def _parsed(line: str, what: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON: {error.msg} in column {error.colno}") from None
