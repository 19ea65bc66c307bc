"""Parquet files and datasets: the rows that are read, the order they are drawn in, and what is said when they cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from awq_hf.calibration import tables
from awq_hf.calibration.records import Document
from awq_hf.calibration.sources import open_source

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def read(given: Any, seed: int | None = None, count: int | None = None) -> list[Document]:
    documents = open_source(given, "calibration").documents(seed, "calibration")
    return [document for (_, document), _ in zip(documents, range(count or 10**6), strict=False)]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("wikitext", ("wikitext", None, None)),
        ("wikitext:wikitext-2-raw-v1", ("wikitext", "wikitext-2-raw-v1", None)),
        ("wikitext:wikitext-2-raw-v1:test", ("wikitext", "wikitext-2-raw-v1", "test")),
        ("HuggingFaceH4/ultrachat_200k::train_sft", ("HuggingFaceH4/ultrachat_200k", None, "train_sft")),
        ("user/v1.5", ("user/v1.5", None, None)),
        ("a:b:c:d", None),
        ("a/b/c", None),
        ("notes.txt", None),
        ("notes.JSONL:train", None),
        ("a text", None),
        ("", None),
        (":a", None),
        ("csv", None),
        ("text::train", None),
    ],
)
def test_names(given: str, parts: Any) -> None:
    assert tables.parse_name(given) == parts


def test_a_directory_may_have_any_name(tmp_path: Path) -> None:
    assert tables.parse_name(f"{tmp_path}::test") == (str(tmp_path), None, "test")
    assert tables.parse_name(f"{tmp_path}/no::test") is None


def test_messages_of_others_come_to_one_line() -> None:
    with pytest.raises(ValueError, match=r"^it: a b$"), tables._one_sentence("it"):
        raise RuntimeError("a\n  b\n")


def test_without_the_packages_it_is_said_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for given, said in ((tmp_path, "datasets"), (tmp_path / "a.parquet", "pyarrow"), ("wikitext", "no such file.*datasets")):
        with pytest.raises(ImportError, match=rf'{Path(given).name}.*{said}: pip install "awq-hf\[data\]"'):
            read(given)


# With the packages


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package `datasets`, which leaves nothing behind."""
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def table(packages: Any, path: Path, rows: list[Any], per_group: int = 10) -> Path:
    packages.Dataset.from_list(rows).to_parquet(path, batch_size=per_group)
    return path


def test_a_parquet_file(packages: Any, tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "text": None}, {"messages": None, "text": "a"}, {"messages": None, "text": None}]
    path = table(packages, tmp_path / "a.parquet", rows)
    assert read(path) == [CHAT, "a", ""] and open_source(str(path), "").name == "a.parquet"


