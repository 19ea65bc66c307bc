"""Mixtures of experts, small and random, that several tests use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from awq_hf import AwqConfig

SIZES = dict(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
QWEN = dict(SIZES, num_experts=4, moe_intermediate_size=32, intermediate_size=96)
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=4, sliding_window=None),
    "qwen3": lambda: transformers.Qwen3MoeConfig(**QWEN, head_dim=16, mlp_only_layers=[1]),
    "qwen2": lambda: transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=64),
    "olmoe": lambda: transformers.OlmoeConfig(**{**QWEN, "intermediate_size": 32}),
}
PLAIN: dict[str, Any] = dict(rounding="nearest", scale=False, clip=False, correction=False)


def enough_text() -> list[Tensor]:
    """More calibration text than the usual fixture: every expert gets a share of it."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 96, (48,), generator=generator) for _ in range(48)]


def config_for(text: list[Tensor], **options: Any) -> AwqConfig:
    return AwqConfig(**{"group_size": 32, "calibration": text, "samples": 48, "seq_len": 48, **options})
