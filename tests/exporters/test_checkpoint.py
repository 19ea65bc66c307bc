"""What exporters read, from models in memory and from files: the same tensors under the same names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

import awq_hf
from awq_hf import QuantizedWeight, QuantSpec
from awq_hf.affine import dequantize_weight
from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.opening import _Files, open_checkpoint
from awq_hf.headers import read_headers


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    items = checkpoint.items()
    return {name: dequantize_weight(value) if isinstance(value, QuantizedWeight) else value.float() for name, value in items}


def test_a_directory_and_the_model_loaded_from_it_give_the_same(quantized_dir: Path) -> None:
    on_disk, in_memory = open_checkpoint(quantized_dir), open_checkpoint(AutoModelForCausalLM.from_pretrained(quantized_dir))
    assert on_disk.names() == in_memory.names()
    for (name, one), (other_name, other) in zip(on_disk.items(), in_memory.items(), strict=True):
        assert name == other_name and type(one) is type(other)
        if isinstance(one, QuantizedWeight):
            assert isinstance(other, QuantizedWeight) and one.spec == other.spec == QuantSpec(4, 32)
            pairs = [(one.q, other.q), (one.scales, other.scales), (one.zero_points, other.zero_points)]
        else:
            assert isinstance(other, Tensor)
            pairs = [(one, other)]
        assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in pairs), name
    assert on_disk.config_dict == in_memory.config_dict
    assert on_disk.dtype == in_memory.dtype == torch.float32


def test_the_values_are_those_of_the_dequantized_model(quantized_dir: Path) -> None:
    found = values(open_checkpoint(quantized_dir))
    expected = AutoModelForCausalLM.from_pretrained(quantized_dir).dequantize(torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_names_say_what_items_give_in_the_order_of_layers(tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    overrides = {"layers.10.mlp.down_proj": {"bits": 3}, "layers.2.self_attn": None}
    model = awq_hf.quantize(tiny_llama(num_hidden_layers=11), small_config(rounding="nearest", overrides=overrides))
    checkpoint = open_checkpoint(model)
    entries = {entry.name: entry for entry in checkpoint.names()}
    items = dict(checkpoint.items())
    assert list(items) == list(entries)
    assert list(entries).index("model.layers.2.mlp.up_proj.weight") < list(entries).index("model.layers.10.mlp.up_proj.bias")
    for name, value in items.items():
        assert tuple(value.shape) == entries[name].shape
        assert entries[name].kind == (value.spec if isinstance(value, QuantizedWeight) else value.dtype)
    assert entries["model.layers.10.mlp.down_proj.weight"].kind == QuantSpec(3, 32)
    assert entries["model.layers.2.self_attn.q_proj.weight"].kind == torch.float32


def test_one_tensor_is_read_at_a_time(quantized_dir: Path) -> None:
    checkpoint = open_checkpoint(quantized_dir)
    read: list[str] = []
    load = checkpoint.load

    def noted(name: str) -> Tensor:
        read.append(name)
        return load(name)

    object.__setattr__(checkpoint, "load", noted)
    entries, items = checkpoint.names(), checkpoint.items()
    assert read == []
    for entry in entries:
        read.clear()
        next(items)
        assert len(read) == (3 if isinstance(entry.kind, QuantSpec) else 1)


def test_a_float_model_gives_tensors_only(llama_dir: Path, tiny_llama: Callable[..., Any]) -> None:
    checkpoint, state = open_checkpoint(llama_dir), tiny_llama().state_dict()
    assert checkpoint.quantization is None and not checkpoint.packed
    found = values(checkpoint)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_tied_heads_are_no_items(tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    model = awq_hf.quantize(tiny_llama(tie_word_embeddings=True), small_config(rounding="nearest"))
    checkpoint = open_checkpoint(model)
    assert "lm_head.weight" not in dict(checkpoint.items())
    assert checkpoint.config_dict["tie_word_embeddings"] is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype: torch.dtype, tiny_llama: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path) -> None:
    model = write_awq(tiny_llama(), tmp_path / "awq")
    stored = load_file(tmp_path / "awq" / "model.safetensors")
    save_file({n: t.to(dtype) if n.endswith(".scales") else t for n, t in stored.items()}, tmp_path / "awq" / "model.safetensors")
    found = dict(open_checkpoint(tmp_path / "awq").items())
    weights = {name: value for name, value in found.items() if isinstance(value, QuantizedWeight)}
    assert {weight.scales.dtype for weight in weights.values()} == {dtype}
    if dtype != torch.bfloat16:
        assert all(torch.equal(dequantize_weight(weight), model.state_dict()[name]) for name, weight in weights.items())


@pytest.mark.parametrize("version", ["gemm", None])
def test_a_matrix_is_symmetric_if_its_zero_points_are(
    version: str | None, tiny_llama: Callable[..., Any], small_config: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path
) -> None:
    """Whatever the config says."""
    write_awq(tiny_llama(), tmp_path / "awq", zero_point=False, version=version)
    checkpoint = open_checkpoint(tmp_path / "awq")
    assert {entry.kind for entry in checkpoint.names() if isinstance(entry.kind, QuantSpec)} == {QuantSpec(4, 32, symmetric=False)}
    symmetric = open_checkpoint(awq_hf.quantize(tiny_llama(), small_config(rounding="nearest", zero_point=False)))
    assert {entry.kind for entry in symmetric.names() if isinstance(entry.kind, QuantSpec)} == {QuantSpec(4, 32, symmetric=True)}


# Names on disk

MIXTRAL = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_local_experts=2)


def test_names_are_those_of_the_checkpoint_not_of_the_module(random_model: Callable[..., Any], tmp_path: Path) -> None:
    """Mixtral's experts are one tensor in memory and one matrix each on disk."""
    model = random_model(MixtralConfig(**MIXTRAL))
    model.save_pretrained(tmp_path / "float")
    in_memory, on_disk = open_checkpoint(model), open_checkpoint(tmp_path / "float")
    assert in_memory.names() == on_disk.names()
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in dict(in_memory.items())


