"""Gradients a block at a time, beside one backward pass through the whole model, and what is known of some of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from awq_hf import fisher
from awq_hf.blocks import find_blocks, matrices_of
from awq_hf.calibration.data import Windows, load_windows
from awq_hf.calibration.stream import model_inputs
from awq_hf.fisher import Sums, measure_gradients
from awq_hf.streaming import InFiles, InMemory, load_float
from tests.mixtures import MODELS as MIXTURES
from tests.test_architectures import ARCHITECTURES


@pytest.fixture
def windows(tokens: list[Tensor]) -> Windows:
    """Three; the last one is padded, and runs with another."""
    found = load_windows([*tokens[:2], tokens[-1][:18]], None, 42)
    return Windows(found.input_ids[-3:], found.lengths[-3:], "")


def linears(model: Any) -> dict[str, torch.nn.Module]:
    prefix, blocks = find_blocks(model)
    found = {f"{prefix}.{i}.{name}": module for i, block in enumerate(blocks) for name, module in matrices_of(block).items()}
    return {**found, "lm_head": model.lm_head}


def measured(model: Any, windows: Windows, source: InMemory | None = None) -> dict[str, Sums]:
    return {name: sums for part in measure_gradients(model, windows, linears(model), source or InMemory()) for name, sums in part.items()}


def look(seen: dict[str, tuple[Tensor, Tensor]], name: str, _: Any, args: Any, y: Tensor) -> None:
    y.retain_grad()
    seen[name] = args[0].detach(), y


def at_once(model: PreTrainedModel, windows: Windows) -> dict[str, tuple[Tensor, Tensor]]:
    """(Energy, gradient) by autograd alone."""
    energy: dict[str, Any] = {}
    gradient: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(fisher.SEED)
    for batch in windows.batches(fisher.WINDOWS, hold_out=False):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [module.register_forward_hook(partial(look, seen, name)) for name, module in linears(model).items()]
        fisher._likelihood_of_own_labels(model(**model_inputs(model, batch)).logits, batch, generator).backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in seen.items():
            assert y.grad is not None
            energy[name] = energy.get(name, 0) + batch.real_tokens(x.flatten(0, -2)).square().sum(0)
            gradient[name] = gradient.get(name, 0) + y.grad.flatten(0, -2).square().sum(0)
    return {name: (energy[name] / windows.tokens, gradient[name] / windows.tokens) for name in energy}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
def test_gradients_are_those_of_the_whole_model(name: str, random_model: Callable[..., Any], windows: Windows) -> None:
    architecture = ARCHITECTURES[name]
    model = random_model(getattr(transformers, architecture.config)(**architecture.sizes))
    found, expected = measured(model, windows), at_once(model, windows)
    assert found.keys() == expected.keys()
    for name, (energy, gradient) in expected.items():
        torch.testing.assert_close(found[name].energy[0], energy, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name].gradient[0], gradient, rtol=1e-3, atol=1e-4 * float(gradient.max()))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_one_block_is_in_memory_at_a_time(
    kind: str, tiny_llama: Callable[..., Any], random_model: Callable[..., Any], windows: Windows, tmp_path: Path, monkeypatch: Any
) -> None:
    """To the same result as of a model in memory, bit for bit; and every block is left in its file."""
    model = tiny_llama(num_hidden_layers=3) if kind == "llama" else random_model(MIXTURES[kind]())
    model.save_pretrained(tmp_path)
    weights: list[weakref.ref[Any]] = []
    load = InFiles.load

    def watched(self: InFiles, index: int) -> None:
        gc.collect()
        assert not any(weight() is not None for weight in weights), "float weights that were there before are kept by something"
        load(self, index)
        weights.extend(weakref.ref(parameter) for parameter in self.blocks[index].parameters())

    streamed, source = load_float(AutoModelForCausalLM, tmp_path)
    monkeypatch.setattr(InFiles, "load", watched)
    found, expected = measured(streamed, windows, source), measured(model, windows)
    assert len(weights) == 2 * sum(1 for _ in find_blocks(model)[1].parameters())
    assert all(parameter.is_meta for parameter in find_blocks(streamed)[1].parameters())
    assert all(torch.equal(getattr(found[name], part), getattr(of, part)) for name, of in expected.items() for part in vars(of))


def test_blocks_below_the_first_that_is_asked_for_stay_where_they_are(
    tiny_llama: Callable[..., Any], windows: Windows, tmp_path: Path, loaded: list[int]
) -> None:
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path)
    model, source = load_float(AutoModelForCausalLM, tmp_path)
    name = "model.layers.1.mlp.up_proj"
    head, last, asked = measure_gradients(model, windows, {name: model.get_submodule(name)}, source)
    assert (head, last, list(asked), loaded) == ({}, {}, [name], [0, 1, 2, 2, 1])


def test_blocks_that_share_more_than_hidden_states_are_refused(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    model = tiny_llama()
    for layer in model.model.layers:

        def forward(x: Tensor, *args: Any, shared: Any, inner: Any = layer.forward, **kwargs: Any) -> Tensor:
            shared["x"] = x
            found: Tensor = inner(x, *args, **kwargs)
            return found

        layer.forward = forward
    inside = model.model.forward
    model.model.forward = lambda *args, **kwargs: inside(*args, shared={}, **kwargs)  # which the model hands to its layers
    with pytest.raises(ValueError, match="hand each other more than hidden states"):
        measured(model, windows)


def test_what_is_known_of_the_last_layer(tiny_llama: Callable[..., Any], tokens: list[Tensor]) -> None:
    """There g = onehot(label) - p, so that E[g_o^2] = E[p_o (1 - p_o)]; padding counts for nothing."""
    model, windows = tiny_llama(), load_windows(tokens, None, 42)
    sums = next(measure_gradients(model, windows, {"lm_head": model.lm_head}, InMemory()))["lm_head"]
    expected, energy = torch.zeros(96), torch.zeros(64)
    with torch.no_grad():
        for ids, length in zip(windows.input_ids, windows.lengths, strict=True):
            states = model.model(ids[None, : int(length)]).last_hidden_state[0]
            p = model.lm_head(states).softmax(1)
            expected += (p * (1 - p)).sum(0) / windows.tokens
            energy += states.square().sum(0) / windows.tokens
    torch.testing.assert_close(sums.energy[0], energy)
    gradient = sums.gradient[0]
    assert abs(float(gradient.sum() / expected.sum()) - 1) < 0.02
    large = expected.topk(24).indices
    assert float((gradient[large] / expected[large] - 1).abs().mean()) < 0.35  # labels are drawn: some 500 of them


def test_what_is_known_of_experts(random_model: Callable[..., Any], tokens: list[Tensor]) -> None:
    """The mean square of what each expert is sent, and no padding; gradients of its outputs are those of the layer's, times its shares."""
    mixture, windows = random_model(MIXTURES["olmoe"]()), load_windows(tokens, None, 42)
    module = mixture.model.layers[1].mlp.experts
    count, hidden, inner = module.down_proj.shape
    name = "model.layers.1.mlp.experts.down_proj"
    _, found = measure_gradients(mixture, windows, {name: module}, InMemory())
    sums, total, counts = found[name], torch.zeros(count, inner), torch.zeros(count)

    def look(_: Any, args: Any) -> None:
        for expert in range(count):
            x = args[0][(args[1] == expert).any(1)]
            h = module._apply_gate(x @ module.gate_up_proj[expert].T)
            total[expert] += h.square().sum(0)
            counts[expert] += len(x)

    handle = module.register_forward_pre_hook(look)
    with torch.no_grad():
        for ids, length in zip(windows.input_ids, windows.lengths, strict=True):
            mixture(ids[None, : int(length)])
    handle.remove()
    assert torch.equal(sums.tokens, counts)
    torch.testing.assert_close(sums.energy, total / counts[:, None])
    assert sums.gradient.shape == (count, hidden) and bool((sums.gradient > 0).all())
