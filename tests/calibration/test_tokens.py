"""Texts and conversations to token ids, with tokenizers, processors, and chat templates that are missing or refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from awq_hf.calibration.data import load_windows
from awq_hf.calibration.tokens import is_tokens, text_tokenizer, tokenize

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system\nprompt') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)
CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture
def tokenizer(demo_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_dir / "model")


@pytest.fixture
def chatting(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_texts_get_the_special_tokens_of_the_tokenizer(tokenizer: Any) -> None:
    assert tokenize("Hello", tokenizer, "").tolist() == tokenizer("Hello").input_ids
    assert tokenizer("Hello").input_ids[0] == tokenizer.bos_token_id


def test_conversations_get_those_of_the_template_alone(chatting: Any) -> None:
    ids = tokenize(CHAT, chatting, "")
    rendered = "<|begin_of_text|>user: Hello<|end_of_text|>assistant: Hi<|end_of_text|>"
    assert ids.dtype == torch.int64 and chatting.decode(ids) == rendered
    assert ids.tolist().count(chatting.bos_token_id) == 1 and ids.tolist().count(chatting.eos_token_id) == 2


@pytest.mark.parametrize("given", [[CHAT, CHAT], [{"messages": CHAT}, {"messages": CHAT}]])
def test_conversations_are_documents(given: Any, chatting: Any) -> None:
    once = tokenize(CHAT, chatting, "")
    windows = load_windows(given, chatting, 512)
    assert windows.input_ids[0, : windows.tokens].tolist() == [*once, *once]
    assert load_windows(CHAT, chatting, 512).tokens == len(once), "a single one"


def test_tokens_are_themselves() -> None:
    ids = torch.arange(3)
    assert tokenize(ids, None, "") is ids
    assert is_tokens(ids) and is_tokens([ids]) and is_tokens((ids,))
    assert not any(map(is_tokens, (None, "a", [], ["a"], iter([ids]))))


class Processor:
    """A processor of text and images: what it is called with is not text alone."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def __call__(self, images: Any, text: Any) -> Any: ...


def test_a_processor_stands_for_its_tokenizer(tokenizer: Any) -> None:
    processor = Processor(tokenizer, TEMPLATE)
    assert text_tokenizer(processor) is text_tokenizer(tokenizer) is tokenizer and text_tokenizer(None) is None
    assert tokenize("Hello", processor, "").tolist() == tokenizer("Hello").input_ids
    by_processor = tokenize(CHAT, processor, "")
    assert tokenizer.chat_template is None, "the user's tokenizer is not changed"
    tokenizer.chat_template = TEMPLATE
    assert torch.equal(by_processor, tokenize(CHAT, tokenizer, ""))
    processor.chat_template = "something else"
    assert torch.equal(by_processor, tokenize(CHAT, processor, "")), "the tokenizer's own comes first"


def test_a_tokenizer_that_chats_without_a_template() -> None:
    """As mistral-common's: it takes no options for templates."""

    def apply(messages: Any, *, tokenize: bool, return_dict: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(messages)]}

    assert tokenize(CHAT, SimpleNamespace(apply_chat_template=apply, chat_template=None), "").tolist() == [2]


@pytest.mark.parametrize("document", ["word " * 600, [{"role": "user", "content": "word " * 600}]])
def test_long_documents_are_no_reason_to_warn(document: Any, chatting: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Their windows are cut afterwards."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        assert len(tokenize(document, chatting, "")) > chatting.model_max_length
    finally:
        logger.setLevel(level)
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def no_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("document", "change", "message"),
    [
        (CHAT, no_template, "here is a conversation, but the tokenizer has no chat template: set tokenizer.chat_template, or give plain"),
        ([{"role": "system", "content": "a"}], lambda _: None, "here does not fit the tokenizer's chat template: No system prompt$"),
    ],
)
def test_refused(document: Any, change: Callable[[Any], None], message: str, chatting: Any) -> None:
    change(chatting)
    with pytest.raises(ValueError, match=message):
        tokenize(document, chatting, "here")


@pytest.mark.parametrize("document", ["a", CHAT])
def test_no_tokenizer(document: Any) -> None:
    with pytest.raises(ValueError, match="here: texts need a tokenizer: pass tokenizer=..., or give a list of token tensors"):
        tokenize(document, None, "here")


def test_ids_as_tokenizers_return_them_are_tokens(tokenizer: Any) -> None:
    texts = ["Hello, who is there?", "And God said, Let there be light"]
    tensors = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    expected = load_windows(tensors, None, 8)
    numpy = pytest.importorskip("numpy")
    for given in (tokenizer(texts)["input_ids"], tuple(map(tuple, tokenizer(texts)["input_ids"])), [tensor.numpy() for tensor in tensors]):
        found = load_windows(given, None, 8)
        assert is_tokens(given) and (found.source, found.sha256()) == ("2 token tensors", expected.sha256())
    assert load_windows(iter(tokenizer(texts)["input_ids"]), None, 8).sha256() == expected.sha256()
    with pytest.raises(ValueError, match="dtype torch.float32; give 1-D integer"):
        load_windows([numpy.zeros(4, dtype="float32")], None, 8)
    assert not is_tokens([[True, False]]) and not is_tokens([[]])
