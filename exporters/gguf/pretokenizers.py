"""llama.cpp's name for a pre-tokenizer, found from what tokenizer.json says it does.

llama.cpp knows pre-tokenizers by name only, and its own converter recognises them by a hash of the tokens of a text, which knows released
tokenizers and no others. The steps of the pre-tokenizer decide here, so any tokenizer with known steps is recognised.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from awq_hf.wording import option

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}" + _SLASH_TAIL
_GPT4O = rf"{_FIRST}{_UPPER}*{_LOWER}+{_ENDINGS}|{_FIRST}{_UPPER}+{_LOWER}*{_ENDINGS}|\p{{N}}{{1,3}}" + _SLASH_TAIL
_DEEPSEEK_3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Steps, each splitting what the one before left -> does a word that is in the vocabulary skip the merges? -> llama.cpp's name.
NAMES: dict[tuple[str, ...], dict[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (r"\p{N}", _GPT2): {False: "smollm"},
    (_WORDS + r"\p{N}{1,3}" + _TAIL,): {True: "llama-bpe", False: "dbrx"},
    (_WORDS + r"\p{N}" + _TAIL,): {False: "qwen2"},
    (_TEKKEN,): {True: "tekken"},
    (_GPT4O,): {False: "gpt-4o"},
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_3): {False: "deepseek-v3"},
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"): {False: "deepseek-coder"},
}

KNOWN = {"default", *(name for names in NAMES.values() for name in names.values())}
WITHOUT_MARKS = ("tekken", "gpt-4o")  # llama.cpp's versions do not take combining marks for parts of words


def find_pre_tokenizer(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for a byte-level `tokenizer`'s way to split. Raises ValueError when it has none."""
    content = json.loads(tokenizer.to_str())
    try:
        steps = tuple(_steps(content["pre_tokenizer"]))
        names = NAMES[steps]
    except (ValueError, KeyError):
        raise ValueError(
            f"llama.cpp is not known to have this tokenizer's pre-tokenizer: {json.dumps(content['pre_tokenizer'])[:400]}; "
            f"if llama.cpp has it under some name, give that name as {option('pre_tokenizer')}"
        ) from None
    skips = bool(content["model"].get("ignore_merges"))
    if skips in names:
        return names[skips]
    (name,) = names.values()
    if (token := _reached_otherwise(tokenizer)) is not None:
        raise ValueError(
            f"ignore_merges is {skips} in tokenizer.json, while llama.cpp's {name!r} has {not skips}, and tokens such as {token!r} come "
            f"out differently; give {option('pre_tokenizer', name)} to accept that"
        )
    return name


def _steps(node: dict[str, Any]) -> list[str]:
    """Regular expressions that are split by in turn. Raises ValueError for what is no such step."""
    kind = node["type"] if node else None
    if kind == "Sequence":
        return [step for part in node["pretokenizers"] for step in _steps(part)]
    if kind == "Split" and (node["behavior"], node["invert"]) in (("Isolated", False), ("Removed", True)):
        return [node["pattern"].get("Regex") or node["pattern"]["String"]]
    if kind == "Digits" and node["individual_digits"]:
        return [r"\p{N}"]
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return [_GPT2] if node["use_regex"] else []
    raise ValueError(kind)


def _reached_otherwise(tokenizer: Tokenizer) -> str | None:
    """A token that merging does not arrive at, though all of its bytes stand alone: with it, skipping the merges makes a difference."""
    content = json.loads(tokenizer.to_str())
    content.update(added_tokens=[], normalizer=None, pre_tokenizer=None, post_processor=None, truncation=None, padding=None)
    content["model"]["ignore_merges"] = False
    plain = Tokenizer.from_str(json.dumps(content))
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token, number in content["model"]["vocab"].items():
        if token not in added and plain.encode(token, add_special_tokens=False).ids != [number]:
            return token
    return None
