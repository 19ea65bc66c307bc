"""The prompt format of a chat model: what its own template makes of a small conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq_hf.model_cards.markdown import one_line

SYSTEM, PROMPT, ANSWER, NEXT = "{system prompt}", "{prompt}", "{answer}", "{next prompt}"
TODAY = "{% macro strftime_now(format) %}{date}{% endmacro %}"  # over transformers' function of that name: a card is the same every day


@dataclass(frozen=True)
class Template:
    """text: Jinja; tokens: special tokens by the names that templates call them, such as bos_token."""

    text: str
    tokens: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """format: a conversation as the model reads it. parts: whether the template takes contents as a list of parts and not as a text."""

    format: str
    parts: bool = False


def template_of(path: Path, config: dict[str, Any]) -> Template | None:
    """What a tokenizer in a directory applies where none is named. config: tokenizer_config.json."""
    file, said = path / "chat_template.jinja", config.get("chat_template")
    if isinstance(said, list):  # of several, each a name and a template
        said = next((each.get("template") for each in said if isinstance(each, dict) and each.get("name") == "default"), None)
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else said
    return Template(text, _tokens(config)) if isinstance(text, str) and text else None


def _tokens(config: dict[str, Any]) -> dict[str, str]:
    """Each is a text, or an object with it as its content."""
    given = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items() if name.endswith("_token")}
    return {name: value for name, value in given.items() if isinstance(value, str)}


def chat_of(template: Template) -> Chat:
    """The format, with the name of what belongs there in braces; with a system prompt if the template has a place for one.

    Raises ValueError, with what the template says, where it refuses every conversation, or leaves out what is in it.
    """
    from awq_hf.compat import render_chat  # not above: a card without a chat does without transformers

    problem = "it leaves out the messages"
    for parts, messages in _conversations():
        try:
            shown = render_chat(TODAY + template.text, messages, **template.tokens)
        except Exception as error:  # of a program that came with the model
            problem = one_line(error) or type(error).__name__
            continue
        if all(_content(message) in shown for message in messages):
            return Chat(shown, parts)
    raise ValueError(problem)


def _conversations() -> Iterator[tuple[bool, list[dict[str, Any]]]]:
    turns = (("system", SYSTEM), ("user", PROMPT), ("assistant", ANSWER), ("user", NEXT))
    for first in (0, 1):
        for parts in (False, True):
            yield parts, [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns[first:]]


def _content(message: dict[str, Any]) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])
