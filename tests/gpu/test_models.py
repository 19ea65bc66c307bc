"""Whole models on a GPU: quantized on the spot, saved, loaded again, generated with in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from awq_hf.linear import PackedModule
from tests.gpu import gpu
from tests.gpu.gpu import DEVICE, error
from tests.mixtures import MODELS

gpu.require()
pytestmark = pytest.mark.usefixtures("usual_kernels")

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=["llama", "qwen3 with experts"])
def original(
    request: pytest.FixtureRequest, llama_dir: Path, random_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A float checkpoint."""
    if request.param == "llama":
        return llama_dir
    path = tmp_path_factory.mktemp("experts")
    random_model(MODELS["qwen3"]()).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest, original: Path, small_config: Callable[..., Any], usual_kernels: None) -> Any:
    return load(original, dtype=request.param, quantization_config=small_config())


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"device_map": 0, **options}).eval()


def packed(model: Any) -> list[PackedModule]:
    return [module for module in model.modules() if isinstance(module, PackedModule)]


def logits(model: Any, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(prompt.to(model.device)).logits
        return result


def test_quantized_on_the_spot(model: Any, original: Path, prompt: Tensor) -> None:
    assert all(parameter.device == DEVICE for parameter in model.parameters())
    assert packed(model) and all(module.layout == "triton" for module in packed(model))
    found = logits(model, prompt)
    assert found.isfinite().all() and torch.equal(found, logits(model, prompt))
    assert error(found.cpu(), logits(load(original, device_map="cpu"), prompt)) < 0.3  # 4 bits of random weights


def test_saved_and_loaded(model: Any, prompt: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    found = logits(model, prompt)
    assert torch.equal(logits(load(tmp_path, dtype=model.dtype), prompt), found)
    on_cpu = load(tmp_path, dtype=torch.float32, device_map="cpu")
    assert error(found.cpu(), logits(on_cpu, prompt)) < 0.05
    moved = load(tmp_path, dtype=model.dtype, device_map="cpu").to(DEVICE)
    assert torch.equal(logits(moved, prompt), found)
    assert all(module.layout == "triton" for some in (moved, on_cpu.to(model.dtype).to(DEVICE)) for module in packed(some))


def test_dequantized(original: Path, small_config: Callable[..., Any], prompt: Tensor) -> None:
    model = load(original, dtype=torch.float16, quantization_config=small_config())
    found = logits(model, prompt)
    assert error(logits(model.dequantize(), prompt), found) < 0.01


@pytest.mark.parametrize("compiled", [False, True])
def test_generate_with_a_static_cache(compiled: bool, model: Any, prompt: Tensor) -> None:
    """Compiled, what follows the prompt runs in CUDA graphs; the first step then has to give what it gives by itself."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    options |= dict(attention_mask=torch.ones_like(prompt).to(DEVICE), return_dict_in_generate=True, output_logits=True)
    expected = model.generate(prompt.to(DEVICE), **options)
    if compiled:
        options["compile_config"] = transformers.CompileConfig(mode="reduce-overhead", fullgraph=True)
    found = model.generate(prompt.to(DEVICE), cache_implementation="static", disable_compile=not compiled, **options)
    assert found.sequences.shape == (2, 24)
    assert error(found.logits[0], expected.logits[0]) < 0.01 and error(found.logits[1], expected.logits[1]) < 0.01
    if compiled:
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] > 0 and counters["inductor"]["cudagraph_skips"] == 0


def test_adapters_train(model: Any, prompt: Tensor) -> None:
    """Gradients reach what is before quantized layers."""
    x = model.get_input_embeddings()(prompt.to(DEVICE)).detach().requires_grad_()
    model(inputs_embeds=x).logits.float().square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.norm()) > 0
