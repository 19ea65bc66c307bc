"""Rows of tables: parquet files by pyarrow, directories and datasets on the Hub by `datasets`. Both packages are optional."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SYNTAX = "name[:config][:split]"
SHUFFLED = 1000  # rows of a stream that are shuffled together
PARTS = 16  # of a row group, which are drawn one by one

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE = re.compile(r"\.(txt|text|md|jsonl?|ndjson|parquet|[ct]sv|log|html?|xml|ya?ml|pdf|docx?|gz|zst|xz|bz2|zip|py)$", re.IGNORECASE)
_FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "text", "xml"}  # what datasets takes for names, and reads the current directory

Rows = Callable[[int | None], Iterator[tuple[str, dict[str, Any]]]]


def order(count: int, seed: int | None) -> Sequence[int]:
    """0 ... count - 1, shuffled if there is a seed."""
    return range(count) if seed is None else torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def parse_name(given: str) -> tuple[str, str | None, str | None] | None:
    """(name, config, split) of name[:config][:split], where name is a directory or may be one on the Hub; None for other strings."""
    name, *rest = given.split(":")
    if len(rest) > 2 or not (_HUB_NAME.fullmatch(name) or (name and rest and len(name) < 1000 and Path(name).expanduser().is_dir())):
        return None
    if _FILE.search(name) or name in _FORMATS:
        return None
    config, split = [*(part or None for part in rest), None, None][:2]
    return name, config, split


def dataset(name: str, config: str | None, split: str | None, what: str) -> Rows:
    """Rows of a dataset, which are streamed: only as many are read as are asked for (and SHUFFLED more, where an order is drawn).

    Without a split, it is train, or the first whose name begins with train, or the only one. Drawn rows come from files in a
    drawn order, and in turn from a buffer of SHUFFLED rows. Raises ValueError with what `datasets` says when it cannot load it.
    """
    datasets = _optional("datasets", what)
    local = Path(name).expanduser()
    with _one_sentence(f"{what} cannot be loaded as a dataset ({SYNTAX})"):
        loaded = datasets.load_dataset(str(local) if local.is_dir() else name, config, split=split, streaming=True)
    if split is None:
        loaded = loaded[_default_split(list(loaded), what)]
    if loaded.features is not None:  # which are not known of every file before it is read
        loaded = loaded.decode(False)  # pictures and sound stay bytes

    def rows(seed: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
        with _one_sentence(f"{what} cannot be read"):
            yield from ((f"row {i}", row) for i, row in enumerate(loaded if seed is None else loaded.shuffle(seed, buffer_size=SHUFFLED)))

    return rows


def _default_split(splits: list[str], what: str) -> str:
    train = [split for split in sorted(splits, key=lambda name: name != "train") if split.startswith("train")]
    if not train and len(splits) != 1:
        raise ValueError(f"{what} has the splits {', '.join(splits)}; choose one: {SYNTAX}")
    return (train or splits)[0]


def parquet(path: Path, what: str) -> Rows:
    """Rows of a parquet file, in its own order or drawn: then a PARTS-th of every row group, in a drawn order, before more of any."""
    pyarrow = _optional("pyarrow.parquet", what)
    with _one_sentence(f"{what} is not a parquet file"):
        pyarrow.ParquetFile(path).close()

    def rows(seed: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
        parts = 1 if seed is None else PARTS
        with _one_sentence(f"{what} cannot be read"), pyarrow.ParquetFile(path) as file:
            for part in range(parts):
                for group in order(file.num_row_groups, seed):
                    chosen = order(file.metadata.row_group(group).num_rows, seed)[part::parts]
                    if chosen:
                        table = file.read_row_group(group)
                        yield from ((f"row {row} of row group {group}", table.slice(row, 1).to_pylist()[0]) for row in chosen)

    return rows


def _optional(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'{what} needs the package {package.split(".")[0]}: pip install "awq-hf[data]"') from error


@contextmanager
def _one_sentence(beginning: str) -> Iterator[None]:
    """Whatever another package raises, as a ValueError on one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{beginning}: {' '.join(str(error).split()):.500}") from error
