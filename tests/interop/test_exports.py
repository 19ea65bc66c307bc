"""Exported checkpoints, read by programs that are not ours: they compute our dequantized model's logits. See README.md here."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.quantizers import HfQuantizer

import awq_hf
from awq_hf.affine import dequantize_weight
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.spec import QuantizedWeight

SIZES = dict(vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
BIASES = dict(attention_bias=True, mlp_bias=True)
OPTIONS: dict[str, dict[str, Any]] = {  # of AwqConfig
    "asymmetric": {},
    "symmetric": {"zero_point": False},
    "whole-rows": {"group_size": -1},
    "8-bits": {"bits": 8},
    "8-bits-symmetric": {"bits": 8, "zero_point": False},
    "3-bits": {"bits": 3},
    "2-bits-symmetric": {"bits": 2, "zero_point": False},
    "tied": {},
    "mixed": {"overrides": {"down_proj": {"bits": 8}, "layers.1.self_attn": None, "layers.0.mlp.up": {"zero_point": False}}},
    "mixed-symmetric": {"zero_point": False, "overrides": {"down_proj": {"bits": 8}, "layers.1.self_attn": None}},
    "other-names": {"zero_point": False},  # on disk than in memory: a vision-language model
    "experts": {"zero_point": False},  # and routers, in float
}
PROMPT = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(3)).tolist()


def build(name: str, random_model: Callable[..., Any]) -> Any:
    if name == "other-names":
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        tower = CLIPVisionConfig(**sizes)
        config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**SIZES), image_token_id=90)
        return random_model(config, auto=AutoModelForImageTextToText)
    if name == "experts":
        return random_model(Qwen3MoeConfig(**SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64))
    return random_model(LlamaConfig(**SIZES, **BIASES, tie_word_embeddings=name == "tied"))


@pytest.fixture(scope="module")
def models(random_model: Callable[..., Any], small_config: Callable[..., Any]) -> Callable[[str], Any]:
    @functools.cache
    def quantized(name: str) -> Any:
        plain = {"scale": False, "clip": False, "correction": False, "rounding": "nearest", "stream": "float"}  # the quickest
        return awq_hf.quantize(build(name, random_model), small_config(samples=2, **plain, **OPTIONS[name]))

    return quantized


@pytest.fixture(scope="module")
def theirs(models: Callable[[str], Any], demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """theirs(program, target): what `program` makes of every case, exported to `target`: case -> array."""

    @functools.cache
    def theirs(program: str, target: str, names: tuple[str, ...], python: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(program)
        for name in names:
            saved = folder.with_name(f"{folder.name}-saved") / name
            models(name).save_pretrained(saved)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(demo_dir / "model" / file, saved / file)
            awq_hf.export(saved, target, folder / name / "checkpoint")
            (folder / name / "prompt.json").write_text(json.dumps(PROMPT))
        command = [python, "-I", str(Path(__file__).with_name("reader.py")), program, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        assert not [path.read_text() for path in folder.glob("*/*.refused")]
        return {name: np.load(folder / name / f"{program}.npy") for name in names}

    return theirs


def python_with(module: str, variable: str) -> str | None:
    return os.environ.get(variable) or (sys.executable if importlib.util.find_spec(module) else None)


COMPRESSED_TENSORS = python_with("compressed_tensors", "AWQ_HF_COMPRESSED_TENSORS_PYTHON")
GPTQMODEL = python_with("gptqmodel", "AWQ_HF_GPTQMODEL_PYTHON")
with_compressed_tensors = pytest.mark.skipif(not COMPRESSED_TENSORS, reason="compressed-tensors is not installed (tests/interop/README.md)")
with_gptqmodel = pytest.mark.skipif(not GPTQMODEL, reason="gptqmodel is not installed (tests/interop/README.md)")


def logits(model: PreTrainedModel) -> Any:
    """Of the dequantized model, in float32."""
    with torch.inference_mode():
        return copy.deepcopy(model).dequantize(torch.float32)(torch.tensor([PROMPT])).logits[0].numpy()


def distance(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


ALL = tuple(OPTIONS)


@pytest.mark.parametrize("name", ALL)
def test_dense_is_an_ordinary_model_of_transformers(name: str, theirs: Callable[..., Any], models: Callable[[str], Any]) -> None:
    found = theirs("transformers", "dense", ALL, sys.executable)[name]
    assert np.array_equal(found, logits(models(name)))


# What transformers 5.23 lacks: one of its two ways to load knows one width for the whole model, the other no zero points; neither
# experts in float
CT_LOADS = tuple(name for name in ALL if name not in ("mixed", "experts"))
HALF = 1e-3  # where scales and zero points are multiplied in the float16 of the scales


@with_compressed_tensors
@pytest.mark.skipif(not hasattr(HfQuantizer, "get_new_dtype"), reason="transformers before 5.21 decompresses to the scales' dtype only")
@pytest.mark.parametrize("name", CT_LOADS)
def test_transformers_reads_compressed_tensors(name: str, theirs: Callable[..., Any], models: Callable[[str], Any]) -> None:
    found = theirs("compressed_tensors", "compressed-tensors", CT_LOADS, COMPRESSED_TENSORS)[name]
    exact = OPTIONS[name].get("zero_point") is False
    assert distance(found, logits(models(name))) <= (1e-6 if exact else HALF)


DECOMPRESSED = tuple(name for name in ALL if name != "other-names")


@with_compressed_tensors
@pytest.mark.parametrize("name", DECOMPRESSED)
def test_the_package_decompresses_our_weights_and_matches_our_modules(
    name: str, theirs: Callable[..., Any], models: Callable[[str], Any]
) -> None:
    found = theirs("decompressor", "compressed-tensors", DECOMPRESSED, COMPRESSED_TENSORS)[name]
    items = open_checkpoint(models(name)).items()  # experts one by one
    quantized = sorted((n.removesuffix(".weight"), dequantize_weight(value)) for n, value in items if isinstance(value, QuantizedWeight))
    assert np.array_equal(found, torch.cat([weight.flatten() for _, weight in quantized]).numpy())


GPTQ_LOADS = ("asymmetric", "symmetric", "whole-rows", "3-bits", "mixed")  # both formats, every kind of rule; it is slow


@with_gptqmodel
@pytest.mark.parametrize("name", GPTQ_LOADS)
def test_gptqmodel_reads_gptq(name: str, theirs: Callable[..., Any], models: Callable[[str], Any]) -> None:
    found = theirs("gptq", "gptq", GPTQ_LOADS, GPTQMODEL)[name]
    assert distance(found, logits(models(name))) <= 2e-3  # it computes in float16
