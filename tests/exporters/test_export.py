"""Export: the same integers in every target, read back here by loops over bits; configs; what a target cannot hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

import awq_hf
from awq_hf import AwqLinear, QuantizedWeight
from awq_hf.affine import dequantize_weight
from awq_hf.exporters.dense import with_dtype
from awq_hf.exporters.opening import open_checkpoint


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


# The same integers


def code(words: list[int], place: int, bits: int) -> int:
    """Code `place` of a little-endian stream of bits in 32-bit words."""
    stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return stream >> place * bits & (1 << bits) - 1


def read_compressed_tensors(stored: dict[str, Tensor], owner: str, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q [out, in], zero points [out, groups], scales [out, groups]) by the definition: signed values have 2^(bits-1) added."""
    rows, columns = stored[f"{owner}.weight_shape"].tolist()
    scales = stored[f"{owner}.weight_scale"]
    q = [[code(words, i, bits) for i in range(columns)] for words in stored[f"{owner}.weight_packed"].tolist()]
    zeros = stored.get(f"{owner}.weight_zero_point")
    if zeros is None:
        return torch.tensor(q), torch.full(scales.shape, 2 ** (bits - 1)), scales
    z = [[code(words, o, bits) for words in zeros.T.tolist()] for o in range(rows)]
    return torch.tensor(q), torch.tensor(z), scales


def read_gptq(stored: dict[str, Tensor], owner: str, bits: int, v1: bool) -> tuple[Tensor, Tensor, Tensor]:
    scales = stored[f"{owner}.scales"].T
    columns, rows = len(stored[f"{owner}.g_idx"]), len(scales)
    q = [[code(words, i, bits) for i in range(columns)] for words in stored[f"{owner}.qweight"].T.tolist()]
    z = [[code(words, o, bits) + v1 for words in stored[f"{owner}.qzeros"].tolist()] for o in range(rows)]
    assert stored[f"{owner}.g_idx"].tolist() == [i * scales.shape[1] // columns for i in range(columns)]
    return torch.tensor(q), torch.tensor(z), scales


@pytest.mark.parametrize("source", ["directory", "memory"])
@pytest.mark.parametrize(
    "bits, symmetric, group_size", [(4, False, 32), (4, True, 32), (8, False, 32), (8, True, -1), (3, False, -1), (2, True, 16)]
)
def test_every_target_holds_the_same_integers(
    bits: int, symmetric: bool, group_size: int, source: str, tiny_llama: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path
) -> None:
    model = plain(tiny_llama(num_hidden_layers=1), bits=bits, zero_point=not symmetric, group_size=group_size)
    model.save_pretrained(tmp_path / "saved")
    of = model if source == "memory" else tmp_path / "saved"
    for target in ("awq", "compressed-tensors", "gptq", "dense"):
        assert awq_hf.export(of, target, tmp_path / target) == (tmp_path / target).resolve()
    found = {target: tensors(tmp_path / target) for target in ("awq", "compressed-tensors", "gptq", "dense")}
    gptq = config(tmp_path / "gptq")["quantization_config"]
    assert gptq["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert symmetric != any(name.endswith(".weight_zero_point") for name in found["compressed-tensors"])
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    assert len(quantized) == 7
    for name, module in quantized.items():
        weight = module.to_quantized()
        expected = (weight.q.long(), weight.zero_points.long(), weight.scales)
        for read in (
            read_compressed_tensors(found["compressed-tensors"], name, bits),
            read_gptq(found["gptq"], name, bits, v1=symmetric),
        ):
            assert all(torch.equal(*pair) for pair in zip(read, expected, strict=True)), name
        assert torch.equal(found["dense"][f"{name}.weight"], module.dequantize(torch.float32))
        for target in found:
            assert torch.equal(found[target][f"{name}.bias"], module.bias)
    others = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(f"{n}." for n in quantized))}
    for target, stored in found.items():
        assert all(torch.equal(stored[name], tensor) for name, tensor in others.items()), target
        owned = {name for name in stored if name.startswith(tuple(f"{n}." for n in quantized))}
        assert stored.keys() - owned == others.keys()


