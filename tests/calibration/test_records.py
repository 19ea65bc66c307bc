"""What a record is read as: the rule, field by field, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awq_hf.calibration.records import Document, to_document

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
SHARED: list[dict[str, Any]] = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hello"},
    {"from": "gpt", "value": "Hi", "weight": 1},
]


@pytest.mark.parametrize(
    ("item", "document"),
    [
        ("a text", "a text"),
        ({"text": "a", "content": "b", "url": "c"}, "a"),
        ({"id": 3, "content": "b", "title": "c"}, "b"),
        ({"text": None, "content": "b"}, "b"),
        ({"prompt": "Why?", "source": "web"}, "Why?"),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is blue."),
        ({"prompt": "Why? ", "response": "So."}, "Why? So."),
        ({"prompt": "Why?", "response": "So."}, "Why?\nSo."),
        ({"prompt": "Why?", "response": None}, "Why?"),
        ({"prompt": "Why?", "completion": 3, "response": "So."}, "Why?\nSo."),
        ({"prompt": "", "response": "So."}, "So."),
        ({"id": 3, "body": "a text", "score": 0.5}, "a text"),
        ({"messages": HELLO, "prompt": "Hello", "prompt_id": "7"}, HELLO),
        ({"messages": None, "text": "a"}, "a"),
        ({"conversations": HELLO}, HELLO),
        ({"prompt": HELLO[:1], "completion": HELLO[1:]}, HELLO),
        ({"messages": []}, []),
        (HELLO, HELLO),
        (tuple(HELLO), HELLO),
        (
            {"conversations": SHARED},
            [{"role": "system", "content": "Be kind."}, HELLO[0], {**HELLO[1], "weight": 1}],
        ),
        ({"text": None, "url": "http"}, ""),
        ({"messages": None, "text": None}, ""),
    ],
)
def test_what_is_read(item: Any, document: Document) -> None:
    assert to_document(item, "here") == document


def test_fields_without_a_value_are_left_out_and_others_kept_for_the_template() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    item = [{"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    assert to_document(item, "") == [{"role": "assistant", "tool_calls": [call]}]


def test_parts_with_text_are_joined() -> None:
    item = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]
    assert to_document(item, "") == [{"role": "user", "content": "a b"}]


def test_tokens() -> None:
    found = to_document(torch.tensor([3, 1], dtype=torch.int32), "")
    assert isinstance(found, torch.Tensor) and found.dtype == torch.int64 and found.tolist() == [3, 1]


def test_what_was_given_is_not_changed() -> None:
    given = {"conversations": [dict(message) for message in SHARED]}
    to_document(given, "")
    assert given == {"conversations": SHARED}


MESSAGE = r'a message is \{"role": ..., "content": ...\}'


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "here is 3; give strings, 1-D integer tensors"),
        (None, "here is None; give strings"),
        ({"question": "a", "answer": "b"}, "here has the fields question, answer; a record is read from the first of messages, "),
        (
            {"id": 1, "score": 2},
            r"fields id, score; .*text, content, prompt that it has \(prompt together with completion or response\), or from its only",
        ),
        ({}, r"here has the fields \(none\)"),
        ({"role": "user"}, "here has the fields role;"),
        ({"text": ["a"]}, r"here: the field text holds \['a'\], not a text;"),
        ({"messages": "a"}, "here: the field messages holds 'a', not a list of messages;"),
        ({"prompt": 7}, "here: the field prompt holds 7, not a text or a list of messages"),
        ([1.5], f"here: message 0 is 1.5; {MESSAGE}"),
        ([*HELLO, {"text": "a"}], f"here: message 2 has the fields text; {MESSAGE}, or has ShareGPT"),
        ([{"role": "user"}], f"message 0 has the fields role; {MESSAGE}"),
        ([{"from": "human"}], "message 0 has the fields from"),
        ([{"role": 1, "content": "a"}], "message 0 has the fields role, content"),
        ([{"role": "user", "content": 5}], "here: message 0: content is 5; give a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 holds 'image'; calibration is on text only"),
        (torch.zeros(2, 2, dtype=torch.int64), r"here has shape \(2, 2\) and dtype torch.int64; give 1-D integer tensors"),
        (torch.zeros(2, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(2), "dtype torch.float32"),
        (torch.tensor(3), r"shape \(\)"),
    ],
)
def test_what_is_refused(item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_document(item, "here")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ValueError) as error:
        to_document({"text": ["word"] * 1000}, "here")
    assert len(str(error.value)) < 500
