"""Documents to token ids, by a tokenizer or the tokenizer of a processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from awq_hf.calibration.records import Document, Message, as_ids


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of a processor (of a model that also takes images or sound); a tokenizer itself, or None, as it is."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def is_tokens(calibration: Any) -> bool:
    """Whether this is a tensor, or a list of tensors or of lists of ids: data that needs no tokenizer."""
    return isinstance(as_ids(calibration[0]) if isinstance(calibration, (list, tuple)) and calibration else calibration, Tensor)


def tokenize(document: Document, tokenizer: Any, where: str) -> Tensor:
    """Token ids of one document, int64 [tokens]. Texts get the tokenizer's own special tokens, conversations their template's alone.

    Raises ValueError, which begins with `where`, when there is no tokenizer, or a conversation does not fit its chat template.
    """
    if isinstance(document, Tensor):
        return document
    if tokenizer is None:
        raise ValueError(f"{where}: texts need a tokenizer: pass tokenizer=..., or give a list of token tensors")
    if isinstance(document, str):  # the length warning is silenced: windows are cut afterwards
        ids = text_tokenizer(tokenizer)(document, verbose=False)["input_ids"]
    else:
        ids = _conversation(document, tokenizer, where)
    return torch.tensor(ids, dtype=torch.int64)


def _conversation(messages: list[Message], processor: Any, where: str) -> list[int]:
    tokenizer = text_tokenizer(processor)
    template = getattr(tokenizer, "chat_template", None)
    options: dict[str, Any] = {}
    if template is None and (template := getattr(processor, "chat_template", None)) is not None:
        options["chat_template"] = template
    if template is not None:  # mistral-common's tokenizers have their own idea of chats, and no such options
        options["tokenizer_kwargs"] = {"verbose": False}
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])
    except Exception as error:
        if template is None:
            fix = "set tokenizer.chat_template, or give plain texts"
            raise ValueError(f"{where} is a conversation, but the tokenizer has no chat template: {fix}") from error
        raise ValueError(f"{where} does not fit the tokenizer's chat template: {' '.join(str(error).split()):.300}") from error
