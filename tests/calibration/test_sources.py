"""From what the user gave to documents: files of every kind, data in memory, and one sentence for what cannot be read."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from awq_hf.calibration import sources, tables
from awq_hf.calibration.records import Document
from awq_hf.calibration.sources import open_source

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def read(given: Any, seed: int | None = None) -> list[Document]:
    return [document for _, document in open_source(given, "calibration").documents(seed, "calibration")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Plain text


@pytest.mark.parametrize(
    ("content", "text"),
    [("ä b\n\nc", "ä b\n\nc"), (b"\xef\xbb\xbfa", "a"), ("a\r\nb\rc\n", "a\nb\nc\n"), ("", ""), ("\ufeffa\ufeff", "a\ufeff")],
)
def test_a_text_file_is_one_document_as_python_reads_it(content: str | bytes, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "notes.txt", content)
    assert read(path) == read(str(path)) == [text] and open_source(path, "").name == "notes.txt"
    assert text == path.read_text(encoding="utf-8-sig")


def test_a_file_is_found_from_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "notes.txt", "a text")
    assert read("~/notes.txt") == read(Path("~/notes.txt")) == ["a text"]


def test_a_file_wins_over_a_dataset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "wikitext", "a text")
    assert tables.parse_name("wikitext") and read("wikitext") == ["a text"]


@given(st.text(st.sampled_from("a ä語\n\r"), max_size=300), st.integers(8, 40))
@example("語" * 50, 10)
@example("aä" * 50, 11)
@example("😀" * 50, 11)
def test_pieces_make_up_the_file_and_break_no_character(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", size)
        data = text.encode()
        ends = sources._piece_ends(data)  # type: ignore[arg-type]
        pieces = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert b"".join(pieces) == data and all(0 < len(piece) <= size for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == text


def test_pieces_end_where_the_text_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 12)
    data = b"one two\n\nthree33\nfour five six seveneightnineten\n\ntwelve\n\na\nbcd efg"
    ends = sources._piece_ends(data)  # type: ignore[arg-type]
    found = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert found == [b"one two\n\n", b"three33\n", b"four five ", b"six seveneig", b"htnineten\n\n", b"twelve\n\n", b"a\nbcd efg"]


def test_what_is_not_utf8_takes_no_longer_for_it() -> None:
    data = b"\x80" * 100_000
    assert list(sources._piece_ends(data))[-1] == len(data)  # type: ignore[arg-type]


def test_of_a_large_text_pieces_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 64)
    paragraphs = [f"Paragraph {i}: äöü, and so on.\n\n" for i in range(50)]
    path = write(tmp_path / "book.txt", "".join(paragraphs))
    drawn = read(path, 1)
    assert sorted(drawn, key=lambda text: int(str(text).split()[1][:-1])) == paragraphs != drawn  # each ends a piece of its own
    assert drawn == read(path, 1) != read(path, 2)
    (place, first), *_ = open_source(path, "").documents(1, "calibration")
    start = path.read_text(encoding="utf-8").encode().index(str(first).encode())
    assert place == f"calibration (book.txt, byte {start})"
    path.write_bytes(path.read_bytes()[:-20] + b"\xff" * 20)
    with pytest.raises(ValueError, match=f"book.txt' is not UTF-8 text .invalid start byte at byte {path.stat().st_size - 20}"):
        read(path, 1)


# JSON

LINES = [{"text": "a"}, {"messages": CHAT}, "b", CHAT, {"text": "ä"}]
DOCUMENTS: list[Any] = ["a", CHAT, "b", CHAT, "ä"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n \n\n"])
def test_a_document_a_line(name: str, end: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, "\ufeff" + (end.strip(" ") or "\n").join(json.dumps(line, ensure_ascii=False) for line in LINES) + end)
    assert read(path) == DOCUMENTS
    drawn = read(path, 0)
    assert sorted(map(str, drawn)) == sorted(map(str, DOCUMENTS)) and drawn != DOCUMENTS and drawn == read(path, 0)


@pytest.mark.parametrize(
    ("content", "documents"),
    [(LINES, DOCUMENTS), (LINES[0], ["a"]), (CHAT, [CHAT]), ([CHAT, CHAT], [CHAT, CHAT]), ([], []), ("a", ["a"])],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_holds_a_list_or_one(content: Any, documents: list[Any], indent: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(content, indent=indent))
    assert read(path) == documents


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_file_has_no_documents(name: str, content: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, content)) == []


def test_places_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    places = [place for place, _ in open_source(path, "").documents(None, "evaluation")]
    assert places == ["evaluation (a.jsonl, line 1)", "evaluation (a.jsonl, line 3)"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a.jsonl', line 3, is not JSON: Expecting value in column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "a.jsonl', line 2, is not UTF-8 text"),
        ("a.jsonl", '{"text": "a"}\n{"q": "a", "r": "b"}', r"\(a.jsonl, line 2\) has the fields q, r; a record is read from"),
        ("a.jsonl", "3\n", r"\(a.jsonl, line 1\) is 3; give strings"),
        ("a.json", '[{"text": "a"},\n {"text": }]', "a.json' is not JSON: Expecting value in line 2, column 11"),
        ("a.json", '{"text": "a"}\n{"text": }', "a.json', line 2, is not JSON"),
        ("a.json", '{"rows": [1]}', r"\(a.json, item 0\) has the fields rows;"),
        ("a.json", b"\xff\xfe[\x00", "a.json' is not UTF-8 text"),
        ("a.txt", b"caf\xe9 au lait", r"a.txt' is not UTF-8 text \(.* at byte 3\)"),
        ("a.txt", b"ab\0c", "a.txt' is not text: it holds NUL bytes, the first at byte 2"),
    ],
)
def test_a_broken_file_is_one_sentence(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and error.value.__cause__ is None


# Names


@pytest.mark.parametrize("name", ["no/such/file.txt", "missing.jsonl", "corpus.txt", "/no/such", "a text, given as it is. " * 300, "a\0b"])
def test_neither_a_file_nor_a_name(name: str) -> None:
    with pytest.raises(ValueError) as error:
        read(name)
    assert f"calibration {name!r:.30}"[:30] in str(error.value) and len(str(error.value)) < 500
    assert "does not exist as a file or directory, and is not a dataset's name (name[:config][:split]) either; give" in str(error.value)


def test_a_path_is_never_a_dataset() -> None:
    with pytest.raises(ValueError, match="does not exist as a file"):
        read(Path("wikitext"))


# In memory


@pytest.mark.parametrize(
    ("given", "documents", "name"),
    [
        (["a", "b"], ["a", "b"], "2 texts"),
        (("a",), ["a"], "1 texts"),
        ([{"text": "a"}, {"body": "b"}], ["a", "b"], "2 records"),
        ([UserDict(text="a")], ["a"], "1 records"),
        ([CHAT, CHAT], [CHAT, CHAT], "2 conversations"),
        (CHAT, [CHAT], "1 conversations"),
        ([{"from": "human", "value": "Hello"}], [CHAT[:1]], "1 conversations"),
        ((text for text in ("a", "b")), ["a", "b"], "generator"),
        ({"a": 1}.keys(), ["a"], "dict_keys"),
    ],
)
def test_in_memory(given: Any, documents: list[Any], name: str) -> None:
    source = open_source(given, "calibration")
    assert [document for _, document in source.documents(None, "")] == documents and source.name == name


class Table:
    """Looks like a datasets.Dataset: rows by their number."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < 40:
            raise IndexError(i)
        return {"text": str(i)}


