"""Rotary embeddings: metadata and tensors that make llama.cpp compute the frequencies which transformers computes.

llama.cpp divides the frequency of each channel pair by a factor from a tensor, where its graph reads one; linear and YaRN scaling it
computes itself. Factors are quotients of transformers' own frequencies, so no formula is repeated here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from awq_hf.exporters.gguf.architectures import Architecture, head_dim


def parameters_of(config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """rope_parameters of the layers that see everything, and of those with a sliding window; the same where they do not differ."""
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        return parameters["full_attention"], parameters["sliding_attention"]
    return parameters, parameters


def rotary_dim(config: PreTrainedConfig) -> int:
    """Channels of a head that are rotated."""
    return int(head_dim(config) * parameters_of(config)[0].get("partial_rotary_factor", 1.0))


def add_rope(writer: GGUFWriter, config: PreTrainedConfig, architecture: Architecture) -> dict[str, Tensor]:
    """Write the metadata; return the tensors, float32 [rotary_dim / 2], under their names in the file. Raises ValueError."""
    full, sliding = parameters_of(config)
    kind = full.get("rope_type", "default")
    if kind not in architecture.rope_types:
        raise ValueError(
            f"rope_type is {kind!r}, but llama.cpp computes {architecture.arch.name} with {', '.join(sorted(architecture.rope_types))} only"
        )
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_rope_freq_base(full["rope_theta"])
    if sliding is not full:
        if sliding.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type of the layers with a sliding window is {sliding['rope_type']!r}, but llama.cpp scales none there")
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(full["factor"])
    if kind == "yarn":
        _add_yarn(writer, full, _frequencies(config, kind)[1])
    if kind == "llama3":
        return {"rope_freqs.weight": _plain(config) / _frequencies(config, kind)[0]}
    if kind == "longrope":
        original = full["original_max_position_embeddings"]
        short, attention = _frequencies(config, kind, original)
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention)
        longer = _frequencies(config, kind, original + 1)[0]
        return {"rope_factors_long.weight": _plain(config) / longer, "rope_factors_short.weight": _plain(config) / short}
    return {}


def _add_yarn(writer: GGUFWriter, parameters: dict[str, Any], attention: float) -> None:
    """attention: what transformers multiplies cos and sin by. llama.cpp multiplies by 1 + 0.1 log(factor) and by the number written."""
    if not parameters.get("truncate", True):
        raise ValueError("rope_parameters says truncate false, but llama.cpp computes YaRN with whole channel numbers only")
    writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    usual = 1 + 0.1 * math.log(parameters["factor"])
    if not math.isclose(attention, usual, rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(attention / usual)
    for name in ("beta_fast", "beta_slow"):
        if parameters.get(name):
            writer.add_float32(f"{writer.arch}.rope.scaling.yarn_{name}", parameters[name])  # nor for these


def _frequencies(config: PreTrainedConfig, kind: str, seq_len: int | None = None) -> tuple[Tensor, float]:
    """transformers' frequencies, float32 [rotary_dim / 2], and the factor on cos and sin."""
    layers = {"layer_type": "full_attention"} if "full_attention" in config.rope_parameters else {}
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len, **layers)
    return frequencies, float(attention)


def _plain(config: PreTrainedConfig) -> Tensor:
    """Frequencies without scaling."""
    n = rotary_dim(config)
    return 1.0 / parameters_of(config)[0]["rope_theta"] ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
