"""Directories to make cards of: real files of the right shapes and no meaning, and the JSON beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.render import render

HIDDEN, BLOCKS = 256, 2
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{block}.{linear}" for block in range(BLOCKS) for linear in LINEARS]
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
SHA = "8c3713e6daa61fe2076f05992d1e05edb6893c452b8fd70c2c357450a6cc259e"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Make = Callable[..., Path]


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def awq(bits: int = 4, group: int = 128, **more: Any) -> dict[str, Any]:
    version = "gemm" if bits == 4 else "awq_hf"
    kept = {"modules_to_not_convert": ["lm_head"], "version": version, "zero_point": True}
    return {"quant_method": "awq", "bits": bits, "group_size": group, **kept, **more}


def write_checkpoint(path: Path, quantization: dict[str, Any], names: list[str] = NAMES, **config: Any) -> None:
    """Weights of [256, 256] in AutoAWQ's tensors; embeddings in float."""
    groups = HIDDEN // quantization["group_size"]
    tensors: dict[str, Any] = {"model.embed_tokens.weight": np.zeros((1024, HIDDEN), np.float16)}
    for name in names:
        override = quantization.get("overrides", {}).get(name.rpartition(".")[2], {})
        words = HIDDEN * override.get("bits", quantization["bits"]) // 32
        tensors[f"{name}.qweight"] = np.zeros((HIDDEN, words), np.int32)
        tensors[f"{name}.qzeros"] = np.zeros((groups, words), np.int32)
        tensors[f"{name}.scales"] = np.zeros((groups, HIDDEN), np.float16)
    write_json(path / "config.json", {**CONFIG, "quantization_config": quantization, **config})
    save_file(tensors, path / "model.safetensors")


