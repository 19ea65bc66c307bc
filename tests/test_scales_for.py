"""AwqConfig(scales_for=...): the checkpoint and the GGUF file made of it are the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import awq_hf
from awq_hf import AwqConfig, AwqLinear
from awq_hf.affine import dequantize_weight
from awq_hf.exporters.gguf.repack import repack


def blocks(model: Any, kind: Type) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(the checkpoint's weight, the file's) of every quantized Linear."""
    weights = [module.to_quantized() for module in model.modules() if isinstance(module, AwqLinear)]
    return [(dequantize_weight(weight), torch.from_numpy(gguf.dequantize(repack(weight, kind), kind))) for weight in weights]


@pytest.mark.parametrize(
    ("kind", "options"), [("Q4_K", {"group_size": 128}), ("Q4_1", {"group_size": 32}), ("Q4_1", {"group_size": 64, "bits": 3})]
)
@pytest.mark.parametrize("rounding", ["descent", "nearest"])
def test_the_file_is_the_checkpoint(
    kind: str, options: dict[str, int], rounding: str, tiny_llama: Callable[..., Any], small_config: Callable[..., Any]
) -> None:
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    exact, plain = (
        awq_hf.quantize(tiny_llama(**sizes), small_config(**options, samples=4, rounding=rounding, scales_for=target))
        for target in (kind, None)
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in blocks(exact, Type[kind]))
    assert not all(torch.equal(ours, theirs) for ours, theirs in blocks(plain, Type[kind]))
    losses = [np.mean([layer.loss for layer in model.awq_report.layers]) for model in (exact, plain)]
    assert losses[0] < 1.15 * losses[1]


def test_refused_before_any_work(llama_dir: Path, small_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="scales_for='Q4_0' is not known; choose one of .'Q4_K', 'Q4_1'."):
        AwqConfig(scales_for="Q4_0")
    with pytest.raises(ValueError, match="scales_for='Q4_K' needs 4 bits with zero points, groups of 128 and rows of a multiple of 256"):
        awq_hf.quantize(llama_dir, small_config(scales_for="Q4_K"))
    with pytest.raises(ValueError, match="scales_for='Q4_1' needs 2 to 4 bits"):
        awq_hf.quantize(llama_dir, small_config(scales_for="Q4_1", bits=8))
