"""Evaluation: perplexity, divergence and agreement against the definitions written out, on windows of unequal length."""

from __future__ import annotations

import copy
import json
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, XLNetConfig

import awq_hf
from awq_hf import Evaluation

SEQ_LEN = 20
module = sys.modules["awq_hf.evaluate"]  # the package's attribute of this name is the function


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


def test_a_model_that_is_partly_elsewhere(
    llama_dir: Path, models: tuple[Any, Any], tokens: list[Tensor], expected: dict[str, float], tmp_path: Path
) -> None:
    """accelerate brings the embedding, whose place is then the meta device, when it is called."""
    devices = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(llama_dir, device_map=devices, offload_folder=str(tmp_path))
    found = awq_hf.evaluate(offloaded, models[1], tokens, seq_len=SEQ_LEN)
    assert found.kl == 0 and found.perplexity == pytest.approx(expected["reference_perplexity"])


def test_a_model_without_a_number_of_positions(random_model: Callable[..., Any], tokens: list[Tensor]) -> None:
    """XLNet says -1."""
    xlnet = random_model(XLNetConfig(vocab_size=96, d_model=64, n_layer=1, n_head=4, d_inner=96))
    assert awq_hf.evaluate(xlnet, texts=tokens[:2], seq_len=SEQ_LEN).tokens == 64


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
    missing = {key for key, value in found.to_dict().items() if value is None}
    assert missing == {field for field in found.to_dict() if field.startswith(("kl", "loss_difference", "reference"))} | {"top1"}
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
        (None, "embedded evaluation text.* tokenizer"),
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


def test_standard_errors_of_equal_windows_are_those_of_their_means(models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    found = awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN)
    differences, divergences = [], []
    for window in torch.cat(tokens).split(SEQ_LEN):
        assert len(window) == SEQ_LEN
        with torch.no_grad():
            q, p = (m(window[None]).logits[0].double().log_softmax(-1) for m in models)
        differences.append((p - q)[range(SEQ_LEN - 1), window[1:]].mean())
        divergences.append((p.exp() * (p - q)).sum(-1).mean())
    for values, error in ((differences, found.loss_difference_se), (divergences, found.kl_se)):
        assert error == pytest.approx(float(torch.stack(values).std() / math.sqrt(len(values))), rel=1e-5)


@pytest.mark.parametrize("batch_size", [4, 100])
def test_batches_change_nothing(batch_size: int, models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    """With a last window that is padded where it runs beside others. The models compute in float32: some 1e-6 of their logits."""
    one, several = (awq_hf.evaluate(*models, tokens, seq_len=22, batch_size=size).to_dict() for size in (1, batch_size))
    assert several.pop("sha256") == one.pop("sha256") and several.pop("text") == one.pop("text") and one["tokens"] % 22
    assert several == pytest.approx(one, rel=1e-4)


# Memory


@pytest.mark.parametrize("chunk", [1, 96 * 7, 2**30])
def test_chunks_change_nothing(chunk: int, models: tuple[Any, Any], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN)
    monkeypatch.setattr("awq_hf.figures.CHUNK", chunk)
    found = awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN)
    numbers = {key: value for key, value in usual.to_dict().items() if isinstance(value, float)}
    # Not to the last bit: torch orders a sum by the tensor's shape.
    assert len(numbers) == 10 and {key: found.to_dict()[key] for key in numbers} == pytest.approx(numbers, rel=1e-11)


