"""vLLM serves what we write: checkpoints and exports of every architecture that both know compute our dequantized model's logits.

Run where AWQ_HF_VLLM_PYTHON names a Python that has vLLM (see README.md here), which is minutes of work.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq_hf

PYTHON = os.environ.get("AWQ_HF_VLLM_PYTHON")
if not PYTHON:
    pytest.skip("AWQ_HF_VLLM_PYTHON names no Python with vLLM (tests/interop/README.md)", allow_module_level=True)

TOKENS = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
PLAIN = dict(**TOKENS, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
SIZES: Mapping[str, Any] = dict(**PLAIN, num_key_value_heads=2)
GPT2 = dict(**TOKENS, n_embd=128, n_layer=2, n_head=4, n_positions=128)
WINDOWED = dict(head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
FALCON = dict(num_kv_heads=2, new_decoder_architecture=True, num_hidden_layers=2, num_attention_heads=4, hidden_size=128)


class Case(NamedTuple):
    config: str = "LlamaConfig"
    sizes: Mapping[str, Any] = SIZES
    options: Mapping[str, Any] = MappingProxyType({})  # of AwqConfig
    target: str = "awq"
    dtype: torch.dtype = torch.float16


CASES = {
    "llama": Case(sizes={**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": Case(sizes={**SIZES, "tie_word_embeddings": True}),
    "mistral": Case("MistralConfig", {**SIZES, "sliding_window": None}),
    "qwen2": Case("Qwen2Config"),
    "qwen3": Case("Qwen3Config", {**SIZES, "head_dim": 64}),
    "gemma2": Case("Gemma2Config", {**SIZES, **WINDOWED}, dtype=torch.bfloat16),  # vLLM refuses these in float16
    "gemma3": Case("Gemma3TextConfig", {**SIZES, **WINDOWED}, dtype=torch.bfloat16),
    "phi3": Case("Phi3Config"),
    "phi": Case("PhiConfig"),
    "opt": Case("OPTConfig", {**PLAIN, "word_embed_proj_dim": 128, "ffn_dim": 256}),
    "stablelm": Case("StableLmConfig", {**SIZES, "use_qkv_bias": True}),
    "granite": Case("GraniteConfig"),
    "cohere": Case("CohereConfig"),
    "olmo2": Case("Olmo2Config"),
    "glm4": Case("Glm4Config", {**SIZES, "head_dim": 32}, dtype=torch.bfloat16),
    "nemotron": Case("NemotronConfig"),
    "starcoder2": Case("Starcoder2Config", {**SIZES, "use_bias": True}),
    "neox": Case("GPTNeoXConfig", PLAIN),
    "falcon": Case("FalconConfig", {**TOKENS, **FALCON}),
    "gpt2": Case("GPT2Config", GPT2),
    "gpt-bigcode": Case("GPTBigCodeConfig", GPT2),
    "groups of 16": Case(options={"group_size": 16}),
    "groups of 128": Case(options={"group_size": 128}),
    "whole rows": Case(options={"group_size": -1}),
    "symmetric": Case(options={"zero_point": False}),
    "o_proj in float": Case(options={"modules_to_not_convert": ["o_proj"]}),
    "a block in float": Case(options={"modules_to_not_convert": ["layers.0."]}),
    "compressed-tensors": Case(target="compressed-tensors"),
    "compressed-tensors, symmetric": Case(options={"zero_point": False}, target="compressed-tensors"),
    "compressed-tensors, whole rows": Case(options={"group_size": -1}, target="compressed-tensors"),
    "compressed-tensors, two group sizes": Case(options={"overrides": {"down_proj": {"group_size": 64}}}, target="compressed-tensors"),
    "compressed-tensors, a block in float": Case(options={"modules_to_not_convert": ["layers.0."]}, target="compressed-tensors"),
    "compressed-tensors, fused": Case("Phi3Config", target="compressed-tensors"),
    "compressed-tensors, interleaved": Case("GPTNeoXConfig", PLAIN, target="compressed-tensors"),
    "gptq, symmetric": Case(options={"zero_point": False}, target="gptq"),
    "gptq, a block in float": Case(options={"zero_point": False, "modules_to_not_convert": ["layers.0."]}, target="gptq"),
}
REFUSED = {  # what it says then
    "3 bits": (Case(options={"bits": 3}), "Unsupported num_bits = 3"),
    "one of three in float": (Case(options={"modules_to_not_convert": ["q_proj"]}), "some but not all shards"),
    "gptq, with zero points": (Case(target="gptq"), "sym=False"),
}
IDS = torch.randint(3, 96, (48,), generator=torch.Generator().manual_seed(3)).tolist()
BOUNDS = {torch.float16: 5e-3, torch.bfloat16: 2e-2}  # on the distance relative to the logits' spread, by what it computes in


@pytest.fixture(scope="module")
def folder(
    random_model: Callable[..., Any], small_config: Callable[..., Any], demo_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What reader.py takes: folders of a checkpoint and a prompt each. original/: what the checkpoint was exported from."""
    folder = tmp_path_factory.mktemp("vllm")
    for name, case in (CASES | {name: case for name, (case, _) in REFUSED.items()}).items():
        model = random_model(getattr(transformers, case.config)(**case.sizes), case.dtype)
        place = folder / name
        awq_hf.quantize(model, small_config(rounding="nearest", **case.options)).save_pretrained(place / "original")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_dir / "model" / file, place / "original" / file)
        awq_hf.export(place / "original", case.target, place / "checkpoint")
        (place / "prompt.json").write_text(json.dumps(IDS))
    demo = small_config(group_size=128, calibration=demo_dir / "calibration.txt", samples=4)
    for target in ("awq", "compressed-tensors"):
        place = folder / f"demo, {target}"
        awq_hf.quantize(demo_dir / "model", demo, output_dir=place / "original")
        awq_hf.export(place / "original", target, place / "checkpoint")
        (place / "prompt.json").write_text(json.dumps((demo_dir / "evaluation.txt").read_text(encoding="utf-8")[:400]))
    return folder


@pytest.fixture(scope="module")
def read(folder: Path) -> Callable[[], None]:
    @functools.cache
    def read() -> None:
        command = [PYTHON or "", "-I", str(Path(__file__).with_name("reader.py")), "vllm", str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert run.returncode == 0, run.stdout + run.stderr

    return read


def ours(place: Path) -> Any:
    prompt = json.loads((place / "prompt.json").read_text())
    ids = AutoTokenizer.from_pretrained(place / "original").encode(prompt) if isinstance(prompt, str) else prompt
    model: Any = AutoModelForCausalLM.from_pretrained(place / "original", dtype=torch.float32).dequantize(torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", [*CASES, "demo, awq", "demo, compressed-tensors"])
def test_computes_our_logits(name: str, folder: Path, read: Callable[[], None]) -> None:
    read()
    refused = folder / name / "vllm.refused"
    assert not refused.exists(), refused.read_text()
    expected, dtype = ours(folder / name), CASES[name].dtype if name in CASES else torch.bfloat16
    found = np.load(folder / name / "vllm.npy")[:, : expected.shape[1]]
    assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < BOUNDS[dtype]


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_what_it_cannot_serve(name: str, folder: Path, read: Callable[[], None]) -> None:
    read()
    assert REFUSED[name][1] in (folder / name / "vllm.refused").read_text()
