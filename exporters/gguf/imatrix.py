"""llama.cpp's importance matrices: the mean square of what each column of a weight is multiplied with.

Two formats. The newer is a GGUF file of general.type "imatrix" with, for every weight NAME, the tensors NAME.in_sum2 (sums of squares, [k]
or [experts, k]) and NAME.counts (of tokens, one for each expert). The older, usually .dat, is little-endian:

    int32 entries, then for each: int32 length, name, int32 calls, int32 values, float32 sums of as many values (experts lie end to end)
    int32 chunks, int32 length, name of the text        (both may be missing)

Its counts are of chunks, and of one size for all experts. Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from awq_hf.exporters.gguf.blocks.search import Floats
from awq_hf.output import check_output, whole

MAGIC = b"GGUF"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Entry:
    """mean: of squared inputs, float32 [k] or [experts, k]; ones for experts that no token reached. counts: of tokens (of chunks, where the
    file is of the older format), int64 [1] or [experts].
    """

    mean: Floats
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Imatrix:
    """entries: by llama.cpp's name of the weight ("blk.0.attn_q.weight"). datasets: names of texts. chunks, chunk_size: how many windows,
    of how many tokens, were run; chunk_size is 0 where the file does not say.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0

    def importance(self, name: str, shape: tuple[int, ...]) -> Floats | None:
        """For a weight [out, k] float32 [k], for experts [experts, out, k] float32 [experts, k], or None where nothing is known of it.

        Raises ValueError where the entry is of a weight of another shape.
        """
        if name not in self.entries:
            return None
        wanted, mean = (*shape[:-2], shape[-1]), self.entries[name].mean
        if mean.size != int(np.prod(wanted)):
            raise ValueError(
                f"the importance matrix has {mean.size} values for {name} {list(shape)}, not {list(wanted)}: it is another model's"
            )
        return mean.reshape(wanted)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Either format, told apart by the first bytes. Raises ValueError for a file that is damaged or something else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no importance matrix {path}; give the file that llama-imatrix or --save-imatrix wrote")
    with Path(path).open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    with np.errstate(invalid="ignore"):  # sums that are no numbers are refused below
        found = _read_gguf(path) if is_gguf else _read_dat(path)
    if not found.entries:
        _refuse(path, "it has no entries")
    for name, entry in found.entries.items():
        _check(name, entry, path)
    return found


def write_imatrix(path: str | os.PathLike[str], imatrix: Imatrix, overwrite: bool = False) -> None:
    """The newer format where the name ends in .gguf, the older otherwise; the file is there whole or not at all.

    Raises ValueError for entries that cannot be written, FileExistsError, and OSError for a full disk.
    """
    if not imatrix.entries:
        raise ValueError(f"{path}: there is nothing to write, the importance matrix has no entries")
    for name, entry in imatrix.entries.items():
        _check(name, entry, path)
    target = check_output(path, overwrite)
    with whole(target) as partial:
        (_write_gguf if target.suffix == ".gguf" else _write_dat)(partial, imatrix)


def _refuse(path: str | os.PathLike[str], why: str) -> NoReturn:
    raise ValueError(f"{path} is not a whole importance matrix of llama.cpp: {why}")


def _check(name: str, entry: Entry, path: str | os.PathLike[str]) -> None:
    mean, counts = entry.mean, entry.counts
    if mean.size == 0 or mean.ndim not in (1, 2) or counts.shape != mean.shape[:-1] + (1,) * (mean.ndim == 1):
        _refuse(path, f"{name} has {list(mean.shape)} values and {list(counts.shape)} counts")
    if not (np.isfinite(mean) & (mean >= 0)).all():
        _refuse(path, f"{name} has a mean square of {mean[~(np.isfinite(mean) & (mean >= 0))][0]}")
    if counts.min() < 0:
        _refuse(path, f"{name} has a count of {counts.min()}")


def _per_row(mean: Floats, counts: NDArray[Any]) -> NDArray[np.float32]:
    """counts as float32, in a shape that multiplies mean."""
    return counts.astype(np.float32).reshape((*counts.shape[: mean.ndim - 1], 1))


def _mean(sums: Floats, counts: NDArray[Any]) -> Floats:
    """Ones where there was nothing to count: every column matters as much as another."""
    n = _per_row(sums, counts)
    return np.where(n > 0, sums / np.maximum(n, 1), np.float32(1)).astype(np.float32)


# The newer format


