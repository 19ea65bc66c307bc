"""Experts quantized on the spot: better than plain rounding, whatever number of tokens reached them, and saved as others read them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf import expert_block
from awq_hf.experts import AwqExperts, gate_is_linear_in_up
from awq_hf.inspection import Forecast, inspect
from awq_hf.preflight import make_plan
from tests.mixtures import MODELS, PLAIN, QWEN, SIZES, config_for, enough_text


@pytest.fixture(scope="module")
def enough() -> list[Tensor]:
    return enough_text()


def divergence(model: Any, original: Any) -> float:
    """KL of the next token's distribution, on text that was not calibrated on."""
    text = torch.randint(3, 96, (16, 40), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        p, q = (each(text).logits.float().log_softmax(-1) for each in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest, random_model: Callable[..., Any]) -> Any:
    return random_model(MODELS[request.param]())


@pytest.fixture(scope="module")
def quantized(original: Any, enough: list[Tensor]) -> Any:
    return awq_hf.quantize(copy.deepcopy(original), config_for(enough))


def test_the_skip_list_that_is_saved_can_be_quantized_with(original: Any, quantized: Any) -> None:
    """It calls routers by their names in the files as well."""
    saved, plain = (make_plan(original, config.recipe()) for config in (quantized.config.quantization_config, config_for([])))
    assert saved.specs.keys() == plain.specs.keys()


def test_experts_are_better_than_plainly_rounded(original: Any, quantized: Any, enough: list[Tensor]) -> None:
    plain = awq_hf.quantize(copy.deepcopy(original), config_for(enough, **PLAIN))
    assert divergence(quantized, original) < 0.7 * divergence(plain, original)
    # That is not the Linears' doing alone: with the plainly rounded experts it is worse.
    mixed = copy.deepcopy(quantized)
    for name, module in plain.named_modules():
        if isinstance(module, AwqExperts):
            folded = mixed.get_submodule(name.replace("mlp.experts", "post_attention_layernorm"))
            folded.weight.data.copy_(plain.get_submodule(name.replace("mlp.experts", "post_attention_layernorm")).weight)
            mixed.set_submodule(name, module)
            router = name.replace("experts", "gate")
            mixed.get_submodule(router).weight.data.copy_(plain.get_submodule(router).weight)
    if not hasattr(original.model.layers[0].mlp, "shared_expert"):  # its inputs are scaled as well
        assert divergence(quantized, original) < 0.9 * divergence(mixed, original)


def test_every_matrix_is_reported(original: Any, quantized: Any) -> None:
    report = quantized.awq_report
    layers = {layer.name: layer for layer in report.layers}
    holders = [name for name, module in quantized.named_modules() if isinstance(module, AwqExperts)]
    assert holders == [name for name, module in original.named_modules() if hasattr(module, "gate_up_proj")]
    for name in holders:
        gate_up, down = (layers[f"{name}.{part}"] for part in ("gate_up_proj", "down_proj"))
        assert (gate_up.shape, gate_up.experts, gate_up.fold) == ((64, 64), 4, "post_attention_layernorm")
        assert (down.shape, down.experts, down.fold) == ((64, 32), 4, "mlp.experts.gate_up_proj")
        assert all(0 < layer.loss <= layer.loss_plain and not layer.few_tokens for layer in (gate_up, down))
        assert report.left_in_float[name.replace("experts", "gate")].endswith("Router is not a plain Linear")
    assert not any("fewer calibration tokens" in note for note in report.notes)


def test_routers_take_scales_that_change_no_choice(random_model: Callable[..., Any], enough: list[Tensor]) -> None:
    """Powers of two, which a weight and a norm of any dtype hold exactly."""
    original = random_model(MODELS["olmoe"](), torch.bfloat16)
    for block in original.model.layers:
        block.post_attention_layernorm.weight.data *= torch.linspace(-2, 2, 64).exp()
    quantized = awq_hf.quantize(copy.deepcopy(original), config_for(enough, rounding="nearest"))
    for before, after in zip(original.model.layers, quantized.model.layers, strict=True):
        for parameter in ("mlp.gate.weight", "post_attention_layernorm.weight"):
            factors = (after.get_parameter(parameter).float() / before.get_parameter(parameter).float()).log2()
            assert bool((factors == factors.round()).all()) and bool((factors != 0).any())


def test_saved_as_other_loaders_read_it(quantized: Any, prompt: Tensor, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mixtral = quantized.config.model_type == "mixtral"
    start = "model.layers.0.block_sparse_moe" if mixtral else "model.layers.0.mlp"
    parts = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for expert in range(4):
        for part, columns in zip(parts, (64, 64, 32), strict=True):
            rows = 64 if part == parts[2] else 32
            assert tensors[f"{start}.experts.{expert}.{part}.qweight"].shape == (columns, rows // 8)
            assert tensors[f"{start}.experts.{expert}.{part}.scales"].dtype == torch.float16
    assert f"{start}.gate.weight" in tensors and not any("gate_up_proj" in name for name in tensors)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    skipped = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert f"{start}.gate" in skipped and not any(entry in name for entry in skipped for name in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(prompt).logits, quantized(prompt).logits)
        dense = copy.deepcopy(quantized).dequantize()
        torch.testing.assert_close(dense(prompt).logits, quantized(prompt).logits, rtol=1e-4, atol=1e-4)


def test_from_pretrained_gives_the_same(original: Any, quantized: Any, enough: list[Tensor], prompt: Tensor, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config_for(enough))
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, quantized(prompt).logits)
    model.save_pretrained(tmp_path / "a")
    quantized.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / each / "model.safetensors") for each in ("a", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [dict(stream="float"), dict(zero_point=False), dict(bits=8), dict(bits=3, rounding="gptq")])
def test_other_recipes(options: dict[str, Any], random_model: Callable[..., Any], enough: list[Tensor], tokens: list[Tensor]) -> None:
    dtype = torch.float32 if options.get("bits") == 8 else torch.bfloat16  # which costs more than 8-bit weights do
    original = random_model(MODELS["qwen2"](), dtype)
    text = [*enough[:20], *tokens]  # of different lengths: padding is not counted
    model = awq_hf.quantize(copy.deepcopy(original), config_for(text, **options))
    plain = awq_hf.quantize(copy.deepcopy(original), config_for(text, **{**options, **PLAIN}))
    assert divergence(model, original) < divergence(plain, original)


def test_a_checkpoint_that_holds_them_fused(random_model: Callable[..., Any], enough: list[Tensor], tmp_path: Path) -> None:
    """As some programs write what they found in memory; what is written of it is one matrix each all the same."""
    original = random_model(MODELS["qwen3"]())
    original.save_pretrained(tmp_path / "float")
    save_file(original.state_dict(), tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config_for(enough, **PLAIN))
    model.save_pretrained(tmp_path / "awq")
    assert "model.layers.0.mlp.experts.3.up_proj.qweight" in load_file(tmp_path / "awq" / "model.safetensors")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "awq").model.layers[0].mlp.experts, AwqExperts)