def test_zero_points_of_zero_are_kept(write_awq: Callable[..., Any], tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """GPTQ's first format would wrap them, and readers carry from there into the next zero point."""
    write_awq(tiny_llama(), tmp_path / "awq")
    expected = dict(open_checkpoint(tmp_path / "awq").items())["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(expected, QuantizedWeight) and (expected.zero_points == 0).any()
    awq_hf.export(tmp_path / "awq", "gptq", tmp_path / "gptq")
    _, z, _ = read_gptq(tensors(tmp_path / "gptq"), "model.layers.0.mlp.up_proj", 4, v1=False)
    assert torch.equal(z, expected.zero_points.long())


# awq: what save_pretrained writes


def llava() -> LlavaConfig:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    return LlavaConfig(vision_config=CLIPVisionConfig(**sizes), text_config=text, image_token_id=90)


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {}),
        ("llama", {"zero_point": False, "modules_to_not_convert": ["o_proj", "layers.1."]}),
        ("llama", {"bits": 3}),
        ("llama", {"overrides": {"down_proj": {"bits": 8, "zero_point": False}, "layers.0.mlp": None}}),
        ("tied", {}),
        ("gpt2", {}),
        ("llava", {}),
    ],
)
@pytest.mark.parametrize("source", ["directory", "memory"])
def test_awq_is_what_save_pretrained_writes(
    name: str,
    options: dict[str, Any],
    source: str,
    random_model: Callable[..., Any],
    tiny_llama: Callable[..., Any],
    plain: Callable[..., Any],
    tmp_path: Path,
) -> None:
    build: dict[str, Callable[[], Any]] = {
        "llama": tiny_llama,
        "tied": lambda: tiny_llama(tie_word_embeddings=True),
        "gpt2": lambda: random_model(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64)),
        "llava": lambda: random_model(llava(), auto=AutoModelForImageTextToText),
    }
    model = plain(build[name](), **options)
    model.save_pretrained(tmp_path / "saved")
    awq_hf.export(model if source == "memory" else tmp_path / "saved", "awq", tmp_path / "awq")
    assert (tmp_path / "awq/model.safetensors").read_bytes() == (tmp_path / "saved/model.safetensors").read_bytes()
    assert config(tmp_path / "awq") == config(tmp_path / "saved")
    assert json.loads((tmp_path / "awq/report.json").read_text()) == json.loads((tmp_path / "saved/report.json").read_text())
    assert (tmp_path / "awq/generation_config.json").read_text() == (tmp_path / "saved/generation_config.json").read_text()


