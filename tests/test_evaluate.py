"""Evaluation: perplexity, divergence and agreement against the definitions written out, on windows of unequal length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import awq_hf
from awq_hf import Evaluation

SEQ_LEN = 20


@pytest.fixture(scope="module")
def models(tiny_llama: Callable[..., Any]) -> tuple[Any, Any]:
    """(a model, its reference)."""
    reference, model = tiny_llama(), tiny_llama()
    model.lm_head.weight.data.mul_(1.2)
    model.model.layers[0].mlp.down_proj.weight.data.add_(0.1)
    return model, reference


@pytest.fixture(scope="module")
def expected(models: tuple[Any, Any], tokens: list[Tensor]) -> dict[str, float]:
    """Token by token, one window after the other."""
    losses, reference_losses, divergences, same = [], [], [], []
    for window in torch.cat(tokens).split(SEQ_LEN):
        with torch.no_grad():
            p, q = (m(window[None]).logits[0].double().log_softmax(-1) for m in (models[1], models[0]))
        for position in range(len(window)):
            divergences.append(float((p[position].exp() * (p[position] - q[position])).sum()))
            same.append(float(p[position].argmax() == q[position].argmax()))
            if position + 1 < len(window):
                losses.append(-float(q[position, window[position + 1]]))
                reference_losses.append(-float(p[position, window[position + 1]]))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "perplexity": math.exp(mean(losses)),
        "reference_perplexity": math.exp(mean(reference_losses)),
        "kl": mean(divergences),
        "top1": mean(same),
        "tokens": len(divergences),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_agrees_with_the_definitions(batch_size: int, models: tuple[Any, Any], tokens: list[Tensor], expected: dict[str, float]) -> None:
    found = awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN, batch_size=batch_size).to_dict()
    assert expected["kl"] > 0.1 and 0 < expected["top1"] < 1  # the models do differ
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_a_model_agrees_with_itself(models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    found = awq_hf.evaluate(models[1], models[1], tokens, seq_len=SEQ_LEN)
    assert (found.kl, found.top1) == (0.0, 1.0) and found.perplexity == found.reference_perplexity


def test_without_a_reference_there_is_no_agreement(models: tuple[Any, Any], tokens: list[Tensor], expected: dict[str, float]) -> None:
    found = awq_hf.evaluate(models[0], None, tokens, seq_len=SEQ_LEN)
    assert (found.kl, found.top1, found.reference_perplexity) == (None, None, None)
    assert found.perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
    assert Evaluation(**json.loads(json.dumps(found.to_dict()))) == found


def test_leaves_the_model_as_it_was(models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    before = {name: parameter.clone() for name, parameter in models[0].named_parameters()}
    awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN)
    assert all(torch.equal(parameter, before[name]) for name, parameter in models[0].named_parameters())
    assert torch.is_grad_enabled() and not models[0].training


@pytest.mark.parametrize("max_tokens, tokens_used", [(1, 20), (60, 60), (79, 60), (10_000, 480), (None, 480)])
def test_max_tokens(max_tokens: int | None, tokens_used: int, models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    assert awq_hf.evaluate(models[0], None, tokens, seq_len=SEQ_LEN, max_tokens=max_tokens).tokens == tokens_used


def test_texts_come_as_a_file_or_as_strings(demo_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = (kind.from_pretrained(demo_dir / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    text = "The state of our Union, and the States that are in it. " * 10
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    from_file = awq_hf.evaluate(model, None, tmp_path / "book.txt", tokenizer, seq_len=32)
    from_strings = awq_hf.evaluate(model, None, [text], tokenizer, seq_len=32)
    assert (from_file.sha256, from_file.perplexity) == (from_strings.sha256, from_strings.perplexity)
    assert (from_file.text, from_strings.text) == ("book.txt", "1 texts")


def test_reports_progress_batch_by_batch(models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    seen: list[int] = []

    def progress(batches: Any, **_options: Any) -> Any:
        for batch in batches:
            seen.append(len(batch.input_ids))
            yield batch

    awq_hf.evaluate(models[0], None, tokens, seq_len=SEQ_LEN, batch_size=10, progress=progress)
    assert seen == [10, 10, 4]


@pytest.mark.parametrize(
    "texts, message",
    [
        (None, "texts is missing"),
        (["a string"], "tokenizer"),
        ("no-such-file.txt", "does not exist"),
        ([torch.tensor([5])], "at least 2"),
        ([], "no text"),
    ],
)
def test_refuses_what_cannot_be_measured(texts: Any, message: str, models: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        awq_hf.evaluate(models[0], None, texts, seq_len=SEQ_LEN)


def test_refusals_speak_of_the_evaluation_text(models: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError) as error:
        awq_hf.evaluate(models[0], None, "no-such-file.txt")
    assert "calibration" not in str(error.value)


def test_token_ids_that_the_model_does_not_have(models: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="token id"):
        awq_hf.evaluate(models[0], None, [torch.arange(90, 120)], seq_len=SEQ_LEN)