def test_names_of_the_files_are_understood_and_written(random_model: Callable[..., Any], enough: list[Tensor], tmp_path: Path) -> None:
    """Mixtral's experts are in block_sparse_moe there, in mlp in the model; also where a checkpoint held them fused, under the latter."""
    model = random_model(MODELS["mixtral"]())
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    model.save_pretrained(tmp_path / "usual")
    options = dict(PLAIN, modules_to_not_convert=["block_sparse_moe.experts"])
    skipped = awq_hf.quantize(tmp_path / "usual", config_for(enough, **options), output_dir=tmp_path / "skipped")
    assert not any(isinstance(module, AwqExperts) for module in skipped.modules())
    written = json.loads((tmp_path / "skipped" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert any(entry in "model.layers.0.block_sparse_moe.experts.0.w1" for entry in written)
    renamed = Path(shutil.copytree(tmp_path / "fused", tmp_path / "renamed"))  # transformers reads and saves this one too
    tensors = {name.replace(".mlp.", ".block_sparse_moe."): t for name, t in load_file(renamed / "model.safetensors").items()}
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    awq_hf.quantize(renamed, config_for(enough, **PLAIN), output_dir=tmp_path / "from renamed")
    quantized = awq_hf.quantize(tmp_path / "fused", config_for(enough, **PLAIN), output_dir=tmp_path / "awq")
    assert (tmp_path / "from renamed" / "model.safetensors").read_bytes() == (tmp_path / "awq" / "model.safetensors").read_bytes()
    awq_hf.export(renamed, "dense", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert dense.keys() == tensors.keys() and all(torch.equal(dense[name], tensors[name]) for name in tensors)
    said = inspect(str(renamed), config_for(enough))
    assert isinstance(said, Forecast) and said.refusal is None and said.not_probed == {}
    names = load_file(tmp_path / "awq" / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.0.w1.qweight" in names and not any(".mlp." in name for name in names)
    with pytest.raises(ValueError, match="leave out save_original_format=False"):
        quantized.save_pretrained(tmp_path / "other", save_original_format=False)
    assert not (tmp_path / "other").exists()


def test_scales_of_downs_input_fold_into_up(
    random_model: Callable[..., Any], enough: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels that are large by a factor which down takes back: without a fold they cost what the others could have."""
    original = random_model(MODELS["mixtral"]())
    for block in original.model.layers:
        block.mlp.experts.gate_up_proj.data[:, 32:36] *= 16
        block.mlp.experts.down_proj.data[:, :, :4] /= 2
    losses = []
    for linear in (True, False):
        monkeypatch.setattr(expert_block, "gate_is_linear_in_up", lambda _module, linear=linear: linear)
        layers = awq_hf.quantize(copy.deepcopy(original), config_for(enough, residual=False)).awq_report.layers
        losses.append([(layer.loss, layer.fold) for layer in layers if layer.name.endswith("down_proj")])
    for (folded, into), (plain, nowhere) in zip(*losses, strict=True):
        assert (into, nowhere) == ("mlp.experts.gate_up_proj", None) and folded < 0.9 * plain


def test_a_gate_that_clamps_up_takes_no_scales(random_model: Callable[..., Any]) -> None:
    experts = random_model(MODELS["mixtral"]()).model.layers[0].mlp.experts
    assert gate_is_linear_in_up(experts)
    experts._apply_gate = lambda x: torch.nn.functional.silu(x[:, :16]) * x[:, 16:].clamp(-7, 7)
    assert not gate_is_linear_in_up(experts)


# Refusals


def test_what_does_not_fit_is_refused_before_any_work(random_model: Callable[..., Any], enough: list[Tensor]) -> None:
    sizes = {**QWEN, "moe_intermediate_size": 40}
    model = random_model(transformers.Qwen3MoeConfig(**sizes, head_dim=16))
    told = r"model.layers.0.mlp.experts.down_proj: in_features 40 is not divisible by group_size 32(.|\n)*modules_to_not_convert=\['experts"
    with pytest.raises(ValueError, match=told):
        awq_hf.quantize(model, config_for(enough))
    skipped = awq_hf.quantize(model, config_for(enough, modules_to_not_convert=["experts"]))
    assert skipped.awq_report.left_in_float["model.layers.0.mlp.experts"] == "modules_to_not_convert"


def test_damaged_experts_are_named(random_model: Callable[..., Any], enough: list[Tensor]) -> None:
    model = random_model(MODELS["qwen3"]())
    model.model.layers[0].mlp.experts.down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj holds NaN"):
        awq_hf.quantize(model, config_for(enough))


def test_experts_of_another_kind_stay_float(random_model: Callable[..., Any], enough: list[Tensor], prompt: Tensor) -> None:
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, intermediate_size=32, head_dim=16)
    model = awq_hf.quantize(random_model(config), config_for(enough))
    assert "GptOssExperts holds" in model.awq_report.left_in_float["model.layers.0.mlp.experts"]
    granite = transformers.GraniteMoeConfig(**{**SIZES, "num_local_experts": 4, "intermediate_size": 32})
    model = awq_hf.quantize(random_model(granite), config_for(enough))
    (why,) = {why for name, why in model.awq_report.left_in_float.items() if name.endswith("experts")}
    assert why == "checkpoints of this architecture hold experts in one tensor, and AWQ's format one by one"


@pytest.mark.parametrize(
    ("config", "router", "why"),
    [
        (transformers.HunYuanMoEV1Config(**{**QWEN, "intermediate_size": 32, "num_experts": 8}, head_dim=16, moe_topk=2),
         "mlp.gate.wg", "it chooses experts"),
        (transformers.PhimoeConfig(**{**SIZES, "intermediate_size": 32}, num_local_experts=8),
         "mlp.router", "PhimoeTopKRouter is not a plain Linear"),
    ],
)  # fmt: skip
def test_routers_that_are_linears_stay_float(
    config: Any, router: str, why: str, random_model: Callable[..., Any], enough: list[Tensor], prompt: Tensor, tmp_path: Path
) -> None:
    model = awq_hf.quantize(random_model(config), config_for(enough))
    assert model.awq_report.left_in_float[f"model.layers.0.{router}"] == why
    fold = {layer.name: layer.fold for layer in model.awq_report.layers}["model.layers.0.mlp.experts.gate_up_proj"]
    assert fold == "post_attention_layernorm"
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(prompt).logits, model(prompt).logits)


def test_overrides_for_experts(random_model: Callable[..., Any], enough: list[Tensor], tmp_path: Path, prompt: Tensor) -> None:
    config = config_for(enough, overrides={"experts": {"bits": 8}})
    model = awq_hf.quantize(random_model(MODELS["mixtral"]()), config)
    bits = {layer.name: layer.bits for layer in model.awq_report.layers}
    assert bits["model.layers.0.mlp.experts.down_proj"] == 8 and bits["model.layers.0.self_attn.q_proj"] == 4
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(prompt).logits, model(prompt).logits)
