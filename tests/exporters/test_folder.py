"""Exports as files: shards, what comes along, what is refused; whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf.exporters import folder
from awq_hf.exporters.folder import in_bytes


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


# Files


def test_shards_and_their_index(quantized_dir: Path, prompt: Tensor, tmp_path: Path) -> None:
    awq_hf.export(quantized_dir, "awq", tmp_path / "out", max_shard_size="40KB")
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert [path.name for path in shards] == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 2 and all(path.stat().st_size < 40_000 + 4_000 for path in shards)
    held: dict[str, str] = {}
    for path in shards:
        with safe_open(path, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
            assert file.metadata() == {"format": "pt"}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    load = AutoModelForCausalLM.from_pretrained
    assert torch.equal(load(tmp_path / "out")(prompt).logits, load(quantized_dir)(prompt).logits)


def test_no_more_than_a_shard_is_in_memory(quantized_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def save(shard: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        save_file(shard, path, metadata)

    monkeypatch.setattr(folder, "save_file", save)
    awq_hf.export(quantized_dir, "dense", tmp_path / "out", max_shard_size=30_000)
    assert len(sizes) > 2 and max(sizes) <= 30_000


@pytest.mark.parametrize("size, number", [("4GB", 4 * 10**9), ("1.5 kb", 1500), (70, 70), ("300", 300), ("2M", 2 * 10**6)])
def test_sizes(size: str | int, number: int) -> None:
    assert in_bytes(size) == number


@pytest.mark.parametrize("size", ["4GiB", "-1", 0, "0MB", "many", ""])
def test_what_is_no_size(size: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        in_bytes(size)


def test_what_belongs_to_a_model_comes_along(demo_dir: Path, plain: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    awq_hf.quantize(
        demo_dir / "model", awq_hf.AwqConfig.plain_rounding(calibration=demo_dir / "calibration.txt", samples=2), output_dir=source
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_own.py").write_text("raise SystemExit")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("x")
    (source / "README.md").write_text("of the other repository")
    awq_hf.export(source, "compressed-tensors", tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "report.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "modeling_own.py", "additional_chat_templates/tools.jinja"),
    }
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (demo_dir / "model/tokenizer.json").read_bytes()


# Refused, before anything is written


@pytest.mark.parametrize(
    "target, options, error, message",
    [
        ("nothing", {}, ValueError, "there is no target 'nothing'; choose one of awq, compressed-tensors, gptq, dense, gguf"),
        ("awq", {"dtype": "float16"}, TypeError, "the target awq has no option 'dtype'; it has max_shard_size"),
        ("dense", {"dtype": "int8"}, ValueError, "dtype='int8' is not known; choose one of auto, float16"),
        ("dense", {"max_shard_size": "big"}, ValueError, "max_shard_size='big' is not a size"),
    ],
)
def test_targets_and_options_that_do_not_exist(
    target: str, options: dict[str, Any], error: type[Exception], message: str, quantized_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        awq_hf.export(quantized_dir, target, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["awq", "compressed-tensors", "gptq"])
def test_a_float_model_has_no_integers_to_write(target: str, llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"is not quantized, and the target {target} holds quantized weights; run awq-hf quantize first"):
        awq_hf.export(llama_dir, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shapes_that_gptq_has_no_words_for(tiny_llama: Callable[..., Any], plain: Callable[..., Any], tmp_path: Path) -> None:
    model = plain(tiny_llama(hidden_size=48, num_hidden_layers=1), bits=3, group_size=16)
    with pytest.raises(
        ValueError, match=r"_features 48 of 3 bits does not fill whole 32-bit words.*the target compressed-tensors takes it"
    ):
        awq_hf.export(model, "gptq", tmp_path / "gptq")
    assert list(tmp_path.iterdir()) == []
    awq_hf.export(model, "compressed-tensors", tmp_path / "ct")
    assert tensors(tmp_path / "ct")["model.layers.0.mlp.up_proj.weight_packed"].shape == (96, 5)  # 48 * 3 / 32, rounded up


# Whole or not at all


def test_what_is_there_is_replaced_only_when_asked(quantized_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    awq_hf.export(quantized_dir, "awq", out)
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        awq_hf.export(quantized_dir, "gptq", out)
    assert config(out)["quantization_config"]["quant_method"] == "awq"
    with pytest.raises(ValueError, match="is where the model is read from"):
        awq_hf.export(out, "dense", out, overwrite=True)
    awq_hf.export(quantized_dir, "gptq", out, overwrite=True)
    assert config(out)["quantization_config"]["quant_method"] == "gptq"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is no model's directory"):
        awq_hf.export(quantized_dir, "gptq", tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_breaks_off_leaves_what_was_there(
    failure: BaseException, there: bool, quantized_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if there:
        awq_hf.export(quantized_dir, "awq", out)
    saved: list[Path] = []

    def save(shard: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if saved:
            raise failure
        saved.append(path)
        save_file(shard, path, metadata)

    monkeypatch.setattr(folder, "save_file", save)
    with pytest.raises(type(failure)):
        awq_hf.export(quantized_dir, "dense", out, max_shard_size="20KB", overwrite=True)
    assert saved
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])
    assert not there or config(out)["quantization_config"]["quant_method"] == "awq"
