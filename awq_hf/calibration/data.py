"""Calibration data: from what the user gave to windows of tokens, and from those to batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from awq_hf.calibration.sources import listed, open_source
from awq_hf.calibration.tokens import tokenize
from awq_hf.wording import option

DOCUMENT = "\n<|document|>\n"  # between the documents of the embedded texts
EMBEDDED = {
    "calibration": "awq-hf's embedded multi-domain text",
    "evaluation": "awq-hf's embedded evaluation text",
}  # role -> what results call it
HELD_OUT = 8  # one window in so many is kept from the search and judges it

MARGIN = 2  # documents are drawn until there are so many times the tokens asked for

Record = Mapping[str, Any]
Calibration = (
    None
    | str
    | os.PathLike[str]
    | Tensor
    | Iterable[str]
    | Iterable[Tensor]
    | Iterable[Sequence[int]]
    | Iterable[Record]
    | Iterable[Sequence[Record]]
)


@dataclass(frozen=True)
class Batch:
    """Windows that run together. input_ids: int64 [windows, seq_len]; mask: int64 of the same shape, 0 at padding, or None."""

    input_ids: Tensor
    mask: Tensor | None
    held_out: bool

    def real_tokens(self, per_token: Tensor) -> Tensor:
        """Rows of a [windows * seq_len, channels] tensor that are not padding."""
        return per_token if self.mask is None else per_token[self.mask.reshape(-1).bool().to(per_token.device)]


@dataclass(frozen=True)
class Windows:
    """Equal windows of tokens cut from documents: input_ids int64 [windows, seq_len], lengths int64 [windows] (real tokens).

    source: where they come from; notes: what makes results doubtful (see checks.py), for the report.
    """

    input_ids: Tensor
    lengths: Tensor
    source: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def sha256(self) -> str:
        """A digest of the very tokens, for reports."""
        digest = hashlib.sha256()
        for row, length in zip(self.input_ids, self.lengths, strict=True):
            digest.update(row[: int(length)].numpy().tobytes() + b"|")
        return digest.hexdigest()

    def check_token_ids(self, vocabulary: int) -> None:
        """Raise ValueError when a token id is not in a vocabulary of this size."""
        low, high = int(self.input_ids.min()), int(self.input_ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{self.source} holds token id {low if low < 0 else high}, but the model's vocabulary has {vocabulary} entries: "
                "the tokenizer is not this model's"
            )

    def sample(self, count: int, seed: int) -> Windows:
        """`count` windows in an order drawn with `seed`; all of them when there are fewer."""
        order = torch.randperm(len(self.input_ids), generator=torch.Generator().manual_seed(seed))[:count]
        return replace(self, input_ids=self.input_ids[order], lengths=self.lengths[order])

    def batches(self, batch_size: int, hold_out: bool = True) -> list[Batch]:
        """Batches of windows; with `hold_out` the last eighth (at least one window, if there are two) is marked as held out."""
        held = max(1, len(self.input_ids) // HELD_OUT) if hold_out and len(self.input_ids) > 1 else 0
        split = len(self.input_ids) - held
        parts = ((range(0, split, batch_size), split, False), (range(split, len(self.input_ids), batch_size), len(self.input_ids), True))
        return [self._batch(start, min(start + batch_size, stop), flag) for starts, stop, flag in parts for start in starts]

    def _batch(self, start: int, stop: int, held_out: bool) -> Batch:
        lengths = self.lengths[start:stop]
        width = int(lengths.max())
        ids = self.input_ids[start:stop, :width]
        mask = (torch.arange(width) < lengths[:, None]).long()
        return Batch(ids, None if bool(mask.all()) else mask, held_out)


def load_windows(
    calibration: Any, tokenizer: Any, seq_len: int, samples: int | None = None, seed: int = 0, role: str = "calibration"
) -> Windows:
    """Windows of `seq_len` tokens, from which `samples` can be drawn; for None, all that the data yields. `role` is what messages call it.

    calibration: what AwqConfig describes; None is the embedded text of that role. tokenizer: a tokenizer, or a processor that has one;
    None suffices for token tensors.
    Documents are cut into windows; what is left of one is packed together with the next, and only the very last window may be
    shorter than the others. Tokens, and texts and files of less than 4 MB (sources.SMALL), are taken whole and in their order. Of
    all else (more text; tables; records and conversations in memory) documents are drawn with `seed` until they hold
    MARGIN * samples windows: nothing else is tokenized. Raises ValueError when there is nothing to calibrate on, and ImportError
    where an optional package is needed to read it.
    """
    if seq_len < 2:
        raise ValueError(f"{option('seq_len', seq_len)} is too short; windows need at least 2 tokens")
    source = listed(embedded_texts(role), EMBEDDED[role], 0) if calibration is None else open_source(calibration, role)
    enough = None if samples is None or source.is_small else MARGIN * samples * seq_len
    rows: list[Tensor] = []
    total = 0
    for where, document in source.documents(None if enough is None else seed, role):
        if isinstance(document, Tensor) or (document.strip() if isinstance(document, str) else document):
            rows.append(tokenize(document, tokenizer, where))
            total += len(rows[-1])
        if enough is not None and total >= enough:
            break
    if not rows:
        raise ValueError(f"{role} ({source.name}) holds no text; give prose like the model's input, some 10,000 words")
    return _pack(rows, seq_len, source.name, role)


def embedded_texts(role: str = "calibration") -> list[str]:
    """The documents of the text that comes with the package for calibration, or for evaluation: prose, code, dialogue, many languages.

    The two share nothing. Domains are interleaved, so that any number of leading windows holds every kind.
    """
    folder = resources.files("awq_hf") / "data" / role
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    domains = [f.read_text(encoding="utf-8").strip("\n").split(DOCUMENT) for f in files]
    placed = [((i + 0.5) / len(d), n, text) for n, d in enumerate(domains) for i, text in enumerate(d)]
    return [text for _, _, text in sorted(placed)]


def _pack(documents: list[Tensor], seq_len: int, source: str, role: str) -> Windows:
    """One row of tokens, cut every `seq_len`: long documents are cut, short ones share a window, nothing is dropped."""
    tokens = torch.cat(documents)
    if len(tokens) < 2:
        raise ValueError(f"{role} ({source}) holds {len(tokens)} tokens; at least 2 are needed, and some 10,000 to do well")
    count = -(-len(tokens) // seq_len)
    padded = torch.zeros(count * seq_len, dtype=torch.int64)
    padded[: len(tokens)] = tokens
    lengths = torch.full((count,), seq_len)
    lengths[-1] = len(tokens) - (count - 1) * seq_len
    return Windows(padded.view(count, seq_len), lengths, source)
