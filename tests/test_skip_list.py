"""The skip list against the three ways in which loaders read it."""

from __future__ import annotations

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from awq_hf.skip_list import caveats, skip_list

LINEARS = [
    f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
]
VISION = [f"model.visual.blocks.{i}.attn.{name}" for i in range(3) for name in ("qkv", "proj")] + ["model.visual.merger.mlp.0"]


def by_substring(entries: list[str], names: list[str]) -> set[str]:
    """AutoAWQ, vLLM, SGLang."""
    return {name for name in names if any(entry in name for entry in entries)}


def by_transformers(entries: list[str], names: list[str]) -> set[str]:
    return {name for name in names if not should_convert_module(name, entries)}


@pytest.mark.parametrize(
    "left",
    [
        ["lm_head"],
        ["lm_head", *VISION],
        ["lm_head", *(name for name in LINEARS if "layers.1." in name)],  # and not layers.10, layers.11
        ["lm_head", *(name for name in LINEARS if "down_proj" in name)],
        ["lm_head", LINEARS[0], LINEARS[5], *VISION[:3]],
        [],
    ],
)
def test_every_loader_leaves_out_the_same_and_nothing_else(left: list[str]) -> None:
    names = [*LINEARS, *VISION, "lm_head"]
    quantized = [name for name in names if name not in left]
    entries = skip_list(left, quantized)
    assert by_substring(entries, names) == by_transformers(entries, names) == set(left)
    assert caveats(entries, [], quantized) == []


def test_a_tower_is_one_entry_and_its_short_name() -> None:
    assert skip_list(["lm_head", *VISION], LINEARS) == ["lm_head", "model.visual", "visual"]


def test_a_name_inside_another_is_said() -> None:
    quantized = ["model.layers.0.mlp.gate_proj"]
    entries = skip_list(["model.layers.0.mlp.gate"], quantized)
    assert entries == ["model.layers.0.mlp.gate"]
    (sentence,) = caveats(entries, ["model.layers.0.mlp.gate"], quantized)
    assert "take model.layers.0.mlp.gate_proj for float as well, because model.layers.0.mlp.gate is" in sentence


def test_parts_of_what_servers_fuse_are_said() -> None:
    left = ["model.layers.0.self_attn.q_proj"]
    quantized = [name for name in LINEARS if name not in left]
    (sentence,) = caveats(skip_list(left, quantized), left, quantized)
    assert "refuses model.layers.0.self_attn: model.layers.0.self_attn.q_proj is float, k_proj is quantized" in sentence
