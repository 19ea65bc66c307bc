"""Calibration data: from what the user gave to windows of tokens, and from those to batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DOCUMENT = "\n<|document|>\n"  # between the documents of the embedded texts
HELD_OUT = 8  # one window in so many is kept from the search and judges it

Calibration = None | str | os.PathLike[str] | Sequence[str] | Sequence[Tensor]


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
    """Equal windows of tokens cut from documents: input_ids int64 [windows, seq_len], lengths int64 [windows] (real tokens)."""

    input_ids: Tensor
    lengths: Tensor
    source: str

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
        return Windows(self.input_ids[order], self.lengths[order], self.source)

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


def load_windows(calibration: Any, tokenizer: Any, seq_len: int, role: str = "calibration") -> Windows:
    """All windows of `seq_len` tokens that the data yields; `role` is what messages call it.

    calibration: None for the embedded texts, the path of a UTF-8 text file, a list of strings, or a list of 1-D
    integer tensors. Documents are cut into windows; what is left of one is packed together with the next, and only the
    very last window may be shorter than the others. Raises ValueError when there is nothing to calibrate on.
    """
    if isinstance(calibration, Tensor):
        calibration = [calibration] if calibration.ndim == 1 else list(calibration)
    if calibration is not None and not isinstance(calibration, (str, os.PathLike)):
        samples = list(calibration)
        if samples and all(isinstance(s, Tensor) for s in samples):
            return _pack([_checked_tokens(s, role) for s in samples], seq_len, f"{len(samples)} token tensors", role)
        if not all(isinstance(s, str) for s in samples):
            kinds = sorted({type(s).__name__ for s in samples})
            raise ValueError(f"{role} is a list of {', '.join(kinds)}; give strings, or 1-D integer tensors of token ids")
        texts, source = samples, f"{len(samples)} texts"
    elif calibration is None:
        texts, source = embedded_texts(), "embedded multi-domain text"
    else:
        texts, source = [_read_text(Path(calibration), role)], Path(calibration).name
    if not any(t.strip() for t in texts):
        raise ValueError(f"{role} ({source}) holds no text; give prose like the model's input, some 10,000 words")
    if tokenizer is None:
        raise ValueError(f"{role} texts need a tokenizer: pass tokenizer=..., or the {role} as a list of token tensors")
    return _pack([_tokenize(t, tokenizer) for t in texts if t.strip()], seq_len, source, role)


def embedded_texts() -> list[str]:
    """The documents of the calibration text that comes with the package: prose, code, dialogue, mathematics, many languages.

    Domains are interleaved, so that any number of leading windows holds every kind.
    """
    folder = resources.files("awq_hf") / "data" / "calibration"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    domains = [f.read_text(encoding="utf-8").strip("\n").split(DOCUMENT) for f in files]
    placed = [((i + 0.5) / len(d), n, text) for n, d in enumerate(domains) for i, text in enumerate(d)]
    return [text for _, _, text in sorted(placed)]


def _read_text(path: Path, role: str) -> str:
    if not path.is_file():
        raise ValueError(f"{role} file {str(path)!r} does not exist; give the path of a UTF-8 text file, or a list of strings")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{role} file {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _tokenize(text: str, tokenizer: Any) -> Tensor:
    """One document with the tokenizer's own special tokens. The length warning is silenced: windows are cut afterwards."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _checked_tokens(sample: Tensor, role: str) -> Tensor:
    if sample.ndim != 1 or sample.is_floating_point():
        raise ValueError(f"a {role} tensor has shape {tuple(sample.shape)} and dtype {sample.dtype}; give 1-D integer tensors of token ids")
    return sample.to(torch.int64).cpu()


def _pack(documents: list[Tensor], seq_len: int, source: str, role: str) -> Windows:
    """One row of tokens, cut every `seq_len`: long documents are cut, short ones share a window, nothing is dropped."""
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} is too short; windows need at least 2 tokens")
    tokens = torch.cat(documents) if documents else torch.empty(0, dtype=torch.int64)
    if len(tokens) < 2:
        raise ValueError(f"{role} ({source}) holds {len(tokens)} tokens; at least 2 are needed, and some 10,000 to do well")
    count = -(-len(tokens) // seq_len)
    padded = torch.zeros(count * seq_len, dtype=torch.int64)
    padded[: len(tokens)] = tokens
    lengths = torch.full((count,), seq_len)
    lengths[-1] = len(tokens) - (count - 1) * seq_len
    return Windows(padded.view(count, seq_len), lengths, source)