def test_foreign_layouts_become_gemm_and_keys_of_others_stay(
    write_awq: Callable[..., Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    write_awq(tiny_llama(), tmp_path / "theirs", modules_to_not_convert=None, version="exllama", provider="somebody")
    awq_hf.export(tmp_path / "theirs", "awq", tmp_path / "awq")
    assert config(tmp_path / "awq")["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "provider": "somebody",
        "modules_to_not_convert": ["lm_head"],
    }
    one, other = tensors(tmp_path / "theirs"), tensors(tmp_path / "awq")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_scales_of_activations_stay_in_awq_and_are_refused_elsewhere(
    write_awq: Callable[..., Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    scales = torch.rand(96) + 0.5
    write_awq(tiny_llama(), tmp_path / "theirs", changes={"model.layers.0.mlp.act_fn.scales": scales})
    awq_hf.export(tmp_path / "theirs", "awq", tmp_path / "awq")
    assert torch.equal(tensors(tmp_path / "awq")["model.layers.0.mlp.act_fn.scales"], scales)
    for target in ("compressed-tensors", "gptq", "dense"):
        with pytest.raises(ValueError, match=r"act_fn.scales divides the outputs of an activation.*the target awq keeps it"):
            awq_hf.export(tmp_path / "theirs", target, tmp_path / target)
        assert not (tmp_path / target).exists()


# What the configs say


def test_compressed_tensors_says_which_modules_are_which(tiny_llama: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path) -> None:
    overrides = {"down_proj": {"bits": 8}, "o_proj": {"group_size": -1, "zero_point": False}, "layers.1.mlp.up": None}
    awq_hf.export(plain(tiny_llama(), overrides=overrides), "compressed-tensors", tmp_path / "out")
    stored = config(tmp_path / "out")["quantization_config"]
    common = {"type": "int", "dynamic": False}
    groups = {tuple(group["targets"]): group["weights"] for group in stored["config_groups"].values()}
    assert groups == {
        ("Linear",): {**common, "num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"): {
            **common,
            "num_bits": 8,
            "symmetric": False,
            "strategy": "group",
            "group_size": 32,
        },
        ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"): {
            **common,
            "num_bits": 4,
            "symmetric": True,
            "strategy": "channel",
            "group_size": None,
        },
    }
    assert sorted(stored["ignore"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert (stored["quant_method"], stored["format"]) == ("compressed-tensors", "pack-quantized")
    assert all(group["format"] == "pack-quantized" for group in stored["config_groups"].values())


def test_names_on_disk_and_in_memory_are_both_left_out(random_model: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path) -> None:
    """Of a vision-language model, whose tower stays in float: transformers matches the one, vLLM the other."""
    model = plain(random_model(llava(), auto=AutoModelForImageTextToText))
    awq_hf.export(model, "compressed-tensors", tmp_path / "out")
    ignore = config(tmp_path / "out")["quantization_config"]["ignore"]
    assert "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1" in ignore or "model.vision_tower.encoder.layers.0.mlp.fc1" in ignore
    on_disk = {name.removesuffix(".weight") for name in tensors(tmp_path / "out") if "vision_tower" in name and "fc1.weight" in name}
    assert on_disk < set(ignore)
    assert not any("language_model" in name and "layers" in name for name in ignore)


@pytest.mark.parametrize("quantized", [False, True])
def test_routers_are_left_out_by_name_and_experts_by_a_pattern(
    quantized: bool, random_model: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = random_model(Qwen3MoeConfig(**sizes, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))
    model = plain(model, modules_to_not_convert=None if quantized else ["mlp.experts"])
    for target in ("compressed-tensors", "gptq"):
        awq_hf.export(model, target, tmp_path / target)
    ignore = config(tmp_path / "compressed-tensors")["quantization_config"]["ignore"]
    left_out = set() if quantized else {"model.layers.0.mlp.experts", r"re:.*\.experts\..*"}
    assert set(ignore) == {"lm_head", "model.layers.0.mlp.gate"} | left_out
    rules = config(tmp_path / "gptq")["quantization_config"]["dynamic"]
    left_out = set() if quantized else {r"-:^model\.layers\.0\.mlp\.experts$", r"-:.*\.experts\..*"}
    assert rules.keys() == {r"-:^model\.layers\.0\.mlp\.gate$"} | left_out


def test_gptq_has_rules_for_modules_that_differ(tiny_llama: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path) -> None:
    overrides = {"layers.0.mlp.down_proj": {"bits": 8}, "layers.1.self_attn": None}
    awq_hf.export(plain(tiny_llama(), overrides=overrides), "gptq", tmp_path / "out")
    stored = config(tmp_path / "out")["quantization_config"]
    assert stored == json.loads((tmp_path / "out/quantize_config.json").read_text())
    attention = [rf"-:^model\.layers\.1\.self_attn\.{part}_proj$" for part in ("q", "k", "v", "o", "qkv")]  # vLLM's fused name too
    rule = {"bits": 8, "group_size": 32, "sym": False}
    assert stored["dynamic"] == {r"+:^model\.layers\.0\.mlp\.down_proj$": rule, **{pattern: {} for pattern in attention}}
    assert (stored["bits"], stored["group_size"], stored["sym"], stored["desc_act"], stored["lm_head"]) == (4, 32, False, False, False)


def test_one_asymmetric_module_makes_it_gptq_v2(tiny_llama: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path) -> None:
    model = plain(tiny_llama(num_hidden_layers=1), zero_point=False, overrides={"down_proj": {"zero_point": True}})
    awq_hf.export(model, "gptq", tmp_path / "out")
    stored = config(tmp_path / "out")["quantization_config"]
    assert (stored["checkpoint_format"], stored["sym"]) == ("gptq_v2", True)
    _, z, _ = read_gptq(tensors(tmp_path / "out"), "model.layers.0.mlp.up_proj", 4, v1=False)
    assert (z == 8).all()


# dense


def test_dense_of_gpt2_has_its_weights_the_other_way_round(
    random_model: Callable[..., Any], plain: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = plain(random_model(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64)))
    model.save_pretrained(tmp_path / "saved")
    awq_hf.export(tmp_path / "saved", "dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense(prompt).logits, model.dequantize(torch.float32)(prompt).logits)
    for target in ("compressed-tensors", "gptq"):
        with pytest.raises(ValueError, match=r"attn.c_attn of .* is a Conv1D.*targets awq and dense"):
            awq_hf.export(tmp_path / "saved", target, tmp_path / target)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dense_rounds_once_to_its_dtype(dtype: str, quantized_dir: Path, tmp_path: Path) -> None:
    awq_hf.export(quantized_dir, "dense", tmp_path / "dense", dtype=dtype)
    found, wanted = tensors(tmp_path / "dense"), getattr(torch, dtype)
    assert config(tmp_path / "dense")["dtype"] == dtype and "quantization_config" not in config(tmp_path / "dense")
    for name, value in open_checkpoint(quantized_dir).items():
        exact = dequantize_weight(value) if isinstance(value, QuantizedWeight) else value
        assert torch.equal(found[name], exact.to(wanted)), name


def test_dense_says_its_dtype_wherever_a_config_has_one() -> None:
    theirs = {"torch_dtype": "float16", "text_config": {"dtype": "float16", "hidden_size": 8}, "vision_config": {"dtype": None}}
    ours = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 8}, "vision_config": {"dtype": None}}
    assert with_dtype(theirs, "bfloat16") == ours


def test_dense_keeps_what_is_wider_than_the_rest_and_says_what_does_not_fit(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    awq_hf.export(model, "dense", tmp_path / "dense", dtype="float16")
    found = tensors(tmp_path / "dense")
    assert found["model.norm.weight"].dtype == torch.float32 and found["lm_head.weight"].dtype == torch.float16
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"up_proj.weight has values beyond torch.float16; export it with dtype='bfloat16' or float32"):
        awq_hf.export(model, "dense", tmp_path / "not", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_experts_are_written_one_by_one(random_model: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    """They are parts of one tensor in memory."""
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = random_model(MixtralConfig(**sizes, num_local_experts=2))
    awq_hf.export(model, "dense", tmp_path / "out")
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in tensors(tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(prompt).logits, model(prompt).logits)