class LargestFloat64(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.numel = max(self.numel, result.numel())
        return result


def test_probabilities_exist_for_a_chunk_at_a_time(models: tuple[Any, Any], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 96 * 30  # 30 of the 160 positions of a batch
    monkeypatch.setattr("awq_hf.figures.CHUNK", chunk)
    with LargestFloat64() as largest:
        awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN)
    assert largest.numel == chunk


# Several models


def test_several_models_are_loaded_one_at_a_time(tokens: list[Tensor], tiny_llama: Callable[..., Any]) -> None:
    loaded: dict[str, weakref.ref[Any]] = {}
    alive: list[set[str]] = []

    def loader(name: str, scale: float) -> Callable[[], Any]:
        def load() -> Any:
            alive.append({other for other, model in loaded.items() if model() is not None})
            model = tiny_llama()
            model.itself = [model]  # as models do that were quantized in memory
            model.lm_head.weight.data.mul_(scale)
            loaded[name] = weakref.ref(model)
            return model

        return load

    models = {name: loader(name, scale) for name, scale in (("a", 1.1), ("b", 1.2), ("c", 1.3))}
    found = awq_hf.evaluate_many(models, loader("reference", 1.0), tokens, seq_len=SEQ_LEN)
    assert alive == [set(), {"reference"}, {"reference"}, {"reference"}]
    assert list(found) == ["a", "b", "c"]
    for name, load in models.items():
        assert found[name] == awq_hf.evaluate(load(), loader("again", 1.0)(), tokens, seq_len=SEQ_LEN)


def test_several_models_in_memory(models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    forwards: list[bool] = []
    handles = [model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled())) for model in models]
    found = awq_hf.evaluate_many({"reference": models[1], "model": models[0]}, models[1], tokens, seq_len=SEQ_LEN)
    assert forwards == [False] * 9  # three batches: the reference for itself once, and for the model
    for handle in handles:
        handle.remove()
    assert found["model"] == awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN)
    assert (found["reference"].kl, found["reference"].top1, found["reference"].kl_se) == (0, 1, 0)


def test_the_text_is_checked_before_anything_is_loaded() -> None:
    def load() -> Any:
        raise AssertionError("loaded")

    for texts in (None, "no-such-file.txt", [torch.tensor([5])]):
        with pytest.raises(ValueError):
            awq_hf.evaluate_many({"a": load}, load, texts)


# Refused


def test_windows_longer_than_the_model_takes(models: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="the model takes 128 tokens at once, and windows have 129"):
        awq_hf.evaluate(models[0], None, [torch.arange(3, 90).repeat(2)], seq_len=129)
    assert awq_hf.evaluate(models[0], None, [torch.arange(3, 90).repeat(2)], seq_len=128).tokens == 174
    assert awq_hf.evaluate(models[0], None, [torch.arange(3, 90)]).tokens == 87  # windows of 512, were there so many tokens


@pytest.mark.parametrize("limit, expected", [(None, 8), (8 * 22 * 96, 8), (5 * 22 * 96 + 1, 5), (1, 1)])
def test_a_batch_has_fewer_windows_where_the_vocabulary_is_large(
    limit: int | None, expected: int, models: tuple[Any, Any], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(module, "LOGITS", limit)
    widths: list[int] = []
    handle = models[0].register_forward_pre_hook(lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    awq_hf.evaluate(models[0], None, tokens, seq_len=22)
    handle.remove()
    assert max(widths) == expected


@pytest.mark.parametrize("option", ["batch_size", "max_tokens"])
def test_nothing_to_evaluate(option: str, models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{option}=0"):
        awq_hf.evaluate(models[0], None, tokens, **{option: 0})


def test_tokenizers_that_differ() -> None:
    def tokenizer(offset: int) -> Callable[..., Any]:
        return lambda text, verbose: {"input_ids": [ord(letter) + offset for letter in text]}

    module.check_same_tokens({"a": tokenizer(0), "b": tokenizer(0)}, ["some text"])
    with pytest.raises(ValueError, match="the tokenizers of a and c split"):
        module.check_same_tokens({"a": tokenizer(0), "b": tokenizer(0), "c": tokenizer(1)}, ["some text"])


def test_dropout_is_off_and_modes_are_given_back(models: tuple[Any, Any], tokens: list[Tensor]) -> None:
    usual = awq_hf.evaluate(*models, tokens, seq_len=SEQ_LEN)
    reference = copy.deepcopy(models[1]).train()
    reference.lm_head = nn.Sequential(nn.Dropout(0.5), reference.lm_head)
    reference.model.norm.eval()
    assert awq_hf.evaluate(models[0], reference, tokens, seq_len=SEQ_LEN) == usual
    assert reference.training and reference.lm_head[0].training and not reference.model.norm.training


def test_a_text_that_says_little_is_said(models: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    few = [torch.arange(3, 40)]
    awq_hf.evaluate(*models, few, seq_len=SEQ_LEN)
    assert "has only 37 tokens" in caplog.text
    caplog.clear()
    awq_hf.evaluate(*models, few, seq_len=SEQ_LEN, max_tokens=SEQ_LEN)  # as was asked
    assert "has only" not in caplog.text
