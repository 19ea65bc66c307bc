"""A model whose blocks run one by one, out of their files, computes what it does as a whole; where it cannot, it is loaded whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from awq_hf.block_by_block import BlockByBlock
from awq_hf.calibration.data import Batch, Windows
from awq_hf.streaming import InFiles, InMemory, load_float


@pytest.fixture
def batches(tokens: list[Tensor]) -> list[Batch]:
    ids = torch.stack([row[:12] for row in tokens[:5]])
    return Windows(ids, torch.tensor([12, 12, 12, 7, 12]), "").batches(2, hold_out=False)


def logits_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False).logits.flatten(0, 1)


def in_memory(model: Any) -> list[bool]:
    return [not parameter.is_meta for parameter in model.model.layers.parameters()]


def test_logits_are_those_of_the_whole_model_and_no_block_stays(llama_dir: Path, batches: list[Batch]) -> None:
    whole = LlamaForCausalLM.from_pretrained(llama_dir)
    model, source = load_float(LlamaForCausalLM, llama_dir)
    assert isinstance(source, InFiles) and not any(in_memory(model))
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    by_block = BlockByBlock(model, source)
    by_block.run(batches, "the model")
    assert not any(in_memory(model)) and not by_block.whole
    for position, batch in enumerate(batches):
        assert torch.equal(by_block.logits(position, batch), logits_of(whole, batch))


def test_the_same_batches_run_once(llama_dir: Path, batches: list[Batch], loaded: list[int]) -> None:
    by_block = BlockByBlock(*load_float(LlamaForCausalLM, llama_dir))
    by_block.run(batches, "the model")
    assert loaded == [0, 1, 0, 1]  # the first batch through all of it, then all batches
    by_block.run(list(batches), "the model")
    assert len(loaded) == 4
    by_block.run(batches[:2], "the model")
    assert len(loaded) == 8
    padded = torch.ones_like(batches[1].input_ids)
    padded[0, -3:] = 0
    by_block.run([batches[0], replace(batches[1], mask=padded)], "the model")
    assert len(loaded) == 12


@pytest.mark.parametrize("from_files", [True, False])
def test_blocks_are_changed_once_as_they_come(from_files: bool, llama_dir: Path, batches: list[Batch]) -> None:
    def double(name: str, block: nn.Module) -> None:
        assert name.startswith("model.layers.")
        block.get_parameter("mlp.down_proj.weight").data.mul_(2)

    model, source = load_float(LlamaForCausalLM, llama_dir) if from_files else (LlamaForCausalLM.from_pretrained(llama_dir), InMemory())
    by_block = BlockByBlock(model, source, double)
    by_block.run(batches, "the model")
    changed = LlamaForCausalLM.from_pretrained(llama_dir)
    for layer in changed.model.layers:
        layer.mlp.down_proj.weight.data.mul_(2)
    assert torch.equal(by_block.logits(1, batches[1]), logits_of(changed, batches[1]))


class _Remembers(nn.Module):
    """Leaves its input behind, on the model, for what comes later."""

    def __init__(self, inner: nn.Module, memory: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner, self.memory = inner, memory

    def forward(self, x: Tensor) -> Tensor:
        self.memory["x"] = x
        return self.inner(x)


class _Recalls(_Remembers):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.memory["x"].mean()


def twice(model: Any) -> None:
    first, second = model.model.layers
    model.model.layers.append(second)
    model.model.layers[1] = first
    model.config.num_hidden_layers = 3
    model.config.layer_types = ["full_attention"] * 3


def leaving_something(model: Any) -> None:
    memory: dict[str, Tensor] = {}
    for layer, kind in zip(model.model.layers, (_Remembers, _Recalls), strict=True):
        layer.mlp = kind(layer.mlp, memory)


@pytest.mark.parametrize("make", [twice, leaving_something])
def test_what_cannot_run_so_is_loaded_whole(
    make: Callable[[Any], None], llama_dir: Path, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_dir)
    make(model)
    expected = [logits_of(model, batch) for batch in batches]
    by_block = BlockByBlock(model, InMemory())
    by_block.run(batches, "this model")
    assert by_block.whole and "the blocks of this model do not run one by one, so that all of its weights are loaded" in caplog.text
    assert all(torch.equal(by_block.logits(i, batch), expected[i]) for i, batch in enumerate(batches))


def test_all_of_a_model_that_is_not_in_safetensors_is_loaded(tiny_llama: Callable[..., Any], tmp_path: Path, batches: list[Batch]) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded, source = load_float(LlamaForCausalLM, tmp_path)
    assert source.later is None and all(in_memory(loaded))
    assert torch.equal(logits_of(loaded, batches[0]), logits_of(model, batches[0]))
