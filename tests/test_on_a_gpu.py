"""Quantizing on a GPU, as far as one can be pretended: everything that meets is on one device, and the result is the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf import AwqLinear
from tests.conftest import LLAMA
from tests.pretended_gpu import OnGpu, on_cpu, pretended_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with pretended_gpu(monkeypatch) as device:
        yield device


def test_the_pretended_gpu_refuses_what_a_real_one_would(gpu: torch.device) -> None:
    x, y = torch.arange(6.0, device=gpu).reshape(2, 3), torch.ones(3)
    assert isinstance(x, OnGpu) and x.device == gpu and isinstance(x[0], OnGpu)
    with pytest.raises(AssertionError, match="on the GPU and on the CPU"):
        x @ y
    with pytest.raises(AssertionError, match="on the GPU and on the CPU"):
        torch.cat([x[0], y])
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        x.numpy()
    assert torch.equal((x @ y.to(gpu)).cpu(), torch.tensor([3.0, 12.0])) and float(x.sum()) == 15
    assert torch.equal((x * torch.tensor(2.0))[torch.tensor([1])].cpu(), torch.tensor([[6.0, 8.0, 10.0]]))
    view = x[1]
    view.mul_(0)
    x.data[0, 0] = 7
    assert torch.equal(x.cpu(), torch.tensor([[7.0, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    x.copy_(torch.ones(2, 3))
    assert float(x.sum()) == 6


MODELS = {
    "llama": lambda: transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1}),
    "experts": lambda: transformers.MixtralConfig(**{**LLAMA, "num_hidden_layers": 1}, num_local_experts=2),
}


SAME: Any = dict(attn_implementation="eager", experts_implementation="eager")  # others differ by the device


@pytest.mark.parametrize("name", MODELS)
def test_quantizing_gives_what_a_cpu_gives(
    name: str, random_model: Callable[..., Any], small_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(MODELS[name]()).save_pretrained(tmp_path)
    options = dict(samples=3, seq_len=24)  # few: every operation goes through Python
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=small_config(**options), **SAME)
    with pretended_gpu(monkeypatch) as gpu:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=small_config(**options), **SAME, device_map=gpu)
    found, wanted = on_cpu(model.state_dict()), expected.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())
    assert [vars(layer) for layer in model.awq_report.layers] == [vars(layer) for layer in expected.awq_report.layers]
    assert model.awq_report.machine["device"] == "pretended" and model.awq_report.peak_memory_bytes["device"] == 1


def test_loading_brings_weights_into_the_layout_of_the_gpus_kernels_and_back(
    gpu: torch.device, quantized_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWQ_HF_KERNEL")
    model = AutoModelForCausalLM.from_pretrained(quantized_dir, dtype=torch.float16, device_map=gpu)
    packed = [module for module in model.modules() if isinstance(module, AwqLinear)]
    assert packed and {module.layout for module in packed} == {"triton"}
    found, wanted = on_cpu(model.state_dict()), load_file(quantized_dir / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items() if name.endswith(("qweight", "qzeros", "scales")))
    assert not any(isinstance(module, AwqLinear) for module in model.dequantize().modules())


def test_measuring(gpu: torch.device, llama_dir: Path, quantized_dir: Path) -> None:
    model, reference = (AutoModelForCausalLM.from_pretrained(path, device_map=gpu) for path in (quantized_dir, llama_dir))
    text = [torch.randint(3, 96, (600,), generator=torch.Generator().manual_seed(5))]
    found = awq_hf.evaluate(model, reference, text, seq_len=64)
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (quantized_dir, llama_dir))
    assert found.to_dict()["kl"] == pytest.approx(awq_hf.evaluate(model, reference, text, seq_len=64).to_dict()["kl"], rel=1e-4)
