"""Adapters train through quantized Linears."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.integrations.peft import MIN_PEFT_VERSION

import awq_hf
from awq_hf import AwqLinear, compat
from tests.mixtures import MODELS, PLAIN

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


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="needs peft")


def logits_of(model: Any, prompt: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=prompt).logits


def test_lora_by_peft(model: Any, prompt: Tensor, tmp_path: Path, peft: Any, recwarn: pytest.WarningsRecorder) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    assert not [warning for warning in recwarn if "AwqLinear" in str(warning.message)]
    losses = train(adapted, prompt)
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path)
    trained = logits_of(adapted, prompt)
    base = adapted.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(base, tmp_path), prompt), trained)


def test_an_adapter_is_merged_into_dense_weights_only(quantized_dir: Path, prompt: Tensor, tmp_path: Path, peft: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_dir, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["k_proj", "down_proj"], r=4))
    train(adapted, prompt)
    adapted.save_pretrained(tmp_path / "adapter")
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ValueError, match=r"cannot be added to packed integers.*model\.dequantize\(\) first"):
            merge()
    adapted.dequantize()
    trained = logits_of(adapted, prompt)
    merged = adapted.merge_and_unload()
    assert (logits_of(merged, prompt) - trained).abs().max() < 1e-5 and not any(isinstance(m, AwqLinear) for m in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), prompt), logits_of(merged, prompt))
    dense = AutoModelForCausalLM.from_pretrained(quantized_dir, dtype=torch.float32).dequantize()
    again = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    assert torch.equal(logits_of(again, prompt), logits_of(merged, prompt))


def test_into_a_conv1d_it_is_merged_transposed(
    random_model: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, peft: Any
) -> None:
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    model = awq_hf.quantize(random_model(config), small_config(samples=2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attn.c_proj", "c_attn"], r=4))  # one is square
    train(adapted, prompt)
    adapted.dequantize()
    trained = logits_of(adapted, prompt)
    assert (logits_of(adapted.merge_and_unload(), prompt) - trained).abs().max() < 1e-5


def skip_without_transformers_own_interface() -> None:
    """It may ask for a PEFT that is newer than the one that is here, or than any that there is."""
    pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)


def test_adapters_of_transformers_own_interface(model: Any, quantized_dir: Path, prompt: Tensor, tmp_path: Path, peft: Any) -> None:
    skip_without_transformers_own_interface()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    train(model, prompt)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "config.json").exists()
    trained = logits_of(model, prompt)
    loaded = AutoModelForCausalLM.from_pretrained(quantized_dir)
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits_of(loaded, prompt), trained)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), prompt), trained)


@pytest.mark.parametrize("interface", ["transformers", "peft"])
def test_a_float_model_with_adapters_is_not_quantized(
    interface: str, llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path, peft: Any
) -> None:
    """Saving it would write the adapters alone, or names that nothing loads."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama_dir)
    config = peft.LoraConfig(target_modules=["q_proj"], r=4)
    if interface == "transformers":
        skip_without_transformers_own_interface()
        model.add_adapter(config)
    else:
        adapted = peft.get_peft_model(model, config)
        with pytest.raises(TypeError, match="PeftModel is neither a transformers model nor the name of one"):
            awq_hf.quantize(adapted, small_config(), output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="LlamaForCausalLM has adapters attached; merge them"):
        awq_hf.quantize(model, small_config(), output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_all_linear_is_every_quantized_one(model: Any, peft: Any) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    wrapped = {name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert len(wrapped) == 14 and not any("lm_head" in name for name in wrapped)
    dense = peft.get_peft_model(model.dequantize(), peft.LoraConfig(target_modules="all-linear"), adapter_name="second")
    assert {name for name, module in dense.named_modules() if "second" in getattr(module, "lora_A", ())} == wrapped


def test_prepared_for_training_as_tutorials_do(quantized_dir: Path, prompt: Tensor, peft: Any) -> None:
    """Everything is float32 then, also what kernels read, which is brought back."""
    model = AutoModelForCausalLM.from_pretrained(quantized_dir, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith((".scales", ".qzeros", ".qweight"))}
    expected = logits_of(model, prompt)
    adapted = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), peft.LoraConfig(target_modules="all-linear", r=4))
    assert adapted.get_input_embeddings().weight.dtype == torch.float32
    assert (logits_of(adapted, prompt) - expected).norm() < 0.02 * expected.norm()
    losses = train(adapted, prompt)
    assert losses[-1] < losses[0] - 0.05
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())


