"""Importance matrices in both of llama.cpp's formats."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from awq_hf.exporters.gguf.imatrix import Entry, Imatrix, read_imatrix, write_imatrix

RNG = np.random.default_rng(0)
ATTENTION = Entry(RNG.random(64, np.float32), np.array([1024]))
EXPERTS = Entry(RNG.random((3, 32), np.float32), np.array([700, 0, 324]))
EXPERTS.mean[1] = 1  # no token reached it
GIVEN = Imatrix({"blk.0.attn_q.weight": ATTENTION, "blk.0.ffn_up_exps.weight": EXPERTS}, ("wiki.txt", "наш.txt"), 2, 512)


def entry_bytes(name: bytes, calls: int, values: list[float]) -> bytes:
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values)) + struct.pack(f"<{len(values)}f", *values)


DAT = struct.pack("<i", 2) + entry_bytes(b"a.weight", 4, [2.0, 8.0]) + entry_bytes(b"b", 1, [0.5]) + struct.pack("<ii", 7, 3) + b"t.x"


def assert_same(found: Imatrix, wanted: Imatrix) -> None:
    assert found.entries.keys() == wanted.entries.keys()
    for name, entry in wanted.entries.items():
        np.testing.assert_allclose(found.entries[name].mean.reshape(entry.mean.shape), entry.mean, rtol=3e-7)


def test_new_format_round_trip(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", GIVEN)
    found = read_imatrix(tmp_path / "i.gguf")
    assert_same(found, GIVEN)
    assert (found.datasets, found.chunks, found.chunk_size) == (GIVEN.datasets, 2, 512)
    for name, entry in GIVEN.entries.items():
        assert found.entries[name].mean.shape == entry.mean.shape and found.entries[name].counts.tolist() == entry.counts.tolist()


def test_new_format_is_as_llama_cpp_writes_it(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", GIVEN)
    reader = GGUFReader(tmp_path / "i.gguf")
    about = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    wanted = {"imatrix.datasets": list(GIVEN.datasets), "imatrix.chunk_count": 2, "imatrix.chunk_size": 512}
    assert about == {"general.type": "imatrix", **wanted}
    tensors = {t.name: t for t in reader.tensors}
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    sums, counts = tensors["blk.0.ffn_up_exps.weight.in_sum2"], tensors["blk.0.ffn_up_exps.weight.counts"]
    assert sums.shape.tolist() == [32, 3] and counts.shape.tolist() == [1, 3]  # llama.cpp's order: columns first
    assert counts.data.reshape(-1).tolist() == [700, 0, 324]
    np.testing.assert_allclose(sums.data, EXPERTS.mean * np.array([[700], [0], [324]]), rtol=1e-6)
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight.in_sum2"].data, ATTENTION.mean * 1024, rtol=1e-6)


def test_old_format_by_hand(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(DAT)
    found = read_imatrix(tmp_path / "i.dat")
    assert found.entries["a.weight"].mean.tolist() == [0.5, 2.0] and found.entries["b"].mean.tolist() == [0.5]
    assert found.entries["a.weight"].counts.tolist() == [4]
    assert (found.datasets, found.chunks, found.chunk_size) == (("t.x",), 7, 0)
    write_imatrix(tmp_path / "again.dat", found)
    assert (tmp_path / "again.dat").read_bytes() == DAT
    (tmp_path / "short.dat").write_bytes(DAT[:-11])  # llama.cpp takes files without what follows the entries, too
    assert read_imatrix(tmp_path / "short.dat").datasets == ()


def test_old_format_round_trip(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.imatrix", GIVEN)
    found = read_imatrix(tmp_path / "i.imatrix")
    assert_same(found, GIVEN)
    assert found.datasets == ("наш.txt",) and found.chunks == 2
    assert [entry.counts.tolist() for entry in found.entries.values()] == [[2], [2]]  # chunks of 512, rounded up


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_experts_that_no_token_reached_count_alike(tmp_path: Path, name: str) -> None:
    mean = np.array([[1, 2], [0, 0], [3, 4]], np.float32)
    write_imatrix(tmp_path / name, Imatrix({"a": Entry(mean, np.array([2, 0, 8]))}, chunk_size=4))
    found = read_imatrix(tmp_path / name).importance("a", (3, 5, 2))
    assert found is not None and found.tolist() == [[1, 2], [1, 1], [3, 4]]


def test_importance_of_a_weight() -> None:
    assert GIVEN.importance("blk.7.attn_q.weight", (10, 64)) is None
    found = GIVEN.importance("blk.0.attn_q.weight", (10, 64))
    assert found is not None and found.shape == (64,)
    flat = Imatrix({"e": Entry(EXPERTS.mean.reshape(-1), np.array([2]))})  # as the older format has it
    experts = flat.importance("e", (3, 10, 32))
    assert experts is not None and np.array_equal(experts, EXPERTS.mean)
    with pytest.raises(ValueError, match=r"has 64 values for blk.0.attn_q.weight \[10, 96\], not \[96\]: it is another model's"):
        GIVEN.importance("blk.0.attn_q.weight", (10, 96))


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    """Where the file says how long it is. The older format may end behind its entries, or behind the number of chunks."""
    small = Imatrix({"blk.0.a.weight": Entry(np.ones(4, np.float32), np.array([512]))}, ("t",), 1, 512)
    write_imatrix(tmp_path / name, small)
    data, path = (tmp_path / name).read_bytes(), tmp_path / "cut"
    optional = {len(data) - 9, len(data) - 5} if name == "i.dat" else set()
    last = len(data) - 28 if name == "i.gguf" else len(data)  # behind it there is padding
    for size in sorted(set(range(last)) - optional):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="cut is not a whole importance matrix of llama.cpp: it ends "):
            read_imatrix(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    count = struct.pack("<i", 1)
    for data, message in {
        struct.pack("<i", 0): "it has no entries",
        count + entry_bytes(b"a", 1, [float("nan")]): "a has a mean square of nan",
        count + entry_bytes(b"a", 1, [float("inf")]): "a has a mean square of inf",
        count + entry_bytes(b"a", 1, [-1.0]): "a has a mean square of -1.0",
        count + entry_bytes(b"a", -1, [1.0]): "a has a count of -1",
        count + entry_bytes(b"a", 1, []): "a has [0] values",
        count + entry_bytes(b"\xff", 1, [1.0]): "the name of entry 0 is not UTF-8",
        struct.pack("<i", 2) + 2 * entry_bytes(b"a", 1, [1.0]): "a comes twice",
        count + struct.pack("<i", -5): "it ends in the name of entry 0, which would take -5 bytes",
        struct.pack("<i", 2**31 - 1) + entry_bytes(b"a", 1, [1.0]): "it ends in the name of entry 1",
        DAT + b"x": "1 bytes follow its end",
    }.items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            read_imatrix(path)
        assert message in str(error.value)


def write_gguf(path: Path, kind: str, **tensors: NDArray[Any]) -> None:
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", kind)
    for name, data in tensors.items():
        writer.add_tensor(name.replace("_", ".", 1), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    ones, path = np.ones(4, np.float32), tmp_path / "i.gguf"
    cases: list[tuple[str, dict[str, NDArray[Any]], str]] = [
        ("model", {"a_in_sum2": ones, "a_counts": ones[:1]}, "its general.type is 'model', not 'imatrix'"),
        ("imatrix", {"a_in_sum2": ones}, "a has .in_sum2 alone"),
        ("imatrix", {"a_counts": ones}, "a has .counts alone"),
        ("imatrix", {"a_in_sum2": ones, "a_counts": ones[:3]}, "a has F32 sums [4] and F32 counts [3]"),
        ("imatrix", {"a_in_sum2": ones.astype(np.float16), "a_counts": ones[:1]}, "a has F16 sums [4]"),
        ("imatrix", {"a_in_sum2": ones * np.inf, "a_counts": ones[:1]}, "a has a mean square of inf"),
        ("imatrix", {"a_in_sum2": ones, "a_counts": -ones[:1]}, "a has a count of -1"),
        ("imatrix", {"a_in_sum2": ones, "a_counts": ones[:1] * np.nan}, "a has F32 sums [4] and F32 counts [1]"),
        ("imatrix", {"other": ones}, "it has no entries"),
    ]
    for kind, tensors, message in cases:
        write_gguf(path, kind, **tensors)
        with pytest.raises(ValueError) as error:
            read_imatrix(path)
        assert message in str(error.value)
    write_gguf(path, "imatrix", a_in_sum2=2 * ones, a_counts=2 * ones[:1], a_in_sum=ones)  # newer still: sums beside sums of squares
    assert read_imatrix(path).entries["a"].mean.tolist() == [1, 1, 1, 1]


def test_nothing_is_written_of_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    with pytest.raises(ValueError, match="no entries"):
        write_imatrix(path, Imatrix())
    with pytest.raises(ValueError, match=r"a has \[2, 4\] values and \[1\] counts"):
        write_imatrix(path, Imatrix({"a": Entry(np.ones((2, 4), np.float32), np.array([1]))}))
    assert list(tmp_path.iterdir()) == []
    write_imatrix(path, GIVEN)
    with pytest.raises(FileExistsError):
        write_imatrix(path, GIVEN)
    write_imatrix(path, Imatrix({"a": ATTENTION}), overwrite=True)
    assert list(read_imatrix(path).entries) == ["a"] and [p.name for p in tmp_path.iterdir()] == ["i.gguf"]
    assert read_imatrix(path).datasets == ()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no importance matrix .*none.dat; give the file"):
        read_imatrix(tmp_path / "none.dat")
