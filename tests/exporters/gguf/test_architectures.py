"""Every architecture, through a real llama.cpp: it tokenizes, generates and gives probabilities as transformers does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from awq_hf.exporters.gguf import export
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.gguf_blocks import InGguf
from awq_hf.streaming import load_float

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    pad_token_id=3,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(hidden_act="gelu_pytorch_tanh", head_dim=32, query_pre_attn_scalar=32, sliding_window=16, num_key_value_heads=1)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, head_dim=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=10000.0)
FACTORS = [1.0 + 0.3 * n for n in range(8)], [2.0 + 0.5 * n for n in range(8)]
LONGROPE = dict(
    rope_type="longrope", short_factor=FACTORS[0], long_factor=FACTORS[1], original_max_position_embeddings=256, rope_theta=10000.0
)
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama with a wide head": dict(model_type="llama", head_dim=32, num_key_value_heads=4),
    "llama 3": dict(model_type="llama", tie_word_embeddings=True, rope_parameters={**LLAMA3, "rope_theta": 500000.0}),
    "llama, linear rope": dict(model_type="llama", rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "llama, longrope": dict(model_type="llama", rope_parameters=LONGROPE, num_key_value_heads=4),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": dict(model_type="qwen2"),
    "qwen2, yarn": dict(model_type="qwen2", rope_parameters=YARN),
    "qwen2, yarn with its own factor": dict(model_type="qwen2", rope_parameters={**YARN, "attention_factor": 1.5, "beta_fast": 16.0}),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "qwen3_moe": dict(model_type="qwen3_moe", **MOE),
    "gemma2": dict(
        model_type="gemma2",
        **GEMMA,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",  # transformers' choice before 5.21, sdpa, leaves the softcap out
    ),
    "gemma3": dict(model_type="gemma3_text", **GEMMA, num_hidden_layers=7, rope_parameters=GEMMA3_ROPE, use_bidirectional_attention=False),
    "phi3": dict(model_type="phi3", sliding_window=None),
    "phi3, longrope": dict(
        model_type="phi3", rope_parameters=LONGROPE, original_max_position_embeddings=256, sliding_window=None, num_key_value_heads=4
    ),
    "phi3, partly rotated": dict(
        model_type="phi3", sliding_window=None, rope_parameters=dict(partial_rotary_factor=0.5, rope_theta=10000.0)
    ),
}


READ = [name for name in MODELS if name not in ("mistral", "mixtral")]  # transformers' reader knows neither


@pytest.fixture(scope="module")
def build(
    random_model: Callable[..., Any], byte_level: Callable[..., Any], sentencepiece: Callable[..., Any]
) -> Callable[[str, Path], tuple[Any, Any]]:
    """build(name, path): a model of MODELS and its tokenizer, saved at `path`."""
    tokenizers = {True: sentencepiece(), False: byte_level()}

    def make(name: str, path: Path) -> tuple[Any, Any]:
        tokenizer = tokenizers[name.startswith(("llama", "mistral", "gemma"))]
        options = {**SIZES, "vocab_size": len(tokenizer) + 3, **copy.deepcopy(MODELS[name])}  # configs change what they are given
        model = random_model(AutoConfig.for_model(options.pop("model_type"), **options))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return model, AutoTokenizer.from_pretrained(path)  # Qwen2's class brings its own pre-tokenizer

    return make


@pytest.fixture(scope="module")
def exported(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, Path]]:
    """exported(name): a model of MODELS, its tokenizer, and the file with its weights as F32. The checkpoint is at "model" beside it."""

    @functools.cache
    def make(name: str) -> tuple[Any, Any, Path]:
        path = tmp_path_factory.mktemp("exported")
        model, tokenizer = build(name, path / "model")
        (file,) = export(open_checkpoint(path / "model"), path / "model.gguf", type="F32", progress=False)
        return model, tokenizer, file

    return make


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name: str, exported: Any, runtime: Any, divergence: Any, texts: list[str]) -> None:
    model, tokenizer, file = exported(name)
    llama = runtime(file, context=256)  # not above what longrope calls original: llama.cpp decides by the context, transformers by the text
    tokens = tokenizer(texts[0]).input_ids
    assert llama.tokenize(texts[0]) == tokens
    assert divergence(model, llama, tokens) < 1e-6
    expected = model.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False, suppress_tokens=[2])[0, len(tokens) :].tolist()
    assert llama.generate(tokens, 24) == expected


def test_of_a_model_that_sees_images_the_text_model_is_exported(
    build: Any, runtime: Any, divergence: Any, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = build("gemma3", tmp_path / "text")
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    config = Gemma3Config(text_config=model.config.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (file,) = export(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", type="F32", progress=False)
    assert "images are not exported" in caplog.text
    assert divergence(model, runtime(file), tokenizer(texts[0]).input_ids) < 1e-6


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_the_same_bits(name: str, exported: Any) -> None:
    model, _, file = exported(name)
    found = type(model).from_pretrained(file.parent, gguf_file=file.name, config=model.config, dtype=torch.float32)
    expected = model.state_dict()
    for key, tensor in found.state_dict().items():
        shifted = name.startswith("gemma") and "norm" in key  # stored with 1 added
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2.0**-22 if shifted else 0.0)


@pytest.mark.parametrize("name", READ)
def test_a_block_at_a_time_it_reads_the_same_bits_as_whole(name: str, exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, _, file = exported(name)
    whole = type(model).from_pretrained(file.parent, gguf_file=file.name, config=model.config, dtype=torch.float32).state_dict()
    zeroed = file.parent / "zeroed"
    for parameter in (other := copy.deepcopy(model)).parameters():
        parameter.data.zero_()
    other.save_pretrained(zeroed)
    found, _ = load_float(type(model), zeroed, dtype=torch.float32)
    source = InGguf(found, file)
    for index in range(len(source.blocks)):
        source.load(index)
        inside = [key for key in whole if key.startswith(f"{source.prefix}.{index}.")]
        assert inside and all(torch.equal(found.state_dict()[key], whole[key]) for key in inside)
        source.unload(index)
        assert all(tensor.is_meta for tensor in source.blocks[index].state_dict().values())
    outside = [key for key in whole if not key.startswith(f"{source.prefix}.")]
    assert outside and all(torch.equal(found.state_dict()[key], whole[key]) for key in outside)
    assert not caplog.records


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize(("kind", "bound"), [("F16", 1e-5), ("BF16", 1e-3), ("Q8_0", 1e-2)])
def test_rounded_types_stay_close(
    name: str, kind: str, bound: float, exported: Any, runtime: Any, divergence: Any, texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer, exact = exported(name)
    (file,) = export(open_checkpoint(exact.parent / "model"), tmp_path / "model.gguf", type=kind, progress=False)
    assert 1e-12 < divergence(model, runtime(file), tokenizer(texts[0]).input_ids) < bound


@pytest.mark.parametrize("name", ["llama, longrope", "phi3, longrope", "llama 3", "qwen2, yarn with its own factor", "gemma2", "gemma3"])
def test_long_text_is_computed_alike(name: str, exported: Any, runtime: Any, divergence: Any, texts: list[str]) -> None:
    """Beyond the original length of context, and beyond the sliding window."""
    model, tokenizer, file = exported(name)
    tokens = tokenizer(" ".join(texts * 2)).input_ids[:300]
    assert divergence(model, runtime(file, context=512), tokens, lengths=()) < 1e-6