WRONG_BASE = "smoothing scales that were folded into the quantized model"


@pytest.fixture
def float_adapter(llama_dir: Path, prompt: Tensor, tmp_path: Path, peft: Any) -> Path:
    """An adapter that was trained on the float model."""
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama_dir), peft.LoraConfig(target_modules="all-linear", r=4))
    train(adapted, prompt)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_the_float_model_is_wrong_on_smoothed_weights(
    float_adapter: Path, llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor, caplog: Any, peft: Any
) -> None:
    """That is said, and what is said to help does."""
    expected = logits_of(AutoModelForCausalLM.from_pretrained(float_adapter), prompt)
    errors = {}
    for scale in (True, False):
        caplog.clear()
        config = small_config(samples=2, bits=8, scale=scale)
        found = logits_of(AutoModelForCausalLM.from_pretrained(float_adapter, quantization_config=config), prompt)
        assert (WRONG_BASE in caplog.text) == scale
        errors[scale] = float((found - expected).norm() / expected.norm())
    assert errors[False] < 0.02 < 0.1 < errors[True]
    caplog.clear()
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantized_dir), float_adapter)
    assert WRONG_BASE in caplog.text and str(llama_dir) in caplog.text


def test_an_adapter_of_the_quantized_model_is_at_home_there(
    model: Any, quantized_dir: Path, tmp_path: Path, caplog: Any, peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    monkeypatch.chdir(quantized_dir.parent)
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantized_dir.name), tmp_path)  # by another name of the directory
    assert WRONG_BASE not in caplog.text


def test_quantized_experts_get_no_adapter(
    random_model: Callable[..., Any], small_config: Callable[..., Any], caplog: Any, peft: Any
) -> None:
    """PEFT meets mixtures of experts in a module of its own, before the one that it uses for other models."""
    make = lambda: random_model(MODELS["qwen3"]())  # noqa: E731
    model = awq_hf.quantize(make(), small_config(samples=2, group_size=16, **PLAIN))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    assert "down_proj, gate_up_proj: quantized experts are packed integers" in caplog.text
    wrapped = {name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert {name.rpartition(".")[2] for name in wrapped} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad} >= {"q_proj", "gate"}


def test_an_adapter_with_weights_for_experts_is_not_loaded_without_them(
    random_model: Callable[..., Any], small_config: Callable[..., Any], tmp_path: Path, peft: Any
) -> None:
    adapted = peft.get_peft_model(random_model(MODELS["qwen3"]()), peft.LoraConfig(target_modules="all-linear", r=4))
    adapted.save_pretrained(tmp_path)
    model = awq_hf.quantize(random_model(MODELS["qwen3"]()), small_config(samples=2, group_size=16, **PLAIN))
    with pytest.raises(ValueError, match="gate_up_proj: quantized experts are packed integers.*this adapter has weights for them"):
        peft.PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("option", [dict(use_dora=True), dict(init_lora_weights="pissa")])
def test_what_computes_with_the_weight_is_refused(option: dict[str, Any], model: Any, peft: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* computes with the weight itself.*model.dequantize"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **option))


def test_peft_keeps_its_ways_with_other_layers(model: Any, peft: Any) -> None:
    """`model` is there so that PEFT was taught. Twice is as good as once."""
    from peft.tuners.lora import model as lora

    taught = lora.dispatch_awq
    compat.teach_peft()
    assert lora.dispatch_awq is taught
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    assert type(plain.base_model.model[0]) is peft.tuners.lora.Linear
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(nn.Sequential(nn.LayerNorm(4)), peft.LoraConfig(target_modules=["0"]))


def test_what_is_replaced_in_peft_is_what_it_calls(peft: Any) -> None:
    """Both are looked up in their modules when they are called."""
    import inspect

    from peft.tuners import tuners_utils
    from peft.tuners.lora import model as lora

    assert "dispatch_awq" in inspect.getsource(lora.LoraModel._create_new_module)
    assert "_maybe_include_all_linear_layers(" in inspect.getsource(tuners_utils.BaseTuner)


def test_without_peft_nothing_is_asked_of_it(quantized_dir: Path) -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"  # an import of it fails
        "import awq_hf, transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(quantized_dir)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
