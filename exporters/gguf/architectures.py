"""The architectures that are exported, as data: what sets each apart from Llama. To add one, add its line.

Tensor names come from gguf-py's own map. What llama.cpp's graph of an architecture computes was read from its sources (src/models);
tests/exporters/gguf compare every line here with transformers, through a real llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH
from transformers import PreTrainedConfig

LLAMA3_AND_LONG = frozenset({"default", "linear", "yarn", "llama3", "longrope"})  # graphs that take a factor for every frequency
LONG = frozenset({"default", "linear", "yarn", "longrope"})
PLAIN = frozenset({"default", "linear", "yarn"})


@dataclass(frozen=True)
class Architecture:
    """arch: gguf-py's name. rope_types: those the graph can compute. interleaved: it pairs neighbouring channels in rotary embeddings where
    transformers pairs halves, so rows of q and k are permuted. norm_offset: what the module adds to a norm's weight. window: it computes
    sliding windows, one full layer after every period - 1. width_scaled_at: the depths at which it scales attention by
    hidden_size / heads instead of head_dim. keys: further metadata, method of GGUFWriter -> attribute of the config. requires: attributes
    of the config that it takes for granted.
    """

    arch: MODEL_ARCH
    activation: str = "silu"
    rope_types: frozenset[str] = PLAIN
    interleaved: bool = False
    norm_offset: int = 0
    window: bool = False
    width_scaled_at: frozenset[int] = frozenset()
    keys: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)


# Method of GGUFWriter -> attribute of the config, for every architecture.
KEYS = {
    "add_block_count": "num_hidden_layers",
    "add_embedding_length": "hidden_size",
    "add_feed_forward_length": "intermediate_size",
    "add_head_count": "num_attention_heads",
    "add_head_count_kv": "num_key_value_heads",
    "add_layer_norm_rms_eps": "rms_norm_eps",
}
_EXPERTS_USED = {"add_expert_used_count": "num_experts_per_tok"}
_MIXTRAL = {"add_expert_count": "num_local_experts", **_EXPERTS_USED}
_QWEN_EXPERTS = {"add_expert_count": "num_experts", "add_expert_feed_forward_length": "moe_intermediate_size", **_EXPERTS_USED}
_GEMMA_CAPS = {"add_attn_logit_softcapping": "attn_logit_softcapping", "add_final_logit_softcapping": "final_logit_softcapping"}
_GEMMA: dict[str, Any] = dict(activation="gelu_pytorch_tanh", norm_offset=1, window=True)

ARCHITECTURES = {  # by model_type
    "llama": Architecture(MODEL_ARCH.LLAMA, rope_types=LLAMA3_AND_LONG, interleaved=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, rope_types=LLAMA3_AND_LONG, interleaved=True),
    "mixtral": Architecture(MODEL_ARCH.LLAMA, rope_types=LLAMA3_AND_LONG, interleaved=True, keys=_MIXTRAL),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, requires={"attention_bias": False}),
    "qwen3_moe": Architecture(
        MODEL_ARCH.QWEN3MOE,
        keys=_QWEN_EXPERTS,
        requires={"attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "phi3": Architecture(MODEL_ARCH.PHI3, rope_types=LONG),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2, **_GEMMA, keys=_GEMMA_CAPS, width_scaled_at=frozenset({46}), requires={"tie_word_embeddings": True}
    ),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3,
        **_GEMMA,
        keys={"add_final_logit_softcapping": "final_logit_softcapping"},
        width_scaled_at=frozenset({62}),
        requires={"tie_word_embeddings": True, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
}


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """The line of `config`'s model_type. Raises ValueError for one that has none, and for a config its graph does not compute."""
    name = config.model_type
    if name not in ARCHITECTURES:
        raise ValueError(
            f"model_type {name or 'of unknown name'!r} is not exported to GGUF; those that are: {', '.join(ARCHITECTURES)}. "
            "To add one that llama.cpp runs, add its line to exporters/gguf/architectures.py"
        )
    found = ARCHITECTURES[name]
    for attribute, value in found.requires.items():
        if (actual := getattr(config, attribute, value)) != value:
            raise ValueError(f"{attribute} is {actual!r}, but llama.cpp computes {found.arch.name} with {value!r} only")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        raise ValueError(f"the activation is {activation}, but llama.cpp computes {found.arch.name} with {found.activation} only")
    return found


def head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
