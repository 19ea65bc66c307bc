"""Whether calibration data can do its work: what cannot is refused, what is doubtful is said."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from awq_hf.calibration.data import Windows
from awq_hf.calibration.tokens import text_tokenizer

FEWEST, FEW = 32, 2048  # tokens: fewer of a text are refused; fewer calibrate poorly
SMALL_VOCABULARY = 0.5  # of the model's
MANY_UNKNOWN = 0.05  # of the tokens
DOMINANT, ALL = 0.5, 0.9  # share of the tokens that are one and the same

logger = logging.getLogger("awq_hf")


def check_windows(windows: Windows, asked: int, tokenizer: Any, vocabulary: int) -> Windows:
    """The same windows, with notes on what makes the result doubtful; each note is also a warning of the logger "awq_hf".

    asked: tokens the search wants (samples x seq_len). tokenizer: what made the tokens of texts; None where tokens were given.
    vocabulary: token ids of the model. Raises ValueError when the tokens are not the model's, or too few or too uniform to be text.
    """
    windows.check_token_ids(vocabulary)
    tokenizer = text_tokenizer(tokenizer)
    what = f"calibration ({windows.source})"
    if tokenizer is not None and windows.tokens < FEWEST:
        raise ValueError(f"{what} holds {windows.tokens} tokens, too few to say anything; give at least {FEW:,}, some 1,500 words")
    ids = windows.input_ids[torch.arange(windows.input_ids.shape[1]) < windows.lengths[:, None]]  # [tokens]
    notes = tuple(f"{what} {note}" for note in (*_amount(windows.tokens, asked), *_fit(ids, tokenizer, vocabulary, what)))
    for note in notes:
        logger.warning("%s", note)
    return dataclasses.replace(windows, notes=windows.notes + notes)


def _amount(tokens: int, asked: int) -> Iterator[str]:
    if min(tokens, asked) < FEW:
        fixes = ["give more text"] * (tokens < FEW) + ["raise samples or seq_len"] * (asked < FEW)
        yield f"is only {min(tokens, asked):,} tokens; with fewer than {FEW:,} results may be poor: {' and '.join(fixes)}"
    elif tokens < asked:
        yield f"holds {tokens:,} of the {asked:,} tokens asked for (samples x seq_len); all of them are used"


def _fit(ids: Tensor, tokenizer: Any, vocabulary: int, what: str) -> Iterator[str]:
    """Signs that tokenizer and model, or tokenizer and text, do not belong together."""
    if hasattr(tokenizer, "__len__") and len(tokenizer) < SMALL_VOCABULARY * vocabulary:
        yield f"is tokenized with {len(tokenizer):,} token ids, the model has {vocabulary:,}: the tokenizer may be another model's"
    unknown = getattr(tokenizer, "unk_token_id", None)
    marks = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]  # some tokenizers use one id for all
    if unknown is not None and unknown not in marks and (share := int((ids == unknown).sum()) / len(ids)) > MANY_UNKNOWN:
        yield f"holds {share:.0%} unknown tokens: the tokenizer does not know this language or alphabet, or is another model's"
    counts = torch.bincount(ids)
    share = int(counts.max()) / len(ids)
    if share > ALL and tokenizer is not None:
        raise ValueError(f"{what} comes to token id {int(counts.argmax())} for {share:.0%}: is it the right text, and the right tokenizer?")
    if share > DOMINANT:
        yield f"is token id {int(counts.argmax())} for {share:.0%}: is it padding, or another model's tokenizer?"
