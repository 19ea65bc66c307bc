"""Files: their names, shards, metadata and memory; whole or not at all; quantized weights; what is refused."""

from __future__ import annotations

import json
import logging
import resource
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from awq_hf import AwqLinear, QuantSpec
from awq_hf.affine import choose_grid, dequantize_weight, quantize, to_quantized_weight
from awq_hf.exporters.gguf import encode, export, writer
from awq_hf.exporters.opening import open_checkpoint

CARD = """---
license: apache-2.0
base_model: someone/Tiny-Llama-1.5B
tags: [text-generation]
language: [en]
---
"""


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(vocab_size=500)


@pytest.fixture(scope="module")
def folder(model: Any, byte_level: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "Tiny-Llama-Instruct-v2.1"
    model.save_pretrained(path)
    byte_level().save_pretrained(path)
    (path / "README.md").write_text(CARD)
    return path


def write(folder: Path, path: Path, **options: Any) -> list[Path]:
    return export(open_checkpoint(folder), path, progress=False, **options)


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def tensors(*files: Path) -> dict[str, Any]:
    return {tensor.name: tensor for file in files for tensor in GGUFReader(file).tensors}


def test_a_directory_gets_a_file_of_the_usual_name_that_says_where_it_is_from(folder: Path, tmp_path: Path) -> None:
    (file,) = write(folder, tmp_path / "out", type="BF16", metadata={"quantized_by": "someone"})
    assert file.name == "Tiny-Llama-Instruct-v2.1-BF16.gguf"
    found = fields(file)
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny-Llama-Instruct-v2.1",
        "general.finetune": "Instruct",
        "general.version": "v2.1",
        "general.size_label": "127K",
        "general.license": "apache-2.0",
        "general.quantized_by": "someone",
        "general.base_model.count": 1,
        "general.base_model.0.repo_url": "https://huggingface.co/someone/Tiny-Llama-1.5B",
        "general.tags": ["text-generation"],
        "general.languages": ["en"],
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 500,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_types_of_tensors(folder: Path, tmp_path: Path) -> None:
    found = {name: tensor.tensor_type for name, tensor in tensors(*write(folder, tmp_path / "model.gguf", type="q8_0")).items()}
    vectors = {name for name, kind in found.items() if kind is Type.F32}
    assert vectors == {name for name in found if name.endswith((".bias", "norm.weight"))}
    assert {found[name] for name in found.keys() - vectors} == {Type.Q8_0}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    rows = (torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 64)[:, None]).to(dtype)
    expected = gguf.quants.quantize(rows.float().numpy(), Type[kind])
    assert encode.encode(rows, Type[kind]).tobytes() == expected.tobytes()
    assert encode.encode(rows, Type[kind]).nbytes == encode.n_bytes((64, 96), Type[kind])


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_shards_hold_the_same_and_run(folder: Path, model: Any, size: int, runtime: Any, divergence: Any, tmp_path: Path) -> None:
    (whole,) = write(folder, tmp_path / "whole.gguf", type="F32")
    files = write(folder, tmp_path / "parts.gguf", type="F32", shard_size=size)
    count = len(files)
    assert [file.name for file in files] == [f"parts-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    assert count > 2
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in [*files, whole])
    found, expected = tensors(*files), tensors(whole)
    assert [(fields(file)["split.no"], fields(file)["split.count"]) for file in files] == [(n, count) for n in range(count)]
    assert {fields(file)["split.tensors.count"] for file in files} == {len(expected)}
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name].data, expected[name].data) for name in expected)
    assert all(sum(t.n_bytes for t in GGUFReader(file).tensors) <= size or len(GGUFReader(file).tensors) == 1 for file in files)
    assert divergence(model, runtime(files[0]), [5, 6, 7, 8, 9]) < 1e-6
    with pytest.raises(FileExistsError, match=f"{files[0].name} exists; choose another name, or say overwrite=True"):
        write(folder, tmp_path / "parts.gguf", type="F32", shard_size=size)


