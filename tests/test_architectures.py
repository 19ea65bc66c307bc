"""Architectures: quantize, generate, save, load; and the folds that are discovered. No code knows any of them by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OPT_SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    word_embed_proj_dim=64,
    ffn_dim=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOWED = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])  # windows are longer than 8

Folds = dict[str | None, str]  # producer -> its consumers; None: those that have no producer

VALUES: Folds = {"self_attn.v_proj": "self_attn.o_proj"}
UP: Folds = {"mlp.up_proj": "mlp.down_proj"}
QKV, GATED = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"
LLAMA: Folds = {"input_layernorm": QKV, "post_attention_layernorm": GATED, **VALUES, **UP}
GEMMA: Folds = {"input_layernorm": QKV, "pre_feedforward_layernorm": GATED, **VALUES, **UP}
PHI3: Folds = {
    "input_layernorm": "self_attn.qkv_proj",
    "self_attn.qkv_proj": "self_attn.o_proj",
    "post_attention_layernorm": "mlp.gate_up_proj",
    "mlp.gate_up_proj": "mlp.down_proj",
}
OPT: Folds = {
    "self_attn_layer_norm": QKV,
    "self_attn.v_proj": "self_attn.out_proj",
    "final_layer_norm": "fc1",
    "fc1": "fc2",
}
GLM4: Folds = {
    "input_layernorm": QKV,
    "post_attention_layernorm": "mlp.gate_up_proj",
    "mlp.gate_up_proj": "mlp.down_proj",
    **VALUES,
}
NEOX: Folds = {
    "input_layernorm": "attention.query_key_value",
    "attention.query_key_value": "attention.dense",  # heads interleave q, k and v
    "post_attention_layernorm": "mlp.dense_h_to_4h",
    None: "mlp.dense_4h_to_h",  # GELU bends
}
FALCON: Folds = {
    "input_layernorm": "self_attention.query_key_value mlp.dense_h_to_4h",  # parallel branches
    "self_attention.query_key_value": "self_attention.dense",
    None: "mlp.dense_4h_to_h",
}
FALCON_2: Folds = {
    "ln_attn": "self_attention.query_key_value",
    "self_attention.query_key_value": "self_attention.dense",
    "ln_mlp": "mlp.dense_h_to_4h",
    None: "mlp.dense_4h_to_h",
}
BLOOM: Folds = {
    "input_layernorm": "self_attention.query_key_value",
    "self_attention.query_key_value": "self_attention.dense",
    "post_attention_layernorm": "mlp.dense_h_to_4h",
    None: "mlp.dense_4h_to_h",
}
STARCODER2: Folds = {"input_layernorm": QKV, "post_attention_layernorm": "mlp.c_fc", None: "mlp.c_proj", **VALUES}
GPT2: Folds = {"ln_1": "attn.c_attn", "attn.c_attn": "attn.c_proj", "ln_2": "mlp.c_fc", None: "mlp.c_proj"}
BIGCODE: Folds = GPT2
MPT: Folds = {"norm_1": "attn.Wqkv", "attn.Wqkv": "attn.out_proj", "norm_2": "ffn.up_proj", None: "ffn.down_proj"}
PHI: Folds = {
    "input_layernorm": f"{QKV} mlp.fc1",
    "self_attn.v_proj": "self_attn.dense",
    None: "mlp.fc2",
}
NEMOTRON: Folds = {"input_layernorm": QKV, "post_attention_layernorm": "mlp.up_proj", None: "mlp.down_proj", **VALUES}  # relu squared
BERT: Folds = {  # norms come after the branches, and the residual reads them too
    None: "attention.self.query attention.self.key attention.self.value intermediate.dense output.dense",
    "attention.self.value": "attention.output.dense",
}
MODERNBERT: Folds = {"attn_norm": "attn.Wqkv", "attn.Wqkv": "attn.Wo", "mlp_norm": "mlp.Wi", "mlp.Wi": "mlp.Wo"}


class Architecture(NamedTuple):
    config: str
    sizes: dict[str, Any]
    folds: Folds


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}, LLAMA),
    "llama, tied": Architecture("LlamaConfig", {**SIZES, "tie_word_embeddings": True, "num_key_value_heads": 4}, LLAMA),
    "mistral": Architecture("MistralConfig", {**SIZES, "sliding_window": 8}, LLAMA),
    "qwen2": Architecture("Qwen2Config", SIZES, LLAMA),
    "qwen3": Architecture("Qwen3Config", {**SIZES, "head_dim": 32}, LLAMA),
    "gemma3": Architecture("Gemma3TextConfig", {**SIZES, **WINDOWED}, GEMMA),
    "gemma2": Architecture("Gemma2Config", {**SIZES, **WINDOWED}, GEMMA),
    "phi3": Architecture("Phi3Config", SIZES, PHI3),
    "opt": Architecture("OPTConfig", OPT_SIZES, OPT),
    "stablelm": Architecture("StableLmConfig", {**SIZES, "use_qkv_bias": True}, LLAMA),
    "granite": Architecture("GraniteConfig", SIZES, LLAMA),
    "cohere": Architecture("CohereConfig", SIZES, {"input_layernorm": f"{QKV} {GATED}", **VALUES, **UP}),  # parallel branches
    "olmo2": Architecture("Olmo2Config", SIZES, {None: f"{QKV} {GATED}", **VALUES, **UP}),  # norms come after the branches
    "glm4": Architecture("Glm4Config", {**SIZES, "head_dim": 16}, GLM4),
    "neox": Architecture("GPTNeoXConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, NEOX),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def original(architecture: Architecture, random_model: Callable[..., Any]) -> Any:
    return random_model(getattr(transformers, architecture.config)(**architecture.sizes))


@pytest.fixture(scope="module")
def checkpoint(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    original.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, small_config: Callable[..., Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=small_config())


def relative_error(changed: Any, original: Any, prompt: Tensor) -> float:
    with torch.no_grad():
        expected = original(prompt).logits
        return float((changed(prompt).logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def test_generates_and_survives_the_round_trip_bit_for_bit(quantized: Any, prompt: Tensor, tmp_path: Path) -> None:
    assert quantized.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 16)
    quantized.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(prompt).logits, quantized(prompt).logits)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(prompt, **options), quantized.generate(prompt, **options))


def test_finds_the_folds_of_every_block(architecture: Architecture, quantized: Any) -> None:
    expected = {consumer: producer for producer, consumers in architecture.folds.items() for consumer in consumers.split()}
    layers = quantized.awq_report.layers
    assert len(layers) == 2 * len(expected)
    for index in range(2):
        found = {layer.name.split(f"layers.{index}.")[1]: layer.fold for layer in layers if f"layers.{index}." in layer.name}
        assert found == expected


def test_report_names_what_stays_float(quantized: Any) -> None:
    linears = {name for name, module in quantized.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized.awq_report.left_in_float == dict.fromkeys(linears, "outside the decoder's blocks")


def test_no_layer_is_worse_than_plain_rounding(quantized: Any) -> None:
    worse = {layer.name: (layer.loss, layer.loss_plain) for layer in quantized.awq_report.layers if layer.loss > layer.loss_plain}
    assert worse == {}


def test_folding_keeps_the_function(checkpoint: Path, original: Any, small_config: Callable[..., Any], prompt: Tensor) -> None:
    """At 8 bits little is lost to rounding, so a wrong fold (a bias, a head, 1 + w) would stand out."""
    quantized = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=small_config(bits=8))
    assert any(layer.alpha > 0 for layer in quantized.awq_report.layers)
    assert relative_error(quantized, original, prompt) < 0.03


@pytest.mark.parametrize("skip", ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "layers.0"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_layers_that_stay_float_keep_the_function(
    skip: str, group_size: int, tiny_llama: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor
) -> None:
    """Producers or consumers of a fold that are not quantized still take part in it, whether or not groups would fit them."""
    import awq_hf

    original = tiny_llama(intermediate_size=96 if group_size == 32 or skip == "down_proj" else 128)
    expected = {name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear) and skip in name}
    config = small_config(bits=8, group_size=group_size, modules_to_not_convert=[skip])
    quantized = awq_hf.quantize(tiny_llama(intermediate_size=original.config.intermediate_size), config)
    reasons = quantized.awq_report.left_in_float
    assert {name for name, reason in reasons.items() if reason == "modules_to_not_convert"} == expected
    assert relative_error(quantized, original, prompt) < 0.03


def test_fused_experts_that_stay_float_are_reported(random_model: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    import awq_hf

    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    quantized = awq_hf.quantize(random_model(config), small_config())
    for index in range(2):
        assert any(name.startswith(f"model.layers.{index}.mlp.experts") for name in quantized.awq_report.left_in_float)


def test_models_without_linears_are_refused_with_their_reason(random_model: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    import awq_hf

    model = random_model(transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128))
    with pytest.raises(ValueError, match="Conv1D"):
        awq_hf.quantize(model, small_config())
