"""The vocabulary: tokens with their types and scores, merges, special tokens, chat template, from a transformers tokenizer.

Two kinds exist in llama.cpp. "gpt2" merges bytes by a list of merges, after a pre-tokenizer. "llama" (SentencePiece) merges characters,
best score of the result first; a list of merges says the same if it has every way to arrive at a token, and all of them in one place.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig

from awq_hf.exporters.gguf.pretokenizers import KNOWN, WITHOUT_MARKS, find_pre_tokenizer
from awq_hf.wording import option

logger = logging.getLogger("awq_hf")

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = re.compile(r"<[|｜].*[|｜]>|<unused\d+>|<pad>|<mask>", re.DOTALL)  # control tokens, which some tokenizers do not call special
_UNUSED_SCORE = -10000.0
SPACE = "▁"


@dataclass
class Vocabulary:
    """kind: llama.cpp's name for the algorithm. flags: name without tokenizer.ggml -> value."""

    kind: str
    pre_tokenizer: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: Any = None

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, flag in self.flags.items():
            getattr(writer, f"add_{name}")(flag)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def load_tokenizer(directory: str | os.PathLike[str] | None, label: str) -> Any:
    """The tokenizer beside a model. Raises ValueError when there is none."""
    try:
        if directory is None:
            raise OSError("the model in memory was loaded from nowhere")
        return AutoTokenizer.from_pretrained(Path(directory), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{label} has no tokenizer that can be read ({reason}); a GGUF file holds one: copy the "
            "original's files there (in Python, it may also be given as tokenizer)"
        ) from error