class _Reader(GGUFReader):
    """gguf's reader takes what is behind the end of a file for empty, and may then count to 2^64."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> NDArray[Any]:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, override_order)


def _read_gguf(path: str | os.PathLike[str]) -> Imatrix:
    try:
        reader = _Reader(path)
        about = {key: found.contents() for key, found in reader.fields.items() if key.startswith(("general.", "imatrix."))}
        tensors = {tensor.name: (tensor.tensor_type.name, tensor.data.copy()) for tensor in reader.tensors}
        datasets = tuple(str(name) for name in about.get(DATASETS, ()) if name)
        chunks, chunk_size = int(about.get(CHUNKS, 0)), int(about.get(CHUNK_SIZE, 0))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        _refuse(path, str(error) or type(error).__name__)
    if about.get("general.type") != "imatrix":
        _refuse(path, f"its general.type is {about.get('general.type')!r}, not 'imatrix'")
    entries = {}
    for name in sorted({name.removesuffix(end) for end in (SUMS, COUNTS) for name in tensors if name.endswith(end)}):
        if not {name + SUMS, name + COUNTS} <= tensors.keys():
            _refuse(path, f"{name} has {SUMS if name + SUMS in tensors else COUNTS} alone")
        (sums_type, sums), (counts_type, counts) = tensors[name + SUMS], tensors[name + COUNTS]
        if {sums_type, counts_type} != {"F32"} or not counts.size or sums.size % counts.size or not np.isfinite(counts).all():
            _refuse(path, f"{name} has {sums_type} sums {list(sums.shape)} and {counts_type} counts {list(counts.shape)}")
        counts = counts.reshape(-1).round().astype(np.int64)
        sums = sums.reshape(-1) if counts.size == 1 else sums.reshape(counts.size, -1)
        entries[name] = Entry(_mean(sums, counts), counts)
    return Imatrix(entries, datasets, chunks, chunk_size)


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    writer = GGUFWriter(path, "imatrix")
    del writer.kv_data[0][gguf.Keys.General.ARCHITECTURE]  # this is no model
    writer.add_string(gguf.Keys.General.TYPE, "imatrix")
    writer.add_key_value(DATASETS, list(imatrix.datasets) or [""], GGUFValueType.ARRAY)  # llama.cpp wants the key to be there
    writer.add_uint32(CHUNKS, imatrix.chunks)
    writer.add_uint32(CHUNK_SIZE, imatrix.chunk_size)
    for name, entry in sorted(imatrix.entries.items()):
        n = _per_row(entry.mean, entry.counts)
        writer.add_tensor(name + SUMS, entry.mean * n)
        writer.add_tensor(name + COUNTS, n)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# The older format


def _read_dat(path: str | os.PathLike[str]) -> Imatrix:
    data, place = Path(path).read_bytes(), 0

    def take(size: int, what: str) -> bytes:
        nonlocal place
        if size < 0 or place + size > len(data):
            _refuse(path, f"it ends in {what}, which would take {size} bytes of the {len(data) - place} that are left")
        place += size
        return data[place - size : place]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    def text(what: str) -> str:
        raw = take(number(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            _refuse(path, f"{what} is not UTF-8: {raw[:16]!r}")

    entries: dict[str, Entry] = {}
    for i in range(number("the number of entries")):
        name = text(f"the name of entry {i}")
        calls, values = number(f"the count of {name}"), number(f"the length of {name}")
        if name in entries or calls < 0:
            _refuse(path, f"{name} comes twice" if name in entries else f"{name} has a count of {calls}")
        sums = np.frombuffer(take(4 * values, f"the values of {name}"), "<f4").astype(np.float32)
        # with a count of 0 llama.cpp takes sums as they are
        entries[name] = Entry(sums / np.float32(max(calls, 1)), np.array([calls]))
    chunks = number("the number of chunks") if place < len(data) else 0
    dataset = text("the name of the text") if place < len(data) else ""
    if place < len(data):
        _refuse(path, f"{len(data) - place} bytes follow its end")
    return Imatrix(entries, (dataset,) if dataset else (), chunks)


def _write_dat(path: Path, imatrix: Imatrix) -> None:
    """Counts become counts of chunks, rounded up. Only the last text is named, as llama.cpp does it."""
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in sorted(imatrix.entries.items()):
        calls = -(-int(entry.counts.max()) // max(1, imatrix.chunk_size))
        mean = np.where(_per_row(entry.mean, entry.counts) > 0, entry.mean, np.float32(1)) if calls else entry.mean
        sums = (mean * np.float32(max(calls, 1))).astype("<f4")
        parts += [struct.pack("<i", len(name.encode())), name.encode(), struct.pack("<ii", calls, sums.size), sums.tobytes()]
    dataset = (imatrix.datasets or ("",))[-1].encode()
    parts += [struct.pack("<ii", imatrix.chunks, len(dataset)), dataset]
    path.write_bytes(b"".join(parts))
