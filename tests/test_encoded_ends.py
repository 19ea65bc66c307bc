"""Embedding and head in GGUF's blocks, of tiny models: the head for what it reads, the embedding plainly, one that is both for the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf import encoded_ends
from awq_hf.calibration.data import Windows, load_windows
from awq_hf.calibration.stats import Moments
from awq_hf.encoded_layer import Encoded, EncodedLayer, decode, encode, judge_blocks
from awq_hf.encoding import encode_model
from awq_hf.recipe import Recipe

RECIPE = Recipe(samples=8, seq_len=48)
ENDS = {"model.embed_tokens": Type.Q3_K, "lm_head": Type.Q4_K}
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def windows(tokens: list[Tensor]) -> Windows:
    return load_windows(tokens, None, RECIPE.seq_len, samples=RECIPE.samples, seed=0)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tied(tiny_llama: Callable[..., Any]) -> Any:
    model = tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def searched(model: Any, windows: Windows, kinds: dict[str, Type], recipe: Recipe = RECIPE) -> tuple[Any, Encoded, list[EncodedLayer]]:
    own = copy.deepcopy(model)
    encoded = encode_model(own, kinds, recipe, windows)
    assert encoded.report is not None
    return own, encoded, encoded.report.layers  # type: ignore[return-value]


def last_norm(model: Any, windows: Windows, held_out: bool) -> Tensor:
    """What the head reads: [tokens, in]."""
    with torch.no_grad():
        batches = [batch for batch in windows.batches(RECIPE.batch_size) if batch.held_out is held_out]
        return torch.cat([model.model(batch.input_ids).last_hidden_state.flatten(0, 1) for batch in batches])


def test_a_head_and_an_embedding_of_their_own(model: Any, windows: Windows) -> None:
    found, encoded, lines = searched(model, windows, ENDS)
    for name, kind in ENDS.items():
        assert torch.equal(decode(encoded.weights[name].data, kind), found.get_submodule(name).weight)
    embedding = encode(model.model.embed_tokens.weight.detach(), Type.Q3_K, None)
    assert torch.equal(encoded.weights["model.embed_tokens"].data, embedding)
    (line,) = lines
    assert (line.name, line.kind, line.shape) == ("lm_head", "Q4_K", (96, 256)) and "descent" in line.rounding
    assert 0 < line.loss < 0.9 * line.loss_importance and line.loss < line.loss_plain
    x = last_norm(model, windows, held_out=True)
    y, stored = (x @ each.lm_head.weight.detach().T for each in (model, found))
    assert float((stored - y).square().sum() / y.square().sum()) == pytest.approx(line.loss, rel=1e-3)
    torch.testing.assert_close(encoded.importance["lm_head"], last_norm(model, windows, False).square().mean(0), rtol=1e-4, atol=0)


def test_one_tensor_that_is_both(tied: Any, windows: Windows) -> None:
    found, encoded, (line,) = searched(tied, windows, {"lm_head": Type.Q4_K})
    assert found.lm_head.weight is found.model.embed_tokens.weight and encoded.weights.keys() == {"lm_head"}
    weight = tied.lm_head.weight.detach()
    plain, stored = decode(encode(weight, Type.Q4_K, None), Type.Q4_K), decode(encoded.weights["lm_head"].data, Type.Q4_K)
    assert torch.equal(stored, found.lm_head.weight)
    x = last_norm(tied, windows, held_out=True)
    error = lambda changed: float((x @ (changed - weight).T).square().sum())  # noqa: E731
    assert error(stored) < 0.9 * error(plain)
    assert (stored - weight).norm() < 1.2 * (plain - weight).norm()  # as an embedding it is not much worse
    assert line.loss < line.loss_importance


def test_rows_are_taken_in_pieces(model: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = searched(model, windows, ENDS)
    monkeypatch.setattr(encoded_ends, "PIECE", 40 * 256)  # the last one is smaller
    pieces = searched(model, windows, ENDS)
    for name in ENDS:
        assert torch.equal(whole[1].weights[name].data, pieces[1].weights[name].data)
    assert pieces[2][0].loss == pytest.approx(whole[2][0].loss, rel=1e-5)


def test_the_blocks_are_fitted_to_the_embedding_that_is_stored(model: Any, windows: Windows) -> None:
    """In the first block there is an error to correct then."""
    (alone,) = searched(model, windows, {FIRST: Type.Q4_K})[2]
    (behind,) = searched(model, windows, {"model.embed_tokens": Type.Q2_K, FIRST: Type.Q4_K})[2]
    assert alone.correction < 0.5 < behind.correction
    assert alone.loss < behind.loss < behind.loss_importance


def test_without_descent_only_the_quantizer_is_left(model: Any, windows: Windows) -> None:
    _, encoded, (line,) = searched(model, windows, {"lm_head": Type.Q4_K}, Recipe(samples=8, seq_len=48, rounding="nearest"))
    assert line.rounding == "importance"
    expected = encode(model.lm_head.weight.detach(), Type.Q4_K, encoded.importance["lm_head"])
    assert torch.equal(encoded.weights["lm_head"].data, expected)


def test_what_loses_to_the_plain_quantizer_is_not_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 256, generator=generator) for n in (8, 400))
    held = Moments()
    held.add(x)
    blocks = encode(weight, Type.Q4_K, None)
    plain = decode(blocks, Type.Q4_K)
    candidates = {"importance": encode(weight.roll(1, 0), Type.Q4_K, None)}
    found = judge_blocks((candidates, (0.0, None)), weight, Type.Q4_K, (plain, plain), held)
    assert found.rounding == ["plain"] and found.loss == pytest.approx(found.plain) and torch.equal(found.data, blocks)


def test_a_damaged_head_is_refused_before_any_work(model: Any, windows: Windows) -> None:
    damaged = copy.deepcopy(model)
    damaged.lm_head.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^lm_head.weight holds NaN or infinity: the checkpoint is damaged"):
        encode_model(damaged, ENDS, RECIPE, windows)
    assert torch.equal(damaged.model.embed_tokens.weight, model.model.embed_tokens.weight)