def write_compressed_tensors(path: Path) -> None:
    tensors: dict[str, Any] = {"model.embed_tokens.weight": np.zeros((1024, HIDDEN), np.float16)}
    for name in NAMES:
        tensors[f"{name}.weight_packed"] = np.zeros((HIDDEN, HIDDEN // 8), np.int32)
        tensors[f"{name}.weight_scale"] = np.zeros((HIDDEN, 2), np.float16)
        tensors[f"{name}.weight_zero_point"] = np.zeros((HIDDEN // 8, 2), np.int32)
        tensors[f"{name}.weight_shape"] = np.zeros(2, np.int64)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}}
    write_json(path / "config.json", {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}})
    save_file(tensors, path / "model.safetensors")


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType, made: str | None = None, file_type: int | None = None) -> None:
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "llama")
    if made is not None:
        writer.add_description(made)
    if file_type is not None:
        writer.add_file_type(file_type)
    for block in range(BLOCKS):
        writer.add_tensor(f"blk.{block}.attn_q.weight", np.zeros((HIDDEN, HIDDEN // size * nbytes), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def report(bits: int = 4, **changes: Any) -> dict[str, Any]:
    layers = [
        {
            "name": name, "shape": [HIDDEN, HIDDEN], "bits": bits, "group_size": 128, "fold": "input_layernorm", "alpha": 0.5 * (i % 2),
            "family": "activations", "clip": 0.9, "correction": 0.5, "rounding": "descent", "loss_plain": 0.01, "loss": 0.004 + 0.0003 * i,
            "dead_channels": 0, "fallback": None, "residual": 0.7 if name.endswith(("o_proj", "down_proj")) else None,
        }
        for i, name in enumerate(NAMES)
    ]  # fmt: skip
    spec = {"bits": bits, "group_size": 128, "symmetric": False}
    recipe = {
        "spec": spec,
        "scale": {"steps": 20},
        "clip": {"shrinks": [0.9]},
        "rounding": "descent",
        "stream": "quantized",
        "correction": True,
        "residual": True,
        "seq_len": 256,
    }
    metadata = {"license": "apache-2.0", "language": ["en", "de"], "pipeline_tag": "text-generation", "tags": ["chat", "safetensors"]}
    return {
        "recipe": {**recipe, "overrides": []},
        "calibration": {"source": "notes.txt", "sha256": SHA, "windows": 64, "tokens": 16384},
        "layers": layers,
        "left_in_float": {"lm_head": "outside the decoder's blocks"},
        "notes": [],
        "versions": {"awq-hf": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"},
        "machine": {"platform": "Linux-6.1-x86_64", "threads": 8, "device": "NVIDIA H200"},
        "seconds": {"total": 754.3},
        "peak_memory_bytes": {"process": 21_500_000_000, "device": 9_870_000_000},
        "base_model": {"name": "acme/Llama-2-Tiny", "revision": COMMIT, "local": False, "metadata": metadata},
        **changes,
    }


def row(name: str, files: list[str], kl: float, perplexity: float, top1: float, **changes: Any) -> dict[str, Any]:
    figures = {"perplexity": perplexity, "reference_perplexity": 22.98, "kl": kl, "kl_se": kl / 40, "kl_99": 7 * kl, "top1": top1}
    sample = {"tokens": 39936, "seq_len": 256, "text": "held_out.txt", "sha256": SHA[::-1]}
    return {
        "name": name,
        "files": files,
        "runtime": "transformers",
        "weights_bytes": None,
        "bits_per_weight": None,
        **figures,
        **sample,
        **changes,
    }


def evaluation(*rows: dict[str, Any]) -> dict[str, Any]:
    original = row("original", [], 0.0, 22.98047, 1.0)
    plain = row("plain rounding", [], 0.029022, 23.39191, 0.876702, weights_bytes=700_000)
    reference = {"name": "acme/Llama-2-Tiny", "revision": COMMIT, "weights_bytes": 5_250_000}
    return {"reference": reference, "date": "2026-01-31", "versions": {}, "machine": {}, "rows": [original, plain, *rows]}


def text_of(directory: Path, *arguments: str) -> str:
    return render(gather(directory, *arguments), ())  # drawing takes time


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without Markdown."""
    lines = text.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = [line for line in lines[start:][: lines[start:].index("")] if not line.startswith("|:")]
    return [[re.sub(r"[*`\\]", "", cell.strip()) for cell in line.strip("|").split("|")] for line in rows]


def change(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """AWQ, compressed-tensors and two GGUF files, all measured."""
    path = tmp_path / "Tiny-AWQ"
    write_checkpoint(path, awq())
    write_compressed_tensors(path / "compressed-tensors")
    write_gguf(path / "Tiny-Q4_K_M.gguf", gguf.GGMLQuantizationType.Q4_K, "Quantized from *float* weights.")
    write_gguf(path / "Tiny-Q6_K.gguf", gguf.GGMLQuantizationType.Q6_K)
    write_json(path / "tokenizer_config.json", {"chat_template": CHATML, "bos_token": {"content": "<s>"}})
    write_json(path / "report.json", report(notes=["only 60 of 64 windows were found"]))
    (path / "recipe.yaml").write_text(f"model: acme/Llama-2-Tiny\nrevision: {COMMIT}\ncalibration: notes.txt\nsamples: 64\n")
    rows = [
        row("awq-hf", [".", "compressed-tensors"], 0.0133702, 23.12379, 0.91837),
        row("Tiny-Q4_K_M.gguf", ["Tiny-Q4_K_M.gguf"], 0.0066784, 23.05225, 0.939178, bits_per_weight=4.9),
        row("Tiny-Q6_K.gguf", ["Tiny-Q6_K.gguf"], 0.00087, 22.99123, 0.98, runtime="llama.cpp"),
    ]
    write_json(path / "evaluation.json", evaluation(*rows))
    return path


@pytest.fixture
def awq_only(tmp_path: Path) -> Path:
    """Quantized by awq-hf from a local model, not measured; layers with fallbacks, dead channels, several widths of groups."""
    path = tmp_path / "tiny-awq"
    write_checkpoint(path, awq())
    write_json(path / "tokenizer.json", {})
    said = report(base_model={"name": "my-finetune", "revision": None, "local": True, "metadata": {}})
    said["layers"][3]["fallback"] = "the held-out loss of the search was 1.2 times plain rounding's"
    said["layers"][6]["dead_channels"] = 5
    said["left_in_float"]["model.layers.0.mlp.router"] = said["left_in_float"]["model.layers.1.mlp.router"] = "a gate of 8 outputs"
    write_json(path / "report.json", said)
    return path


@pytest.fixture
def three_bits(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-3bit"
    write_checkpoint(path, awq(bits=3, overrides={"down_proj": {"bits": 8}}))
    write_json(path / "tokenizer.json", {})
    said = report(bits=3)
    for layer in said["layers"][6::7]:
        layer["bits"] = 8
    said["recipe"]["overrides"] = [["down_proj", {"bits": 8, "group_size": 128, "symmetric": False}], ["lm_head", None]]
    write_json(path / "report.json", said)
    write_json(path / "evaluation.json", evaluation(row("awq-hf", ["."], 0.0212, 23.3, 0.89)))
    return path


@pytest.fixture
def symmetric(tmp_path: Path) -> Path:
    """vLLM and SGLang have no fast kernel for it as AWQ."""
    path = tmp_path / "tiny-sym"
    write_checkpoint(path, awq(zero_point=False))
    write_json(path / "tokenizer.json", {})
    said = report()
    said["recipe"]["spec"]["symmetric"] = True
    write_json(path / "report.json", said)
    return path


@pytest.fixture
def gguf_only(tmp_path: Path) -> Path:
    """A folder of files that were searched for; report.json is of the search."""
    path = tmp_path / "Tiny-GGUF"
    path.mkdir()
    write_gguf(path / "Tiny-Q4_K_M.gguf", gguf.GGMLQuantizationType.Q4_K)
    write_gguf(path / "Tiny-codes.gguf", gguf.GGMLQuantizationType.Q5_K)
    said = report(bits=4)
    said["layers"] = [{**layer, "kind": 12 if i % 2 else 14, "loss_importance": 0.009} for i, layer in enumerate(said["layers"])]
    write_json(path / "report.json", said)
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Somebody else's checkpoint: config.json and weights; vLLM would refuse it."""
    path = tmp_path / "Mystery-AWQ"
    names = [name for name in NAMES if name != "model.layers.1.self_attn.k_proj"]
    write_checkpoint(path, awq(modules_to_not_convert=["model.layers.1.self_attn.k_proj"]), names)
    tensors = {"model.layers.1.self_attn.k_proj.weight": np.zeros((HIDDEN, HIDDEN), np.float16)}
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    save_file(tensors, path / "model-00002-of-00002.safetensors")
    first = [f"{name}.{part}" for name in names for part in ("qweight", "qzeros", "scales")] + ["model.embed_tokens.weight"]
    places = {**dict.fromkeys(first, "model-00001-of-00002.safetensors"), **dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    write_json(path / "model.safetensors.index.json", {"weight_map": places})
    write_json(path / "tokenizer.json", {})
    return path
