"""Models that transformers would split over several processes: refused by name, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import awq_hf


@pytest.fixture
def two_processes() -> Iterator[None]:
    """Of which the other is not there."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_plan": "auto"}, {"fsdp_size": 2}, {"pp_size": 2}])
@pytest.mark.parametrize("quantizing", [True, False])
def test_a_model_is_not_split_over_processes(
    sizes: dict[str, Any],
    quantizing: bool,
    two_processes: None,
    llama_dir: Path,
    quantized_dir: Path,
    small_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {"quantization_config": small_config()} if quantizing else {}
    size = next(iter(sizes)).replace("plan", "size")
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM is split over several processes \({size}=2\), .* leave out tp_plan"):
        AutoModelForCausalLM.from_pretrained(
            llama_dir if quantizing else quantized_dir, distributed_config=DistributedConfig(**sizes), **options
        )


def test_a_model_in_memory_that_is_split(two_processes: None, tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    model = tiny_llama()
    mesh = init_device_mesh("cpu", (2,))
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"split over several processes \(its weights are DTensors\)"):
        awq_hf.quantize(model, small_config())


def test_a_plan_for_one_process_splits_nothing(quantized_dir: Path, prompt: Tensor) -> None:
    alone = AutoModelForCausalLM.from_pretrained(quantized_dir, distributed_config=DistributedConfig(tp_plan="auto"))
    assert torch.equal(alone(prompt).logits, AutoModelForCausalLM.from_pretrained(quantized_dir)(prompt).logits)
