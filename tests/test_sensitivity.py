"""Predicted against measured divergence, on models small enough to try everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf import fisher, sensitivity
from awq_hf.calibration.data import Windows, load_windows
from awq_hf.encoded_layer import decode, encode
from awq_hf.evaluate import evaluate
from awq_hf.sensitivity import NARROW, WIDE, candidates, measure

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


@pytest.fixture
def windows(tokens: list[Tensor]) -> Windows:
    """The last one is padded, and runs with another."""
    found = load_windows(tokens, None, 42)
    assert found.batches(fisher.WINDOWS, hold_out=False)[-1].mask is not None
    return found


def test_predicted_divergence_is_the_measured_one(model: Any, windows: Windows, tokens: list[Tensor]) -> None:
    found = measure(model, windows, NAMES)
    assert {name: list(of) for name, of in found.items()} == {name: [*NARROW] for name in NAMES}
    predicted, real = [], []
    for name, costs in found.items():
        linear = model.get_submodule(name)
        original = linear.weight.data
        for kind in (Type.Q4_0, Type.Q5_0, Type.Q8_0):
            reference = evaluate_with(model, linear, decode(encode(original, kind, None), kind), original, tokens)
            predicted.append(costs[kind])
            real.append(reference)
    p, r = torch.tensor(predicted, dtype=torch.float64), torch.tensor(real, dtype=torch.float64)
    assert bool(((r / p > 0.5) & (r / p < 2)).all()), r / p
    ranks = torch.stack([p.argsort().argsort().double(), r.argsort().argsort().double()])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.95


def evaluate_with(model: Any, linear: Any, changed: Tensor, original: Tensor, tokens: list[Tensor]) -> float:
    """KL of the model with one weight changed."""
    reference = copy.deepcopy(model)
    linear.weight.data = changed
    try:
        return float(evaluate(model, reference, tokens, seq_len=42).kl or 0)
    finally:
        linear.weight.data = original


@pytest.fixture(scope="module")
def mixture(random_model: Callable[..., Any]) -> Any:
    from transformers import Qwen3MoeConfig

    sizes = dict(vocab_size=96, hidden_size=64, moe_intermediate_size=32, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=128)
    return random_model(Qwen3MoeConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def test_experts_are_predicted_as_they_are_measured(mixture: Any, windows: Windows, tokens: list[Tensor]) -> None:
    names = [f"model.layers.{i}.mlp.experts.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")]
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    found = measure(mixture, windows, names, [Type.Q4_0, Type.Q5_0, Type.Q8_0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
    ratios = []
    for name, costs in found.items():
        assert costs[Type.Q8_0] < costs[Type.Q5_0] < costs[Type.Q4_0]
        module, part = mixture.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        changed = copy.deepcopy(module.down_proj if part == "down_proj" else module.gate_up_proj).data
        of = changed if part == "down_proj" else changed.chunk(2, 1)[part == "up_proj"]
        of.copy_(decode(encode(of.flatten(0, 1), Type.Q5_0, None), Type.Q5_0).view_as(of))
        reference = copy.deepcopy(mixture)
        (module.down_proj if part == "down_proj" else module.gate_up_proj).data = changed
        ratios.append(float(evaluate(mixture, reference, tokens, seq_len=42).kl or 0) / costs[Type.Q5_0])
        mixture.load_state_dict(before)
    assert all(0.5 < ratio < 5 for ratio in ratios[:3]), ratios  # the second router chooses others for some tokens
    assert all(0.5 < ratio < 2 for ratio in ratios[3:]), ratios


def test_padding_makes_no_difference(model: Any, windows: Windows) -> None:
    ids = windows.input_ids.clone()
    for row, length in zip(ids, windows.lengths, strict=True):
        row[int(length) :] = 5
    other = Windows(ids, windows.lengths, "")
    kinds = [Type.Q4_0]
    assert measure(model, windows, NAMES, kinds) == measure(model, other, NAMES, kinds)  # and the same twice


def test_the_model_is_left_as_it_was(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    model = tiny_llama().train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)

    def state() -> Any:
        modes = [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]
        return *modes, [(p.requires_grad, p.grad is None, float(p.detach().double().sum())) for p in model.parameters()]

    before = state()
    measure(model, windows, NAMES[:2], [Type.Q8_0])
    assert state() == before
    with pytest.raises(RuntimeError, match="size mismatch|shape"):
        model.lm_head.weight.data = model.lm_head.weight.data[:, :10]
        measure(model, windows, NAMES[:2], [Type.Q8_0])
    assert state()[:2] == before[:2] and [p[0] for p in state()[2]] == [p[0] for p in before[2]]


def test_a_sample_of_rows_stands_for_all(model: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [Type.Q4_0]
    every = measure(model, windows, NAMES, kinds)
    monkeypatch.setattr(sensitivity, "ROWS", 12)
    for name, costs in measure(model, windows, NAMES, kinds).items():
        assert costs[Type.Q4_0] == pytest.approx(every[name][Type.Q4_0], rel=0.25), name


def test_other_layouts_and_dtypes(random_model: Callable[..., Any], tiny_llama: Callable[..., Any], windows: Windows) -> None:
    """GPT-2 keeps its weights as [in, out]; bfloat16 is close to float32."""
    from transformers import GPT2Config

    gpt2 = random_model(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_inner=96, n_positions=64))
    name = "transformer.h.0.mlp.c_proj"
    cost = measure(gpt2, windows, [name], [Type.Q4_0])[name][Type.Q4_0]
    matrix = gpt2.get_submodule(name)
    original = matrix.weight.data
    real = evaluate_with(
        gpt2, matrix, decode(encode(original.T.contiguous(), Type.Q4_0, None), Type.Q4_0).T, original, list(windows.input_ids)
    )
    assert 0.5 < real / cost < 2
    half, whole = (measure(tiny_llama(dtype), windows, NAMES, [Type.Q4_0]) for dtype in (torch.bfloat16, torch.float32))
    for name in NAMES:
        assert half[name][Type.Q4_0] == pytest.approx(whole[name][Type.Q4_0], rel=0.3), name


def test_a_model_that_works_in_place(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    """On the output of the very Linear that gradients begin at."""
    found = []
    for inplace in (False, True):
        model = tiny_llama()
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.SiLU(inplace=inplace)
        found.append(measure(model, windows, ["model.layers.0.mlp.gate_proj"], [Type.Q4_0]))
    assert found[0] == found[1]


def test_candidates() -> None:
    assert candidates(4096) == [*WIDE] and candidates(96) == [*NARROW] and candidates(40) == []


def test_refusals(model: Any, tiny_llama: Callable[..., Any], windows: Windows) -> None:
    with pytest.raises(ValueError, match="model.layers.7.mlp.up_proj is not there; only Linears"):
        measure(model, windows, ["model.layers.7.mlp.up_proj"])
    with pytest.raises(ValueError, match="model.norm is a LlamaRMSNorm; only Linears"):
        measure(model, windows, ["model.norm"])
    with pytest.raises(ValueError, match="model.merge is neither in a block nor the head"):
        other = tiny_llama()
        other.model.merge = torch.nn.Linear(64, 64)
        measure(other, windows, ["model.merge"])
    with pytest.raises(ValueError, match="q_proj has rows of 64 weights, which no type's blocks divide"):
        measure(model, windows, NAMES[:1], [Type.Q4_K])
    model = tiny_llama()
    model.model.layers[0].unused = torch.nn.Linear(64, 8)
    with pytest.raises(ValueError, match=r"no calibration token reached model.layers.0.unused"):
        measure(model, windows, [*NAMES, "model.layers.0.unused"])