def test_rows_of_a_parquet_file_are_drawn_from_all_of_it(packages: Any, tmp_path: Path) -> None:
    path = table(packages, tmp_path / "a.parquet", [{"text": str(i)} for i in range(640)], per_group=64)
    drawn = [int(str(text)) for text in read(path, 1)]
    assert sorted(drawn) == list(range(640)) and read(path) == [str(i) for i in range(640)]
    assert {i // 64 for i in drawn[:40]} == set(range(10)), "some rows of every group come first"
    assert drawn[:4] != sorted(drawn[:4]) and read(path, 1) == [str(i) for i in drawn] != read(path, 2)


def test_a_directory(packages: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": str(i)}) for i in range(30)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "unseen"}))
    assert read(tmp_path) == [str(i) for i in range(30)] and open_source(tmp_path, "").name == tmp_path.name
    assert sorted(map(str, read(tmp_path, 1))) == sorted(map(str, range(30))) and read(tmp_path, 1) == read(tmp_path, 1) != read(
        tmp_path, 2
    )
    assert open_source(f"{tmp_path}::test", "").name == f"{tmp_path.name}::test"
    assert read(f"{tmp_path}::test") == read(f"{tmp_path}:default:test") == ["unseen"]
    for given, said in ((f"{tmp_path}::dev", "dev.*train.*test"), (f"{tmp_path}:test", "'test' not found.*default")):
        with pytest.raises(ValueError, match=rf"calibration '{given}' .*cannot be loaded as a dataset .name\[:config\].*{said}"):
            read(given)


def test_a_directory_of_parquet_files(packages: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for n in range(2):
        table(packages, tmp_path / "data" / f"train-0000{n}-of-00002.parquet", [{"messages": CHAT}] * 3)
    assert read(tmp_path) == [CHAT] * 6


def test_objects(packages: Any, tmp_path: Path) -> None:
    data = packages.Dataset.from_list([{"text": str(i)} for i in range(30)])
    assert read(data) == [str(i) for i in range(30)] != read(data, 1) and open_source(data, "").name == "Dataset of 30"
    assert read(data.to_iterable_dataset(), 1) == read(data), "a stream comes in its own order"
    with pytest.raises(ValueError, match="calibration is a DatasetDict with the keys train; give one of its values"):
        read(packages.DatasetDict(train=data))


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (["test", "train"], "train"),
        (["train_sft", "train"], "train"),
        (["test_sft", "train_sft", "train_gen"], "train_sft"),
        (["validation"], "validation"),
        (["validation", "test"], None),
    ],
)
def test_the_split_that_is_taken(splits: list[str], chosen: str | None) -> None:
    if chosen is not None:
        assert tables._default_split(splits, "it") == chosen
        return
    with pytest.raises(ValueError, match=r"it has the splits validation, test; choose one: name\[:config\]\[:split\]"):
        tables._default_split(splits, "it")


class Stream(list[dict[str, str]]):
    """Looks like a datasets.IterableDataset that counts the rows it is asked for."""

    read = 0
    features = ("text",)

    def decode(self, enable: bool) -> Stream:
        assert not enable
        return self

    def shuffle(self, seed: int, buffer_size: int) -> Stream:
        assert buffer_size == tables.SHUFFLED
        return Stream([{"text": f"shuffled with {seed}"}])

    def __iter__(self) -> Any:
        for row in super().__iter__():
            Stream.read += 1
            yield row


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("wikitext:wikitext-2-raw-v1:test", ("wikitext", "wikitext-2-raw-v1", "test")),
        ("a/b::test", ("a/b", None, "test")),
        ("a/b", ("a/b", None, None)),
    ],
)
def test_a_dataset_on_the_hub_is_streamed(given: str, asked: Any, packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, calls = Stream([{"text": str(i)} for i in range(100)]), []

    def load(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        calls.append((name, config, split))
        assert streaming
        return stream if split else {"train": stream}

    monkeypatch.setattr(packages, "load_dataset", load)
    monkeypatch.setattr(Stream, "read", 0)
    assert read(given, count=3) == ["0", "1", "2"] and Stream.read <= 4
    assert calls == [asked] and open_source(given, "").name == given
    assert read(given, seed=7) == ["shuffled with 7"]


def test_pictures_are_not_decoded(packages: Any, tmp_path: Path) -> None:
    rows = packages.Dataset.from_list([{"image": {"bytes": b"no picture", "path": None}, "text": "a"}])
    rows.cast_column("image", packages.Image()).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path) == read(tmp_path / "a.parquet") == ["a"]


def test_one_sentence_for_what_cannot_be_read(packages: Any, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but nothing else")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "fields").mkdir()
    (tmp_path / "fields" / "a.jsonl").write_text('{"q": "a", "r": "b"}')
    for given, said in (
        (tmp_path / "a.parquet", "a.parquet' is not a parquet file: "),
        (tmp_path / "empty", "empty' cannot be loaded as a dataset .*: .*doesn't contain any data files"),
        (tmp_path / "latin", "latin' cannot be read: 'utf-8' codec can't decode"),
        (tmp_path / "fields", "fields, row 0. has the fields q, r; a record is read from"),
        ("no-such/dataset", r"calibration 'no-such/dataset' \(no such file, so a dataset's name\) cannot be loaded as a dataset"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            read(given)
        assert "\n" not in str(error.value)