def test_a_head_that_is_tied_is_not_written_twice(tiny_llama: Any, byte_level: Any, tmp_path: Path) -> None:
    """Some checkpoints hold it all the same. The sizes are those of no alignment: the file ends aligned, as readers expect."""
    tiny_llama(vocab_size=500, hidden_size=36, num_attention_heads=2, tie_word_embeddings=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    head = torch.zeros_like(stored["model.embed_tokens.weight"])
    save_file({**stored, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (file,) = write(tmp_path, tmp_path / "model.gguf", tokenizer=byte_level())
    assert "output.weight" not in tensors(file)
    assert [file.stat().st_size % 32, GGUFReader(file).tensors[-1].n_bytes % 32] == [0, 16]


def test_an_existing_file_stays_unless_overwritten(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("old")
    with pytest.raises(FileExistsError, match="model.gguf exists"):
        write(folder, path)
    assert path.read_text() == "old"
    write(folder, path, overwrite=True)
    assert len(tensors(path)) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model.gguf could not be written \(File too large\); nothing of it is left"):
            write(folder, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), dict(free=1000)))
    with pytest.raises(OSError, match=r"has [\d.]+ MB free, model.gguf needs [\d.]+ MB"):
        write(folder, path, overwrite=True)
    assert (path.read_text(), [file.name for file in tmp_path.iterdir()]) == ("old", ["model.gguf"])


def test_a_failing_tensor_leaves_nothing_and_is_named(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    broken = replace(checkpoint, load=lambda name: checkpoint.load(name) * (1e6 if name.endswith("1.mlp.up_proj.weight") else 1))
    with pytest.raises(
        ValueError, match=r"^model.layers.1.mlp.up_proj.weight: a value of .* does not fit float16 .*: use type BF16 or F32"
    ):
        export(broken, tmp_path / "model.gguf", type="F16", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_is_in_memory_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are asked for one by one, each written and let go before the next; long ones are encoded in pieces."""
    checkpoint, events, last = open_checkpoint(folder), list[Any](), list[Any]()

    def encoded(rows: torch.Tensor, kind: Type, importance: torch.Tensor | None = None) -> Any:
        events.append(tuple(rows.shape))
        return encode.encode(rows, kind, importance)

    def loaded(name: str) -> torch.Tensor:
        events.append(name)
        assert all(before() is None for before in last), f"the tensor before {name} is still there"
        tensor = checkpoint.load(name)
        last[:] = [weakref.ref(tensor)]
        return tensor

    monkeypatch.setattr(writer, "encode", encoded)
    monkeypatch.setattr(writer, "_CHUNK", 64 * 100)
    (file,) = export(replace(checkpoint, load=loaded), tmp_path, progress=False)
    (plain,) = export(checkpoint, tmp_path / "plain.gguf", progress=False)
    assert file.read_bytes() == plain.read_bytes()
    place = events.index("model.embed_tokens.weight")
    assert events[place + 1 : place + 7] == [(100, 64)] * 5 + ["model.layers.0.input_layernorm.weight"]


def test_a_progress_bar_is_shown_where_it_is_wanted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(open_checkpoint(folder), tmp_path / "a.gguf", progress=True)
    assert "writing GGUF" in capsys.readouterr().err
    write(folder, tmp_path / "b.gguf")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_quantized_weights_are_permuted_and_dequantized(
    kind: str, write_awq: Any, tiny_llama: Any, byte_level: Any, runtime: Any, divergence: Any, tmp_path: Path
) -> None:
    model = write_awq(tiny_llama(vocab_size=500), tmp_path / "awq")
    (file,) = export(open_checkpoint(tmp_path / "awq"), tmp_path / "model.gguf", type=kind, tokenizer=byte_level(), progress=False)
    bound = {"F32": 1e-6, "F16": 1e-5, "Q8_0": 3e-3}[kind]
    assert divergence(model, runtime(file), [5, 6, 7, 8, 9, 100, 200, 300]) < bound
    if kind != "Q8_0":
        found = type(model).from_pretrained(tmp_path, gguf_file="model.gguf", config=model.config, dtype=torch.float32).state_dict()
        for name, tensor in model.state_dict().items():
            expected = tensor if kind == "F32" or tensor.ndim == 1 else tensor.half().float()
            torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def experts(random_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Mixtral whose experts are quantized, each under its own name as on the Hub; and the same dequantized."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    config = AutoConfig.for_model("mixtral", **sizes, num_local_experts=4, sliding_window=None, pad_token_id=0)
    dense, packed = (tmp_path_factory.mktemp("experts") / name for name in ("dense", "awq"))
    random_model(config).save_pretrained(dense)
    stored = load_file(dense / "model.safetensors")
    quantized = dict(stored)
    for name in [name for name in stored if ".experts." in name]:
        spec = QuantSpec(4, 32)
        grid = choose_grid(stored[name], spec)
        weight = to_quantized_weight(quantize(stored[name], grid), grid)
        stored[name] = dequantize_weight(weight)
        owner = name.removesuffix(".weight")
        quantized |= {f"{owner}.{part}": value.data for part, value in AwqLinear.from_quantized(weight).named_parameters()}
        del quantized[name]
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    save_file(quantized, packed / "model.safetensors", metadata={"format": "pt"})
    description = dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm")
    content = json.loads((dense / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**content, "quantization_config": description}))
    return dense, packed


def test_quantized_experts_are_stacked(experts: Any, byte_level: Any, runtime: Any, divergence: Any, tmp_path: Path) -> None:
    dense, packed = experts
    file = export(open_checkpoint(packed), tmp_path / "model.gguf", type="F32", tokenizer=byte_level(), progress=False)[0]
    assert tuple(tensors(file)["blk.1.ffn_down_exps.weight"].shape) == (96, 64, 4)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert divergence(model, runtime(file), [5, 6, 7, 8, 9, 100, 200, 300]) < 1e-6


@pytest.mark.parametrize("expert", [1, 3])
def test_a_missing_expert_is_named(experts: Any, expert: int, byte_level: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(experts[0])
    del checkpoint.headers[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
    with pytest.raises(ValueError, match=rf"4 experts, but the checkpoint has 3 for blk.1.ffn_down_exps.weight \(missing: \[{expert}\]\)"):
        export(checkpoint, tmp_path / "model.gguf", tokenizer=byte_level(), progress=False)


_KINDS = ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_type="gpt2"), "model_type 'gpt2' is not exported to GGUF; those that are: llama, .* add its line"),
        (dict(model_type="gemma2", query_pre_attn_scalar=100), "query_pre_attn_scalar is 100, but llama.cpp computes GEMMA2 .* with 256"),
        (dict(model_type="gemma2", tie_word_embeddings=False), "tie_word_embeddings is False, but .* with True only"),
        (dict(model_type="gemma2", num_hidden_layers=3, layer_types=_KINDS), "layer_types is"),
        (dict(model_type="qwen3_moe", norm_topk_prob=False), "norm_topk_prob is False"),
        (dict(model_type="llama", hidden_act="gelu"), "the activation is gelu"),
        (dict(model_type="qwen2", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "rope_type is 'dynamic'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(options: dict[str, Any], message: str, byte_level: Any, tmp_path: Path) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    moe = dict(num_experts=4, moe_intermediate_size=32) if options["model_type"] == "qwen3_moe" else {}
    config = AutoConfig.for_model(**{**sizes, **moe, "pad_token_id": 0, **options})
    checkpoint = open_checkpoint(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out" / "model.gguf", tokenizer=byte_level())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda headers: headers.pop("model.layers.1.mlp.up_proj.weight"), "no tensor for blk.1.ffn_up.weight: it is not complete"),
        (lambda headers: headers.pop("lm_head.weight"), "no tensor for output.weight"),
        (lambda headers: headers.update(odd=headers["lm_head.weight"]), "odd has no place in a GGUF file of LLAMA"),
    ],
)
def test_checkpoints_that_lack_tensors_or_have_others_are_refused(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    change(checkpoint.headers)
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "model.gguf", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type 'Q9' is not written to GGUF files; choose one of F32, F16"):
        write(folder, tmp_path, type="Q9")
    with pytest.raises(ValueError, match="metadata has no field 'licence'; there are: .*license"):
        write(folder, tmp_path, metadata={"licence": "mit"})


def test_a_window_that_llama_cpp_does_not_compute_limits_the_context(
    random_model: Any, byte_level: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    for kind, expected in (("mistral", 32), ("phi3", 32)):
        config = AutoConfig.for_model(kind, **sizes, sliding_window=32, max_position_embeddings=256, pad_token_id=0)
        checkpoint, options = open_checkpoint(random_model(config)), dict(tokenizer=byte_level(), progress=False)
        with caplog.at_level(logging.WARNING, "awq_hf"):
            (file,) = export(checkpoint, tmp_path / kind, metadata={"name": "x"}, **options)
        found = fields(file)
        assert found[f"{found['general.architecture']}.context_length"] == expected
        assert "llama.cpp has no sliding window" in caplog.text
    assert found["phi3.attention.sliding_window"] == 32
    with pytest.raises(ValueError, match=r"llama.cpp takes a model named 'Phi3ForCausalLM' for Phi-3 .*\(</s>\): give another name"):
        export(checkpoint, tmp_path, **options)
