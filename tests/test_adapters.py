"""Adapters train through quantized Linears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from awq_hf import AwqLinear

pytestmark = pytest.mark.usefixtures("usual_kernels")


@pytest.fixture
def model(quantized_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(quantized_dir)


def train(model: nn.Module, prompt: Tensor, steps: int = 8) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(steps):
        loss = model(prompt, labels=prompt).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_trainer_takes_the_model_for_trainable(model: Any) -> None:
    assert model.hf_quantizer.is_trainable


def test_gradients_reach_what_is_below_every_quantized_linear(model: Any, prompt: Tensor) -> None:
    model.requires_grad_(False)
    offset = nn.Parameter(torch.zeros(64))
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + offset)
    model(prompt, labels=prompt).loss.backward()
    assert offset.grad is not None and float(offset.grad.norm()) > 0


def test_lora_by_peft(model: Any, prompt: Tensor, tmp_path: Path, make_lora: Callable[[], Any]) -> None:
    import peft

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, make_lora())
    losses = train(adapted, prompt)
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path)
    base = adapted.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=make_lora())
    assert float(again(prompt, labels=prompt).loss) < losses[0] - 0.05


@pytest.fixture
def make_lora() -> Callable[[], Any]:
    """As README.md says it."""
    peft = pytest.importorskip("peft", reason="needs peft")

    def make() -> Any:
        lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=True)
        lora._register_custom_module({AwqLinear: peft.tuners.lora.Linear})
        return lora

    return make
