"""Mixtures of experts whose blocks were searched for, in a real llama.cpp; their importance matrix, and types within a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from awq_hf.exporters.gguf.imatrix import read_imatrix
from awq_hf.exporters.gguf.writer import export
from awq_hf.to_gguf import to_gguf

SIZES = dict(
    hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    num_experts_per_tok=2, pad_token_id=3, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
QUIET: dict[str, Any] = dict(progress=False, metadata=dict(name="Tiny"))


@pytest.fixture(scope="module")
def build(random_model: Callable[..., Any], byte_level: Callable[..., Any]) -> Callable[..., Any]:
    """build(name): a random mixture of four experts, and its tokenizer."""
    from transformers import MixtralConfig, Qwen3MoeConfig

    tokenizer = byte_level()
    sizes = dict(SIZES, vocab_size=len(tokenizer) + 3)
    configs = {
        "mixtral": lambda: MixtralConfig(**sizes, num_local_experts=4, sliding_window=None),
        "qwen3": lambda: Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=256, head_dim=64, norm_topk_prob=True),
    }
    return lambda name: (random_model(configs[name]()), tokenizer)


def options(small_config: Any, tokenizer: Any, **more: Any) -> dict[str, Any]:
    tokens = [*torch.randint(3, 90, (32, 48), generator=torch.Generator().manual_seed(0))]
    return dict(config=small_config(calibration=tokens, samples=32, **more), tokenizer=tokenizer, **QUIET)


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_llama_cpp_computes_what_was_searched_for(
    name: str, build: Any, small_config: Any, runtime: Any, divergence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that the search leaves holds the blocks' weights, as tests/test_encoded_experts.py verifies."""
    model, tokenizer = build(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[Any] = []

    def keeping(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(checkpoint.model)
        return export(checkpoint, *args, **kwargs)

    monkeypatch.setattr("awq_hf.to_gguf.export", keeping)
    matrix = tmp_path / "imatrix.gguf"
    found = to_gguf(model, tmp_path / "model.gguf", type="Q4_K", save_imatrix=matrix, **options(small_config, tokenizer))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    prompts = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    assert divergence(seen[0], runtime(found.files[0]), prompts) < 3e-3
    assert found.report is not None
    lines = {layer.name.rpartition(".")[2]: layer for layer in found.report.layers}
    assert {"lm_head", "gate_proj", "up_proj", "down_proj"} <= lines.keys() and all(
        layer.loss <= layer.loss_plain for layer in lines.values()
    )
    entries = read_imatrix(matrix).entries
    counts = entries["blk.0.ffn_gate_exps.weight"].counts
    assert counts.sum() == 2 * 28 * 48  # experts of a token, windows that are not held out, and their tokens
    for part in PARTS:
        entry = entries[f"blk.0.{part}.weight"]
        assert entry.mean.shape == (4, 256) and np.array_equal(entry.counts, counts)
    again = to_gguf(model, tmp_path / "again.gguf", type="Q4_K", imatrix=matrix, tokenizer=tokenizer, **QUIET)
    stored = [{tensor.name: tensor for tensor in GGUFReader(result.files[0]).tensors} for result in (found, again)]
    for part in PARTS:
        of_search, of_matrix = (each[f"blk.0.{part}.weight"].data for each in stored)
        assert of_search.shape == of_matrix.shape and not np.array_equal(of_search, of_matrix)


def test_experts_of_a_directory_are_let_go_block_by_block(build: Any, small_config: Any, tmp_path: Path) -> None:
    model, tokenizer = build("qwen3")
    model.save_pretrained(tmp_path / "float")
    both = [
        to_gguf(given, tmp_path / f"{name}.gguf", type="Q4_0", **options(small_config, tokenizer, rounding="nearest"))
        for name, given in (("files", tmp_path / "float"), ("memory", model))
    ]
    one, other = ({tensor.name: tensor.data for tensor in GGUFReader(found.files[0]).tensors} for found in both)
    assert one.keys() == other.keys() and all(np.array_equal(data, other[name]) for name, data in one.items())


def test_types_of_experts_are_chosen_within_a_budget(build: Any, small_config: Any, tmp_path: Path) -> None:
    model, tokenizer = build("qwen3")
    quick = options(small_config, tokenizer, scale=False, correction=False, rounding="nearest", stream="float")
    found = to_gguf(model, tmp_path / "model.gguf", target_bpw=5.0, **quick)
    stored = {tensor.name: tensor for tensor in GGUFReader(found.files[0]).tensors}
    bits = 8 * sum(t.n_bytes for t in stored.values()) / sum(int(np.prod(t.shape)) for t in stored.values())
    assert 4.5 < bits <= 5.0
    chosen = {part: found.types[f"blk.0.{part}.weight"] for part in PARTS}
    plain = to_gguf(model, tmp_path / "plain.gguf", type="Q4_K_M", search=False, tokenizer=tokenizer, **QUIET).types
    assert chosen != {part: plain[f"blk.0.{part}.weight"] for part in PARTS} and Type.F16 not in chosen.values()
