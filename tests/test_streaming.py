"""A model is quantized in the memory of its quantized form and one block: blocks come out of their files one by one, to the same result."""

from __future__ import annotations

import gc
import weakref
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
from awq_hf.block import BlockWork
from awq_hf.blocks import find_blocks, matrices_of
from awq_hf.hf_quantizer import AwqHfQuantizer
from awq_hf.streaming import InFiles, default_device, load_float
from tests.mixtures import MODELS as EXPERTS
from tests.test_architectures import ARCHITECTURES

XGLM = dict(vocab_size=96, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, max_position_embeddings=128)
OTHERS = {
    "nothing is unusual": (transformers.LlamaConfig, ARCHITECTURES["llama"].sizes),
    "layers are Conv1D": (transformers.GPT2Config, ARCHITECTURES["gpt2"].sizes),
    "names are changed": (transformers.LlavaConfig, ARCHITECTURES["llava"].sizes),
    "buffers are in no file": (transformers.XGLMConfig, XGLM),
    "experts are fused": (EXPERTS["mixtral"], {}),
}


@pytest.fixture(scope="module", params=OTHERS)
def checkpoint(
    request: pytest.FixtureRequest, random_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """(The class to load it with, the directory.) In files of a tensor or two each: a block is spread over many."""
    build, options = OTHERS[request.param]
    auto = transformers.AutoModelForImageTextToText if build is transformers.LlavaConfig else AutoModelForCausalLM
    path = tmp_path_factory.mktemp("streamed") / "float"
    random_model(build(**options), auto=auto).save_pretrained(path, max_shard_size="20KB")
    return auto, path


def same(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_result_is_that_of_a_model_in_memory(checkpoint: tuple[Any, Path], small_config: Callable[..., Any], tmp_path: Path) -> None:
    auto, path = checkpoint
    config = small_config(rounding="nearest")  # the quicker one
    streamed = auto.from_pretrained(path, quantization_config=config)
    whole = awq_hf.quantize(auto.from_pretrained(path), config)
    assert [vars(layer) for layer in streamed.awq_report.layers] == [vars(layer) for layer in whole.awq_report.layers]
    assert not any(tensor.is_meta for tensor in (*streamed.parameters(), *streamed.buffers()))
    streamed.save_pretrained(tmp_path / "streamed")
    whole.save_pretrained(tmp_path / "whole")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_blocks_are_cast_as_they_are_loaded(llama_dir: Path, small_config: Callable[..., Any]) -> None:
    config = small_config(rounding="nearest")
    streamed = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16, quantization_config=config)
    whole = awq_hf.quantize(AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16), config)
    ours, theirs = streamed.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all((ours[name].dtype, tensor.dtype) == (tensor.dtype,) * 2 for name, tensor in theirs.items())


def test_one_block_is_in_memory_at_a_time(
    tiny_llama: Callable[..., Any], small_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path)
    seen: list[list[str]] = []
    weights: list[weakref.ref[Any]] = []

    class Watched(InFiles):
        def load(self, index: int) -> None:
            gc.collect()
            assert not any(weight() is not None for weight in weights), "float weights that were there before are kept by something"
            super().load(index)
            note(self.model)
            weights.extend(weakref.ref(linear.weight) for linear in matrices_of(self.blocks[index]).values())

    def note(model: Any) -> None:
        """Of each block: in its file, float, or quantized."""
        blocks = find_blocks(model)[1]
        meta = [all(p.is_meta for p in block.parameters()) for block in blocks]
        real = [not any(p.is_meta for p in block.parameters()) for block in blocks]
        packed = [hasattr(block.get_submodule("mlp.down_proj"), "qweight") for block in blocks]
        assert all(a != b for a, b in zip(meta, real, strict=True))
        seen.append(["file" if m else "packed" if p else "float" for m, p in zip(meta, packed, strict=True)])

    monkeypatch.setattr("awq_hf.streaming.InFiles", Watched)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=small_config())
    looked_through = [["float" if i == at else "file" for i in range(4)] for at in range(4)]
    assert seen == looked_through + [["packed" if i < at else "float" if i == at else "file" for i in range(4)] for at in range(4)]


def test_a_key_mapping_is_followed(
    llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    tensors = {name.replace("self_attn", "mixer"): tensor for name, tensor in load_file(llama_dir / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama_dir / "config.json").read_text())
    renamed = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping={"mixer": "self_attn"}, quantization_config=small_config())
    assert torch.equal(renamed(prompt).logits, AutoModelForCausalLM.from_pretrained(quantized_dir)(prompt).logits)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_weight_of_the_last_block_is_refused_before_any_work(
    value: float, llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(llama_dir / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(value)
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in" / "config.json").write_text((llama_dir / "config.json").read_text())
    begun: list[Any] = []
    monkeypatch.setattr(BlockWork, "discover_folds", lambda *arguments: begun.append(arguments))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight (holds NaN|is zero throughout)"):
        awq_hf.quantize(tmp_path / "in", small_config(), output_dir=tmp_path / "out", resume=True)
    assert not begun and [path.name for path in tmp_path.iterdir()] == ["in"]


def test_files_that_change_meanwhile_are_noticed(llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path) -> None:
    tensors = load_file(llama_dir / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama_dir / "config.json").read_text())
    original = AwqHfQuantizer._process_model_after_weight_loading

    def changed(self: Any, model: Any, **options: Any) -> Any:
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return original(self, model, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AwqHfQuantizer, "_process_model_after_weight_loading", changed)
        with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight could not be loaded from its file"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=small_config())


def test_auto_is_the_first_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert default_device() == torch.device("cuda", 0)


def test_blocks_that_share_weights_are_loaded_whole(random_model: Callable[..., Any], tmp_path: Path) -> None:
    """Zamba 2: the files hold what several blocks share once. The float model can be run, though not quantized."""
    sizes = {**ARCHITECTURES["llama"].sizes, "num_hidden_layers": 4}
    mamba = dict(mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=16, num_mem_blocks=1)
    original = random_model(transformers.Zamba2Config(**sizes, **mamba, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]))
    original.save_pretrained(tmp_path)
    loaded, source = load_float(AutoModelForCausalLM, tmp_path)
    assert source.later is None and same(loaded, original) and "_is_quantized" not in vars(loaded.config)