class Frame:
    """Looks like a pandas.DataFrame."""

    def __iter__(self) -> Any:
        return iter(["text"])

    def iterrows(self) -> Any: ...

    def to_dict(self, kind: str) -> Any:
        return [{"text": kind}]


def test_what_looks_like_a_table() -> None:
    assert read(Table()) == [str(i) for i in range(40)]
    assert read(Table(), 3) == read(Table(), 3) != read(Table(), 4) and sorted(read(Table(), 3), key=lambda i: int(str(i))) == read(Table())
    assert open_source(Table(), "").name == "Table of 40" and not open_source(Table(), "").is_small
    assert read(Frame()) == ["records"]


def test_what_is_small() -> None:
    """Only that is taken whole and in its order: its size has to be known."""
    assert open_source(["a" * 3_999_999], "").is_small and not open_source(["a" * 3_999_999, "b"], "").is_small
    assert open_source(torch.zeros(10_000_000, dtype=torch.int64), "").is_small
    assert not open_source([{"text": "a"}], "").is_small and not open_source(iter("ab"), "").is_small


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_small_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / name, '["a"]')
    assert open_source(path, "").is_small
    monkeypatch.setattr(sources, "SMALL", 5)
    assert not open_source(path, "").is_small


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": [], "test": []}, "calibration is a dict with the keys train, test; give one of its values, or a list"),
        (7, "calibration is 7; give a file, a dataset's name, or a list of texts"),
        ([1, 2], "calibration is a list of int; give strings, or 1-D integer tensors"),
        (["a", CHAT], "calibration is a list of list, str; give"),
        ([CHAT[0], {"text": "a"}], "message 1 has the fields text"),
        (torch.tensor(3), r"item 0\) has shape \(\)"),
    ],
)
def test_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(given)
