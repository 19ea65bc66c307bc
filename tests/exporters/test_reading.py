"""Exports read back: the integers of the checkpoint, whatever the format; what is not read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.exporters.reading import NotReadHere, load_export, open_export
from awq_hf.spec import QuantizedWeight

FORMATS = ("compressed-tensors", "gptq")


def load(path: Path) -> Any:
    return load_export(AutoModelForCausalLM, str(path), {}, dtype=torch.float32)


def logits(model: Any, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(prompt).logits
    return found


def parts_of(value: Tensor | QuantizedWeight) -> tuple[str, ...]:
    return ("q", "scales", "zero_points") if isinstance(value, QuantizedWeight) else ("data",)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"), [(4, False, 32), (4, True, 16), (8, False, -1), (3, False, 32), (2, True, 32)]
)
def test_what_was_exported_is_read_back(
    bits: int, symmetric: bool, group_size: int, target: str, tiny_llama: Any, plain: Any, prompt: Tensor, tmp_path: Path
) -> None:
    model = plain(tiny_llama(num_hidden_layers=1), bits=bits, zero_point=not symmetric, group_size=group_size)
    awq_hf.export(model, target, tmp_path / "out")
    before = dict(open_checkpoint(model).items())
    for name, value in open_export(tmp_path / "out").items():
        expected: Any = before.pop(name)
        assert all(torch.equal(getattr(value, part), getattr(expected, part)) for part in parts_of(value)), name
        assert not isinstance(value, QuantizedWeight) or value.spec == expected.spec
    assert not before
    assert torch.equal(logits(load(tmp_path / "out"), prompt), logits(model, prompt))


@pytest.mark.parametrize("target", FORMATS)
def test_modules_that_differ_are_read_as_what_they_are(target: str, tiny_llama: Any, plain: Any, prompt: Tensor, tmp_path: Path) -> None:
    model = plain(tiny_llama(), overrides={"down_proj": {"bits": 8}, "layers.1.self_attn.v_proj": None, "o_proj": {"group_size": 16}})
    awq_hf.export(model, target, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out"), prompt), logits(model, prompt))


def change(path: Path, tensors: Callable[[dict[str, Tensor]], Any] = lambda _: None, **config: Any) -> None:
    stored = load_file(path / "model.safetensors")
    tensors(stored)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"] |= config
    (path / "config.json").write_text(json.dumps(content))


NAME = "model.layers.0.mlp.up_proj"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "stored as float-quantized": ("compressed-tensors", dict(config_groups={"g": {"weights": WEIGHTS, "format": "float-quantized"}})),
    "quantizes activations": ("compressed-tensors", dict(config_groups={"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}})),
    "cache of keys": ("compressed-tensors", dict(kv_cache_scheme={"num_bits": 8})),
    "weight_g_idx": ("compressed-tensors", dict(tensors=lambda t: t.update({f"{NAME}.weight_g_idx": torch.arange(64)}))),
    "order of its own": ("gptq", dict(tensors=lambda t: t.update({f"{NAME}.g_idx": t[f"{NAME}.g_idx"].flip(0).contiguous()}))),
    "checkpoint_format is marlin": ("gptq", dict(checkpoint_format="marlin")),
    "zero point is 16 or 0": ("gptq", dict(checkpoint_format="gptq", tensors=lambda t: t[f"{NAME}.qzeros"].fill_(-1))),
    "no tensor is named": ("gptq", dict(tensors=lambda t: [t.pop(name) for name in list(t) if name.endswith("qweight")])),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_read_is_named(said: str, quantized_dir: Path, tmp_path: Path) -> None:
    target, changes = REFUSED[said]
    awq_hf.export(quantized_dir, target, tmp_path / "out")
    change(tmp_path / "out", **changes)
    with pytest.raises(NotReadHere, match=said):
        list(open_export(tmp_path / "out").items())