def read_vocabulary(tokenizer: Any, size: int, config: PreTrainedConfig, pre_tokenizer: str | None = None) -> Vocabulary:
    """size: rows of the embedding. pre_tokenizer: llama.cpp's name, where it is not to be found out.

    Raises ValueError for a tokenizer that llama.cpp has no algorithm for, and for one with more tokens than the embedding has rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library; only those can be exported")
    content = json.loads(backend.to_str())
    tokens = _tokens(backend, size)
    kind = _kind_of(content)
    if pre_tokenizer is not None and pre_tokenizer not in KNOWN:
        logger.warning(
            "whether llama.cpp has a pre-tokenizer %r is not known here, and it loads no file that names one which it does not have: "
            "try the file before you publish it",
            pre_tokenizer,
        )
    if kind == "gpt2":
        vocabulary = Vocabulary(kind, pre_tokenizer or find_pre_tokenizer(backend), tokens, _types(backend, tokens))
        if vocabulary.pre_tokenizer in WITHOUT_MARKS:
            logger.warning("llama.cpp's pre-tokenizer %r cuts at combining marks (Devanagari, Thai, ...)", vocabulary.pre_tokenizer)
        vocabulary.merges = [" ".join(pair) for pair in _pairs(content)]
    else:
        types = _types(backend, tokens, unknown=tokenizer.unk_token or "")
        vocabulary = Vocabulary(kind, pre_tokenizer or "default", tokens, types)
        vocabulary.scores = _scores(content, tokens, types, check=pre_tokenizer is None)
        vocabulary.flags["add_space_prefix"] = _adds_space(content)
        vocabulary.tokens = [  # llama.cpp finds these in the text as it was written
            token.replace(SPACE, " ") if kind is TokenType.USER_DEFINED else token for token, kind in zip(tokens, types, strict=True)
        ]
    _add_special(vocabulary, tokenizer, config)
    vocabulary.chat_template = _chat_template(tokenizer)
    return vocabulary


def _tokens(backend: Tokenizer, size: int) -> list[str]:
    found = backend.get_vocab(with_added_tokens=True)
    # Of two names for one token, as Gemma has for the tab, the byte's is taken where the tokenizer still knows both.
    numbers = {number: token for token, number in sorted(found.items(), key=lambda item: _BYTE.fullmatch(item[0]) is not None)}
    if numbers and max(numbers) >= size:
        raise ValueError(
            f"the tokenizer has {max(numbers) + 1} tokens, the embedding {size} rows: {numbers[max(numbers)]!r} has no embedding; "
            "give the tokenizer that the model was trained with"
        )
    return [numbers.get(number, f"[PAD{number}]") for number in range(size)]


def _kind_of(content: dict[str, Any]) -> str:
    model = content["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise ValueError(f"tokenizers of type {model['type']} are not exported to GGUF; BPE is, byte-level or with byte fallback")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("the tokenizer marks the parts of words (continuing_subword_prefix, end_of_word_suffix), which llama.cpp does not")
    if '"ByteLevel"' in json.dumps(content["pre_tokenizer"]):
        if (normalizer := content["normalizer"]) and normalizer["type"] != "NFC":
            raise ValueError(f"the tokenizer normalizes text ({normalizer['type']}), which llama.cpp does not with this algorithm")
        return "gpt2"
    if model.get("byte_fallback"):
        return "llama"
    raise ValueError("the tokenizer is neither byte-level nor has it byte_fallback: llama.cpp has no such algorithm")


def _types(backend: Tokenizer, tokens: list[str], unknown: str | None = None) -> list[TokenType]:
    """unknown: the token for what is unknown, in a vocabulary of pieces of text; None for one of bytes."""
    added = backend.get_added_tokens_decoder()
    known = backend.get_vocab(with_added_tokens=True)
    return [_type_of(token, added.get(number), token in known, unknown) for number, token in enumerate(tokens)]


def _type_of(token: str, added: Any, known: bool, unknown: str | None) -> TokenType:
    if not known:
        return TokenType.UNUSED
    if token == unknown:
        return TokenType.UNKNOWN
    if added is not None and (added.special or _SPECIAL.fullmatch(token)):
        return TokenType.CONTROL
    if added is not None and (added.normalized or SPACE not in token):  # others are looked for in text as written, where spaces are spaces
        return TokenType.USER_DEFINED
    return TokenType.BYTE if unknown is not None and _BYTE.fullmatch(token) else TokenType.NORMAL


def _pairs(content: dict[str, Any]) -> list[tuple[str, str]]:
    merges = content["model"]["merges"]
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _scores(content: dict[str, Any], tokens: list[str], types: list[TokenType], check: bool) -> list[float]:
    """Minus the rank of the first merge that makes a token. Raises ValueError where scores cannot say what the merges say, if `check`."""
    known = set(tokens)
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in known and (byte > 127 or chr(byte) not in known)]:
        raise ValueError(f"the tokenizer has byte_fallback, but no token <0x{missing[0]:02X}>, which llama.cpp needs")
    pairs = _pairs(content)
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, []).append(rank)
    if check and (difference := _difference(tokens, types, set(pairs), ranks)):
        raise ValueError(
            f"{difference}, but llama.cpp's SentencePiece algorithm would: its tokens would differ; "
            f"give {option('pre_tokenizer', 'default')} to accept that"
        )
    scored = (TokenType.NORMAL, TokenType.BYTE, TokenType.UNKNOWN)
    others = [0.0 if kind in scored else _UNUSED_SCORE for kind in types]
    return [-float(ranks[token][0]) if token in ranks else other for token, other in zip(tokens, others, strict=True)]


def _difference(tokens: list[str], types: list[TokenType], pairs: set[tuple[str, str]], ranks: dict[str, list[int]]) -> str | None:
    """What the merges do not do that scores of tokens say."""
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind is TokenType.NORMAL}
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal and (left, right) not in pairs:
                return f"the tokenizer does not merge {left!r} and {right!r} to {token!r}"
    ends = sorted((found[0], found[-1], token) for token, found in ranks.items() if token in normal)
    for (_, last, token), (first, _, other) in itertools.pairwise(ends):
        if first < last:
            return f"the tokenizer does not do all of its merges for {token!r} before those for {other!r}"
    return None


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether a space is put before the text. Raises ValueError for a normalizer or pre-tokenizer that does anything else."""
    normalizer, pre_tokenizer = content["normalizer"], content["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer] if normalizer else []
    adds = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": SPACE}:
            adds = True
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            raise ValueError(f"the tokenizer normalizes text by {json.dumps(step)[:200]}, which llama.cpp does not")
    if pre_tokenizer and pre_tokenizer["type"] == "Metaspace":
        scheme = pre_tokenizer["prepend_scheme"]
        adds = adds or scheme != "never"
        if scheme != "never":
            also = " and before text after a special token" if scheme == "first" else ""
            logger.warning("llama.cpp puts a space before text that begins with one%s; this tokenizer does not", also)
        pre_tokenizer = {"type": "Metaspace, which splits at spaces"} if pre_tokenizer.get("split", True) else None
    if pre_tokenizer and pre_tokenizer.get("pattern") != {"String": " "}:  # spaces are replaced before: never found
        raise ValueError(f"the tokenizer splits text by {json.dumps(pre_tokenizer)[:200]}, which llama.cpp does not with this algorithm")
    return adds


def _add_special(vocabulary: Vocabulary, tokenizer: Any, config: PreTrainedConfig) -> None:
    """Special tokens by their role, and whether they are put around a text."""
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is None:
            stated = getattr(config, f"{name}_token_id", None)
            number = stated[0] if isinstance(stated, list) else stated
        if number is not None and 0 <= number < len(vocabulary.tokens):
            vocabulary.special[name] = number
    text, around = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    special = vocabulary.special
    ends: list[list[list[int]]] = [[[], [special[name]]] if name in special else [[]] for name in ("bos", "eos")]
    for before, after in itertools.product(*ends):
        if around == [*before, *text, *after]:
            vocabulary.flags |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
            return
    raise ValueError(f"the tokenizer makes {around} of {text}, but llama.cpp puts nothing but one bos and one eos token around a text")


def _chat_template(tokenizer: Any) -> Any:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