def test_experts_that_transformers_would_fuse_are_read(
    random_model: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path
) -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Linear(64, 96, bias=False)

    model = random_model(MixtralConfig(**MIXTRAL))
    model.model.layers[0].mlp.more = Expert()
    written = write_awq(model, tmp_path / "awq", quantized=".more.", rename=lambda n: n.replace("mlp.more", "block_sparse_moe.experts.0"))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.qweight" in load_file(tmp_path / "awq" / "model.safetensors")
    found = values(open_checkpoint(tmp_path / "awq"))
    assert torch.equal(found["model.layers.0.block_sparse_moe.experts.0.w1.weight"], written.model.layers[0].mlp.more.w1.weight)


# What comes along


def test_files_that_belong_to_the_model_come_along(demo_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((demo_dir / "model" / name).read_bytes())
    extra = ["chat_template.jinja", "modeling_mine.py", "preprocessor_config.json", "LICENSE", "spiece.model"]
    for name in [*extra, "README.md", "pytorch_model.bin", "model.safetensors.index.json.old", "quantize_config.json", "training_args.pt"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("")
    found = {str(path.relative_to(tmp_path)) for path in open_checkpoint(tmp_path).files()}
    assert found == {"generation_config.json", "tokenizer.json", "tokenizer_config.json", *extra, "additional_chat_templates/tools.jinja"}


@pytest.fixture
def in_cache(quantized_dir: Path, tmp_path: Path) -> Path:
    """A cache of the Hub that holds somebody/model, of which main is another revision than v1."""
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        snapshot = tmp_path / "models--somebody--model" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in quantized_dir.iterdir():
            (snapshot / path.name).symlink_to(path)
        (snapshot / f"tokenizer_{revision}.json").write_text("{}")
        refs = tmp_path / "models--somebody--model" / "refs"
        refs.mkdir(exist_ok=True)
        (refs / revision).write_text(commit)
    return tmp_path


def test_a_model_of_the_hub(in_cache: Path, quantized_dir: Path) -> None:
    main, v1 = (open_checkpoint("somebody/model", cache_dir=in_cache, revision=revision) for revision in (None, "v1"))
    assert main.names() == v1.names() == open_checkpoint(quantized_dir).names()
    assert {"tokenizer_main.json"} == {path.name for path in main.files()} - {path.name for path in v1.files()}
    assert main.label == "somebody/model"
    with pytest.raises(ValueError, match="somebody/other is no directory here, and the Hub does not give such a model"):
        open_checkpoint("somebody/other", cache_dir=in_cache)


# Refused


def test_what_cannot_be_exported_is_refused_with_the_reason(
    llama_dir: Path, quantized_dir: Path, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    def with_config(source: Path, **changes: Any) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        (path / "model.safetensors").symlink_to(source / "model.safetensors")
        (path / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
        return path

    with pytest.raises(ValueError, match="is quantized .gptq.; AWQ checkpoints and float ones"):
        open_checkpoint(with_config(quantized_dir, quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ValueError, match="qweight of .* is quantized, which config.json should say"):
        open_checkpoint(with_config(quantized_dir, quantization_config=None))
    with pytest.raises(ValueError, match="no tensor is named .*qweight"):
        open_checkpoint(with_config(llama_dir, quantization_config={"quant_method": "awq"}))
    with pytest.raises(ValueError, match=r"down_proj.qweight is I32 \[96, 8\], expected I32 \[96, 16\].*look like bits=4, group_size=32"):
        open_checkpoint(
            with_config(quantized_dir, quantization_config={"quant_method": "awq", "bits": 8, "group_size": 32, "version": "awq_hf"})
        )
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        open_checkpoint("no/such/model")
    with pytest.raises(ValueError, match=r"is a file"):
        open_checkpoint(llama_dir / "config.json")
    with pytest.raises(TypeError, match="Linear is neither a transformers model"):
        open_checkpoint(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="revision"):
        open_checkpoint(tiny_llama(), revision="main")


def test_a_tensor_that_is_not_finite_is_named(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"model.norm.weight of .* holds NaN"):
        list(open_checkpoint(model).items())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_what_was_read_of_a_file_is_given_back(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(8)]
    save_file({name: torch.full((1 << 20,), i) for i, name in enumerate(names)}, tmp_path / "m.safetensors")  # 8 MiB each
    files = _Files(read_headers([tmp_path / "m.safetensors"]))

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    before = mapped()
    assert [int(files.load(name).float().mean()) for name in names] == list(range(8))
    assert mapped() - before < 16_384  # of 65,536 kB
