"""Calibration data: every token is used once, whatever the documents' lengths, and what cannot be used is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from awq_hf.calibration import data, sources
from awq_hf.calibration.data import Windows, embedded_texts, load_windows


class Bytes:
    """A tokenizer: 1 at the start of a document, then one token a UTF-8 byte, plus 2."""

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *(byte + 2 for byte in text.encode())]}


def real_tokens(windows: Windows) -> Tensor:
    return torch.cat([row[: int(n)] for row, n in zip(windows.input_ids, windows.lengths, strict=True)])


documents = st.lists(st.lists(st.integers(0, 99), max_size=40).map(torch.tensor).map(Tensor.long), min_size=1, max_size=8)


@given(documents, st.integers(2, 17))
def test_no_token_is_dropped_or_doubled(samples: list[Tensor], seq_len: int) -> None:
    tokens = torch.cat(samples)
    if len(tokens) < 2:
        with pytest.raises(ValueError, match=rf"holds {len(tokens)} tokens; at least 2 are needed"):
            load_windows(samples, None, seq_len)
        return
    windows = load_windows(samples, None, seq_len)
    assert torch.equal(real_tokens(windows), tokens) and windows.tokens == len(tokens)
    assert windows.input_ids.shape == (-(-len(tokens) // seq_len), seq_len)
    assert windows.lengths.tolist()[:-1] == [seq_len] * (len(windows.lengths) - 1), "only the last window may be shorter"


@given(documents, st.integers(2, 9), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_batches_hold_every_sampled_token_once(samples: list[Tensor], seq_len: int, size: int, hold_out: bool, seed: int) -> None:
    samples.append(torch.arange(2))
    windows = load_windows(samples, None, seq_len).sample(5, seed)
    batches = windows.batches(size, hold_out)
    seen = torch.cat([b.real_tokens(b.input_ids.reshape(-1, 1)) for b in batches])[:, 0]
    assert torch.equal(seen, real_tokens(windows))
    assert all(len(b.input_ids) <= size for b in batches)
    count = len(windows.lengths)
    held = sum(len(b.input_ids) for b in batches if b.held_out)
    assert held == (max(1, count // 8) if hold_out and count > 1 else 0)
    assert [b.held_out for b in batches] == sorted(b.held_out for b in batches), "the held-out slice is the last"


def test_a_batch_is_as_wide_as_its_longest_window_and_masks_the_rest() -> None:
    ids = torch.arange(1, 13).view(3, 4)
    windows = Windows(ids, torch.tensor([3, 2, 4]), "")
    first, second = windows.batches(2, hold_out=False)
    assert first.input_ids.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert first.mask is not None and first.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert second.mask is None and second.input_ids.tolist() == [[9, 10, 11, 12]]


def test_an_eighth_is_held_out() -> None:
    windows = Windows(torch.zeros(40, 4, dtype=torch.int64), torch.full((40,), 4), "")
    assert [(len(b.input_ids), b.held_out) for b in windows.batches(16)] == [(16, False), (16, False), (3, False), (5, True)]


def test_sampling_depends_on_the_seed_alone() -> None:
    windows = load_windows([torch.arange(400)], None, 4)
    torch.manual_seed(1)
    first = windows.sample(10, seed=3)
    torch.manual_seed(2)
    again, other = windows.sample(10, seed=3), windows.sample(10, seed=4)
    assert torch.equal(first.input_ids, again.input_ids) and first.sha256() == again.sha256()
    assert not torch.equal(first.input_ids, other.input_ids) and first.sha256() != other.sha256()
    assert len(windows.sample(1000, seed=0).lengths) == 100
    assert first.source == windows.source


def test_the_digest_is_of_real_tokens_only() -> None:
    ids = torch.arange(8).view(2, 4)
    short = Windows(ids, torch.tensor([4, 2]), "a")
    padded_otherwise = Windows(torch.cat([ids[:1], torch.tensor([[4, 5, 99, 99]])]), torch.tensor([4, 2]), "b")
    assert short.sha256() == padded_otherwise.sha256()
    assert short.sha256() != Windows(ids, torch.tensor([4, 3]), "a").sha256()


def test_texts_are_tokenized_with_their_special_tokens_and_packed() -> None:
    windows = load_windows(["ab", "  ", "c"], Bytes(), 4)
    assert real_tokens(windows).tolist() == [1, 99, 100, 1, 101] and windows.source == "3 texts"


def test_a_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("ä b", encoding="utf-8")
    for given_as in (path, str(path)):
        windows = load_windows(given_as, Bytes(), 16)
        assert real_tokens(windows).tolist() == [1, *(byte + 2 for byte in "ä b".encode())]
        assert windows.source == "notes.txt"


@pytest.mark.parametrize("tensor", [torch.arange(12), torch.arange(12).view(3, 4), torch.arange(12, dtype=torch.int32)])
def test_a_tensor_is_one_row_of_tokens_or_one_a_row(tensor: Tensor) -> None:
    windows = load_windows(tensor, None, 8)
    assert real_tokens(windows).tolist() == list(range(12)) and windows.input_ids.dtype == torch.int64


def test_embedded_texts_hold_every_domain_in_any_leading_part() -> None:
    texts = embedded_texts()
    assert len(texts) >= 20 and all(text.strip() for text in texts) and len(set(texts)) == len(texts)
    windows = load_windows(None, Bytes(), 512)
    assert windows.tokens == sum(len(text.encode()) + 1 for text in texts) and windows.tokens > 60_000
    assert windows.source == "awq-hf's embedded multi-domain text"


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "holds no text; give prose"),
        (["", " \n"], "2 texts.* holds no text; give prose"),
        ([1, 2], "list of int; give strings, or 1-D integer tensors"),
        (["a", torch.arange(3)], "list of Tensor, str; give strings"),
        (["a", {"text": "b"}], "list of dict, str; give strings"),
        ([torch.zeros(2, 3, dtype=torch.int64)], r"shape \(2, 3\) and dtype torch.int64; give 1-D integer tensors"),
        ([torch.zeros(3)], r"shape \(3,\) and dtype torch.float32; give 1-D integer tensors"),
        ([torch.arange(1)], r"1 token tensors\) holds 1 tokens; at least 2 are needed"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_way_out(calibration: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_windows(calibration, Bytes(), 8)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="need a tokenizer: pass tokenizer=.*token tensors"):
        load_windows(["some text"], None, 8)
    with pytest.raises(ValueError, match="seq_len=1 is too short; windows need at least 2 tokens"):
        load_windows([torch.arange(5)], None, 1)


def test_notes_stay_with_the_windows_drawn() -> None:
    windows = Windows(torch.zeros(4, 2, dtype=torch.int64), torch.full((4,), 2), "a", ("short",))
    assert windows.sample(2, 0).notes == ("short",) and Windows(windows.input_ids, windows.lengths, "a").notes == ()


# Which windows: published figures depend on them

WHOLE = {
    None: (186_132, "249cfa621d170fe29241ff96ac39d0debec487eb92f6cf49a033feee933c7bad"),
    "calibration.txt": (97_520, "88f5d9c6edeb79c977490d06bd5d89eed013d548272ac9a58566561bd56004e4"),
}
DRAWN = {
    None: "e5e7f0d5b72045b04a3b6c3aeaedcbe6f50b281b63c8078cf7f86a67f727c97c",
    "calibration.txt": "fb255d00dff7db3c0063e6a8fda0d315a5187c273695b8a9fc0265411f569356",
}


@pytest.mark.parametrize("name", [None, "calibration.txt"])
def test_the_windows_of_the_texts_of_the_package(name: str | None, demo_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    windows = load_windows(name and demo_dir / name, tokenizer, 512, samples=128, seed=0)
    assert (windows.tokens, windows.sha256()) == WHOLE[name]
    assert windows.sample(128, 0).sha256() == DRAWN[name]


# Large data: documents are drawn

texts = st.lists(st.text("ab \n", max_size=30), min_size=1, max_size=12)


@given(texts, st.integers(1, 4), st.integers(2, 9), st.integers(0, 3), st.booleans())
def test_of_large_data_whole_documents_are_drawn_until_there_are_enough(
    texts: list[str], samples: int, seq_len: int, seed: int, large: bool
) -> None:
    numbered = [f"{i}{text}" for i, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SMALL", 0 if large else 10**9)
        windows = load_windows(numbered, Bytes(), seq_len, samples=samples, seed=seed)
    tokens, lengths = real_tokens(windows).tolist(), [len(Bytes()(text)["input_ids"]) for text in numbered]
    enough = data.MARGIN * samples * seq_len
    if not large:
        assert tokens == [token for text in numbered for token in Bytes()(text)["input_ids"]]
        return
    found = ["".join(chr(t - 2) for t in part) for part in split_at(tokens, 1)]
    assert len(set(found)) == len(found) and set(found) <= set(numbered), "whole documents, none twice"
    assert len(tokens) == sum(lengths) or enough <= len(tokens) < enough + max(lengths)


def split_at(tokens: list[int], mark: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for token in tokens:
        parts.append([]) if token == mark else parts[-1].append(token)
    return parts


def test_what_is_drawn_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL", 100)
    texts = [f"text {i} " * 4 for i in range(100)]
    drawn = [load_windows(texts, Bytes(), 16, samples=4, seed=seed).sha256() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    in_order = load_windows(texts, Bytes(), 16)
    assert in_order.tokens == sum(len(text) + 1 for text in texts), "without a number of samples, everything"


def test_tokens_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL", 1)
    assert load_windows([torch.arange(400)] * 3, None, 4, samples=2).tokens == 1200


def test_an_iterable_is_read_in_its_order_and_only_as_far_as_needed() -> None:
    read: list[int] = []

    def stream() -> Iterator[dict[str, str]]:
        for i in range(10**6):
            read.append(i)
            yield {"text": f"text {i}"}

    windows = load_windows(stream(), Bytes(), 8, samples=4)
    assert windows.tokens >= data.MARGIN * 32 and len(read) <= 10
    assert real_tokens(windows)[:8].tolist() == Bytes()("text 0")["input_ids"] + [1] and windows.source == "generator"
