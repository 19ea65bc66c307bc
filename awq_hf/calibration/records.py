"""What one item of calibration data is: a text, a conversation, or tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Message = dict[str, Any]
Document = str | Tensor | list[Message]  # a text; 1-D int64 token ids; a conversation, for the tokenizer's chat template

CHATS, TEXTS, PROMPT, ANSWERS = ("messages", "conversations"), ("text", "content"), "prompt", ("completion", "response")
FIELDS = (*CHATS, *TEXTS, PROMPT)
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
RULE = (
    f"a record is read from the first of {', '.join(FIELDS)} that it has ({PROMPT} together with {' or '.join(ANSWERS)}), "
    "or from its only field with a text; rename a field, or give a list of strings"
)
MESSAGE_RULE = 'a message is {"role": ..., "content": ...}, or has ShareGPT\'s from and value'


def to_document(item: Any, place: str) -> Document:
    """The document that a string, a 1-D integer tensor or list of ids, a record (a dict) or a conversation (a list of messages) holds.

    A record that is empty gives "". Raises ValueError, which begins with `place`, for anything else.
    """
    if isinstance(item, str):
        return item
    item = as_ids(item)
    if isinstance(item, Tensor):
        if item.ndim != 1 or item.is_floating_point() or item.is_complex() or item.dtype == torch.bool:
            shape = f"shape {tuple(item.shape)} and dtype {item.dtype}"
            raise ValueError(f"{place} has {shape}; give 1-D integer tensors of token ids")
        return item.to(torch.int64).cpu()
    if isinstance(item, Mapping):
        return _from_record(item, place)
    if isinstance(item, (list, tuple)):
        return _conversation(item, place)
    raise ValueError(f"{place} is {item!r:.60}; give strings, 1-D integer tensors of token ids, records (dicts), or lists of messages")


def as_ids(item: Any) -> Any:
    """A list of integers, as tokenizers return it, or an array of them, as a tensor; anything else as it is."""
    if isinstance(item, (list, tuple)) and item and all(type(number) is int for number in item):
        return torch.tensor(item, dtype=torch.int64)
    return torch.from_numpy(item) if type(item).__module__ == "numpy" and item.ndim else item


def is_message(item: Any) -> bool:
    """Whether a dict is one turn of a conversation: OpenAI's role and content, or ShareGPT's from and value."""
    return isinstance(item, Mapping) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())


def _from_record(record: Mapping[str, Any], place: str) -> Document:
    field = next((name for name in FIELDS if record.get(name) is not None), None)
    if field is None:
        if any(name in record for name in FIELDS):
            return ""  # a row without a value
        texts = [value for name, value in record.items() if isinstance(value, str) and name not in ("role", "from")]
        if len(texts) != 1:
            raise ValueError(f"{place} has the fields {', '.join(map(str, record)) or '(none)'}; {RULE}")
        return texts[0]
    value = record[field]
    if field == PROMPT:
        answer = next((record[name] for name in ANSWERS if isinstance(record.get(name), type(value))), None)
        if isinstance(value, str):
            return value if answer is None else _joined(value, answer)
        value = [*value, *(answer or [])] if isinstance(value, (list, tuple)) else value
    if field not in TEXTS and isinstance(value, (list, tuple)):
        return _conversation(value, place)
    if field in CHATS or not isinstance(value, str):
        wanted = "a text" if field in TEXTS else "a list of messages" if field in CHATS else "a text or a list of messages"
        raise ValueError(f"{place}: the field {field} holds {value!r:.60}, not {wanted}; {RULE}")
    return value


def _joined(prompt: str, answer: str) -> str:
    """The two as one text, on lines of their own unless one of them brings its space along."""
    seam = prompt[-1:] + answer[:1]
    return prompt + ("\n" if len(seam) == 2 and not any(c.isspace() for c in seam) else "") + answer


def _conversation(messages: Sequence[Any], place: str) -> list[Message]:
    return [_message(message, f"{place}: message {n}") for n, message in enumerate(messages)]


def _message(given: Any, place: str) -> Message:
    """One turn, with role and content; what else it holds (tool calls, reasoning) is for the template, fields without a value are not."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{place} is {given!r:.60}; {MESSAGE_RULE}")
    message = {name: value for name, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": ROLES.get(str(role), role), "content": message.pop("value", None), **message}
    content = message.get("content")
    if not isinstance(message.get("role"), str) or (content is None and "tool_calls" not in message):
        raise ValueError(f"{place} has the fields {', '.join(map(str, given))}; {MESSAGE_RULE}")
    if isinstance(content, (list, tuple)):  # parts, as models for images and sound take them
        message["content"] = "".join(_text_part(part, place) for part in content)
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{place}: content is {content!r:.60}; give a text")
    return message


def _text_part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise ValueError(f"{place} holds {kind!r:.60}; calibration is on text only: leave out images and sound")
    return str(part["text"])
