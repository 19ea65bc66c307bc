"""How to run it: which commands and snippets a card has, by what is known of who reads what."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.missing import missing

from .conftest import awq, change, table, text_of, write_checkpoint, write_compressed_tensors


def test_symmetric_weights_lead_to_the_form_that_servers_run_fast(symmetric: Path) -> None:
    text = text_of(symmetric, "acme/tiny-sym")
    assert "vllm serve acme/tiny-sym\n" not in text and "--model-path" not in text
    assert "awq-hf export compressed-tensors acme/tiny-sym tiny-sym-compressed-tensors\nvllm serve tiny-sym-compressed-tensors\n" in text
    assert table(text, "Which file should I take?")[1][-1] == "GPUs and servers: transformers, MLX; slowly: vLLM, SGLang"
    told = dict(missing(gather(symmetric)))
    assert told["a form that vLLM and SGLang run with their fast kernels, as they do not run symmetric AWQ"] == (
        f"awq-hf export compressed-tensors {symmetric} {symmetric / 'compressed-tensors'}"
    )
    write_compressed_tensors(symmetric / "compressed-tensors")
    text = text_of(symmetric, "acme/tiny-sym")
    assert "vllm serve tiny-sym/compressed-tensors\n" in text and "awq-hf export" not in text and "vllm serve acme/tiny-sym\n" not in text
    assert not any("fast kernels" in what for what, _ in missing(gather(symmetric)))


def test_folders_say_how_they_are_run_where_that_is_known(symmetric: Path) -> None:
    """Symmetric GPTQ is for vLLM as well; a model of a class that servers do not take has a snippet of what loads it alone."""
    write_checkpoint(symmetric / "gptq", awq(quant_method="gptq", sym=True))
    text = text_of(symmetric, "a/b")
    assert "vLLM, SGLang and GPTQModel load whole repositories" in text and "gptqmodel import" not in text
    assert "vllm serve b/gptq\n" in text and "--model-path b/gptq\n" in text
    write_compressed_tensors(symmetric / "compressed-tensors")
    shutil.copytree(symmetric / "gptq", symmetric / "dense")
    for folder in ("gptq", "compressed-tensors", "dense"):
        changes = {"quantization_config": None} if folder == "dense" else {}
        change(symmetric / folder / "config.json", architectures=["BertForMaskedLM"], **changes)
    headings = re.findall("^### (.*)$", text_of(symmetric, "a/b"), re.MULTILINE)
    assert headings == ["transformers", "vLLM and SGLang", "MLX", "Dequantized, bfloat16"]


@pytest.mark.parametrize("how", [dict(group_size=16), dict(zero_point=True), dict(zero_point=None), dict(group_size="128")])
def test_other_weights_are_served_as_they_are(how: dict[str, Any], tmp_path: Path) -> None:
    """Groups of 16 are slow in every form; what a config does not say is not made up."""
    write_checkpoint(tmp_path / "x", awq(zero_point=False))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    change(tmp_path / "x" / "config.json", quantization_config={**config["quantization_config"], **how})
    assert "vllm serve x\n" in text_of(tmp_path / "x")


def test_only_awq_hf_reads_other_widths(three_bits: Path) -> None:
    text = text_of(three_bits)
    assert "only awq-hf reads this checkpoint" in text and "awq-hf only" in text
    assert not re.search("vllm serve|sglang.launch|MLX", text)


@pytest.mark.parametrize("changes", [{"version": "gemv"}, {"modules_to_not_convert": ["model.layers.1"]}])
def test_no_command_for_what_vllm_would_not_load(changes: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", awq(**changes))
    assert "vllm" not in text_of(tmp_path / "m")


def test_tag_of_a_gguf_file_only_where_it_is_the_only_one(full: Path) -> None:
    assert "llama-cli -hf acme/x:Q6_K\n" in text_of(full, "acme/x") and "hf.co/acme/x:Q6_K\n" in text_of(full, "acme/x")
    shutil.copy(full / "Tiny-Q6_K.gguf", full / "Other-Q6_K.gguf")
    assert "--hf-file Tiny-Q6_K.gguf" in text_of(full, "acme/x") and "hf.co/acme/x:Tiny-Q6_K.gguf" in text_of(full, "acme/x")
