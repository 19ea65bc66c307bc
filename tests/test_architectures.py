"""Architectures: quantize, generate, save, load; and the folds that are discovered. No code knows any of them by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import awq_hf
from awq_hf.blocks import find_blocks
from awq_hf.inspection import inspect
from awq_hf.inspection.forecast import Forecast

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
TINY = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2_SIZES = dict(**TINY, n_embd=64, n_layer=2, n_head=4, n_positions=128)
MULTI_HEAD = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
FALCON_SIZES = dict(**TINY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
WINDOWED = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])  # windows are longer than 8

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
QWEN_VL = dict(
    text_config=dict(**SIZES, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}),
    vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]),
    image_token_id=90,
    video_token_id=91,
    vision_start_token_id=92,
    vision_end_token_id=93,
)
LLAVA = dict(text_config=dict(model_type="llama", **SIZES), vision_config=dict(model_type="clip_vision_model", **VISION), image_token_id=90)
LLAVA_TOWERS = ("model.vision_tower", "model.multi_modal_projector", "vision_tower", "multi_modal_projector")
GEMMA3_VL = dict(
    text_config=dict(**SIZES, **WINDOWED),
    vision_config=VISION,
    mm_tokens_per_image=4,
    image_token_id=90,
    boi_token_index=91,
    eoi_token_index=92,
)
IMAGES = "AutoModelForImageTextToText"

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


BERT_ADDS = "attention.output.dense output.dense"
NONE = ""  # of Linears that are added: a norm comes in between, or branches side by side


class Architecture(NamedTuple):
    config: str
    sizes: dict[str, Any]
    folds: Folds
    auto: str = "AutoModelForCausalLM"
    alone: tuple[str, ...] = ()  # entries of the skip list, but for the head's
    added: str = "self_attn.o_proj mlp.down_proj"  # Linears whose output is added to the residual stream by itself


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}, LLAMA),
    "llama, tied": Architecture("LlamaConfig", {**SIZES, "tie_word_embeddings": True, "num_key_value_heads": 4}, LLAMA),
    "mistral": Architecture("MistralConfig", {**SIZES, "sliding_window": 8}, LLAMA),
    "qwen2": Architecture("Qwen2Config", SIZES, LLAMA),
    "qwen3": Architecture("Qwen3Config", {**SIZES, "head_dim": 32}, LLAMA),
    "gemma3": Architecture("Gemma3TextConfig", {**SIZES, **WINDOWED}, GEMMA, added=NONE),
    "gemma2": Architecture("Gemma2Config", {**SIZES, **WINDOWED}, GEMMA, added=NONE),
    "phi3": Architecture("Phi3Config", SIZES, PHI3),
    "opt": Architecture("OPTConfig", OPT_SIZES, OPT, added="self_attn.out_proj fc2"),
    "stablelm": Architecture("StableLmConfig", {**SIZES, "use_qkv_bias": True}, LLAMA),
    "granite": Architecture("GraniteConfig", {**SIZES, "residual_multiplier": 0.22}, LLAMA),
    "cohere": Architecture("CohereConfig", SIZES, {"input_layernorm": f"{QKV} {GATED}", **VALUES, **UP}, added=NONE),  # parallel branches
    "olmo2": Architecture("Olmo2Config", SIZES, {None: f"{QKV} {GATED}", **VALUES, **UP}, added=NONE),  # norms come after the branches
    "glm4": Architecture("Glm4Config", {**SIZES, "head_dim": 16}, GLM4, added=NONE),
    "phi": Architecture("PhiConfig", SIZES, PHI, added=NONE),
    "nemotron": Architecture("NemotronConfig", SIZES, NEMOTRON),
    "starcoder2": Architecture("Starcoder2Config", {**SIZES, "use_bias": True}, STARCODER2, added="self_attn.o_proj mlp.c_proj"),
    "neox": Architecture("GPTNeoXConfig", MULTI_HEAD, NEOX, added=NONE),
    "neox, one after the other": Architecture(
        "GPTNeoXConfig", {**MULTI_HEAD, "use_parallel_residual": False}, NEOX, added="attention.dense mlp.dense_4h_to_h"
    ),
    "falcon": Architecture("FalconConfig", {**FALCON_SIZES, "multi_query": True}, FALCON, added=NONE),
    "falcon, alibi": Architecture("FalconConfig", {**FALCON_SIZES, "multi_query": False, "alibi": True, "bias": True}, FALCON, added=NONE),
    "falcon, new decoder": Architecture(
        "FalconConfig", {**FALCON_SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}, FALCON_2, added=NONE
    ),
    "bloom": Architecture(
        "BloomConfig", {**TINY, "n_layer": 2, "n_head": 4, "hidden_size": 64}, BLOOM, added="self_attention.dense mlp.dense_4h_to_h"
    ),
    "mpt": Architecture(
        "MptConfig", {**TINY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, MPT, added="attn.out_proj ffn.down_proj"
    ),
    "gpt2": Architecture("GPT2Config", GPT2_SIZES, GPT2, added="attn.c_proj mlp.c_proj"),
    "gpt-bigcode": Architecture("GPTBigCodeConfig", GPT2_SIZES, GPT2, added="attn.c_proj mlp.c_proj"),
    "bert": Architecture("BertConfig", MULTI_HEAD, BERT, "AutoModelForMaskedLM", ("cls",), BERT_ADDS),
    "bert, classifier": Architecture(
        "BertConfig", MULTI_HEAD, BERT, "AutoModelForSequenceClassification", ("bert.pooler", "pooler"), BERT_ADDS
    ),
    "llama, classifier": Architecture("LlamaConfig", SIZES, LLAMA, "AutoModelForSequenceClassification"),
    "qwen2.5-vl": Architecture("Qwen2_5_VLConfig", QWEN_VL, LLAMA, IMAGES, ("model.visual", "visual")),
    "llava": Architecture("LlavaConfig", LLAVA, LLAMA, IMAGES, LLAVA_TOWERS),
    "gemma3, images": Architecture("Gemma3Config", GEMMA3_VL, GEMMA, IMAGES, ("model.vision_tower", "vision_tower"), NONE),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def original(architecture: Architecture, random_model: Callable[..., Any]) -> Any:
    config = getattr(transformers, architecture.config)(**architecture.sizes)
    return random_model(config, auto=getattr(transformers, architecture.auto))


@pytest.fixture(scope="module")
def checkpoint(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    original.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def load(architecture: Architecture) -> Callable[..., Any]:
    return getattr(transformers, architecture.auto).from_pretrained


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, load: Callable[..., Any], small_config: Callable[..., Any]) -> Any:
    return load(checkpoint, quantization_config=small_config())


def relative_error(changed: Any, original: Any, prompt: Tensor) -> float:
    with torch.no_grad():
        expected = original(prompt).logits
        return float((changed(prompt).logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def test_generates_and_survives_the_round_trip_bit_for_bit(
    quantized: Any, load: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    quantized.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded(prompt).logits, quantized(prompt).logits)
    if quantized.can_generate():
        options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        generated = quantized.generate(prompt, **options)
        assert generated.shape == (2, 16) and torch.equal(loaded.generate(prompt, **options), generated)


def test_becomes_a_plain_model_again(quantized: Any, load: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    plain = copy.deepcopy(quantized).dequantize()
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(load(tmp_path)(prompt).logits, quantized(prompt).logits, rtol=1e-4, atol=1e-5)


def test_finds_the_folds_of_every_block(architecture: Architecture, quantized: Any) -> None:
    expected = {consumer: producer for producer, consumers in architecture.folds.items() for consumer in consumers.split()}
    prefix, blocks = find_blocks(quantized)
    found = {layer.name: layer.fold for layer in quantized.awq_report.layers}
    assert found == {f"{prefix}.{i}.{consumer}": producer for i in range(len(blocks)) for consumer, producer in expected.items()}


def test_finds_what_is_added_to_the_residual_stream(architecture: Architecture, quantized: Any) -> None:
    prefix, blocks = find_blocks(quantized)
    found = {layer.name for layer in quantized.awq_report.layers if layer.residual is not None}
    assert found == {f"{prefix}.{i}.{name}" for i in range(len(blocks)) for name in architecture.added.split()}


def test_what_is_outside_of_the_blocks_stays_float_and_is_named(architecture: Architecture, quantized: Any) -> None:
    linears = {name for name, module in quantized.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears and quantized.awq_report.left_in_float == dict.fromkeys(linears, "outside the decoder's blocks")
    heads = {"lm_head", "classifier", "score"}
    entries = quantized.config.quantization_config.modules_to_not_convert
    assert {entry for entry in entries if entry not in heads} == set(architecture.alone)
    assert not any("loaders" in note or "vLLM" in note for note in quantized.awq_report.notes)


def test_no_layer_is_worse_than_plain_rounding(quantized: Any) -> None:
    worse = {layer.name: (layer.loss, layer.loss_plain) for layer in quantized.awq_report.layers if layer.loss > layer.loss_plain}
    assert worse == {}


def test_folding_keeps_the_function(
    checkpoint: Path, load: Callable[..., Any], original: Any, small_config: Callable[..., Any], prompt: Tensor
) -> None:
    """At 8 bits little is lost to rounding, so a wrong fold (a bias, a head, 1 + w) would stand out. Nothing but folding is done else."""
    quantized = load(checkpoint, quantization_config=small_config(bits=8, clip=False, correction=False, rounding="nearest"))
    assert relative_error(quantized, original, prompt) < 0.03


@pytest.mark.parametrize("name", ["qwen2.5-vl", "bert", "llama, classifier"])
def test_quantize_and_inspect_take_the_class_that_was_saved(
    name: str, random_model: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    kind = ARCHITECTURES[name]
    original = random_model(getattr(transformers, kind.config)(**kind.sizes), auto=getattr(transformers, kind.auto))
    original.save_pretrained(tmp_path)
    quantized = awq_hf.quantize(tmp_path, small_config(rounding="nearest"))
    assert type(quantized) is type(original)
    found = inspect(str(tmp_path), small_config(), "auto", "cpu", None)
    assert isinstance(found, Forecast) and found.class_name == type(original).__name__
    assert sum(matrix.count for matrix in found.kinds) == len(quantized.awq_report.layers)
