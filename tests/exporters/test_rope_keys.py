"""The rotary keys of transformers 4 beside those of transformers 5."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf.exporters.rope_keys import add_older_rope_keys, with_older_rope_keys

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_the_older_keys_say_what_the_newer_do() -> None:
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "hidden_size": 8}
    assert with_older_rope_keys(plain) == {**plain, "rope_theta": 1e6}
    scaled = with_older_rope_keys({"rope_parameters": LLAMA3})
    assert scaled["rope_theta"] == 5e5 and scaled["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}


def test_nested_configs_are_completed_and_what_is_there_stays() -> None:
    nested = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}, "rope_parameters": None}
    assert with_older_rope_keys(nested)["text_config"]["rope_theta"] == 2.0
    given = {"rope_parameters": {"rope_theta": 1.0}, "rope_theta": 7.0}
    assert with_older_rope_keys(given)["rope_theta"] == 7.0
    by_layer = {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}}
    assert with_older_rope_keys(by_layer) == by_layer


def test_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": LLAMA3}))
    add_older_rope_keys(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 5e5
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_saved_models_carry_both_and_transformers_reads_them_as_before(
    tiny_llama: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    quantized = awq_hf.quantize(tiny_llama(rope_parameters=LLAMA3), small_config())
    quantized.save_pretrained(tmp_path / "once")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert torch.equal(loaded(prompt).logits, quantized(prompt).logits)
    loaded.save_pretrained(tmp_path / "twice")
    for name in ("once", "twice"):
        assert json.loads((tmp_path / name / "config.json").read_text())["rope_scaling"]["rope_type"] == "llama3"
