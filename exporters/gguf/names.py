"""Tensors: where each of the checkpoint's goes in the file, and what is done to it. Metadata of the model: its shape and its origin."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import gguf
from gguf import GGUFWriter, Metadata
from transformers import PreTrainedConfig

from awq_hf.base_model import identify, quantized_from
from awq_hf.exporters.gguf.architectures import KEYS, Architecture, head_dim
from awq_hf.spec import QuantSpec

if TYPE_CHECKING:
    from awq_hf.exporters.checkpoint import Checkpoint

logger = logging.getLogger("awq_hf")

_EXPERT = re.compile(r"(?P<block>.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names
_COMPUTED = (".rotary_emb.inv_freq",)  # buffers that old checkpoints carry: llama.cpp computes them
_LANGUAGE = re.compile(r"(?:model\.language_model|language_model\.model)(?=\.)")  # the text model inside of one that sees images
_VISION = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint goes: all of `target`, or its slice `expert`. heads: permute the rows of so many rotary heads.
    offset: what is added to it."""

    target: str
    expert: int | None = None
    heads: int | None = None
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    places: dict[str, Place]  # by name in the checkpoint
    shapes: dict[str, tuple[int, ...]]  # by name in the file, in its order


def make_plan(tensors: Iterable[tuple[str, tuple[int, ...]]], config: PreTrainedConfig, architecture: Architecture) -> Plan:
    """tensors: names and shapes in the checkpoint. Raises ValueError for one that has no place in the file, and for one that is missing."""
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    places: dict[str, Place] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = defaultdict(int)
    for name, shape in tensors:
        plain = _LANGUAGE.sub("model", name.replace("language_model.lm_head.", "lm_head."), count=1)
        if name.endswith(_COMPUTED) or _VISION.match(name) or (plain == "lm_head.weight" and config.tie_word_embeddings):
            continue
        expert = _EXPERT.fullmatch(plain)
        wanted = f"{expert['block']}.mlp.experts.{_PARTS.get(expert['part'], expert['part'])}.weight" if expert else plain
        target = names.get_name(wanted, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"{name} has no place in a GGUF file of {architecture.arch.name}: llama.cpp knows no such tensor there")
        places[name] = _place(target, None if expert is None else int(expert["expert"]), config, architecture)
        experts[target] += expert is not None
        shapes[target] = (experts[target], *shape) if expert else tuple(shape)
    _check_complete(shapes, places, config)
    return Plan(places, shapes)


def _place(target: str, expert: int | None, config: PreTrainedConfig, architecture: Architecture) -> Place:
    part = target.split(".")[-2]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part) if architecture.interleaved else None
    return Place(target, expert, heads, architecture.norm_offset if part.endswith("norm") else 0)


def _check_complete(shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], config: PreTrainedConfig) -> None:
    """Raises ValueError for a checkpoint that lacks an embedding, a head, an expert, or a tensor that other blocks have."""
    needed = ["token_embd.weight", "output_norm.weight"] + ["output.weight"] * (not config.tie_word_embeddings)
    parts = {name.split(".", 2)[2] for name in shapes if name.startswith("blk.")}
    needed += [f"blk.{block}.{part}" for block in range(config.num_hidden_layers) for part in sorted(parts)]
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"the checkpoint has no tensor for {missing[0]}: it is not complete, or its config is another model's")
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    found = {(place.target, place.expert) for place in places.values()}
    for name, shape in shapes.items():
        if len(shape) == 3 and (absent := [n for n in range(count or 0) if (name, n) not in found] or shape[0] != count):
            raise ValueError(f"the config says {count} experts, but the checkpoint has {shape[0]} for {name} (missing: {absent})")


def add_shape(writer: GGUFWriter, config: PreTrainedConfig, architecture: Architecture) -> None:
    """What llama.cpp has to know of the model's shape. Raises ValueError for what its graph cannot compute."""
    for method, attribute in {**KEYS, **architecture.keys}.items():
        if (value := getattr(config, attribute)) is not None:
            getattr(writer, method)(value)
    width = head_dim(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_add_window(writer, config, architecture))
    scalar = getattr(config, "query_pre_attn_scalar", None)
    wide = config.num_hidden_layers in architecture.width_scaled_at
    if scalar is not None and scalar != (usual := config.hidden_size // config.num_attention_heads if wide else width):
        raise ValueError(f"query_pre_attn_scalar is {scalar}, but llama.cpp computes {architecture.arch.name} of this depth with {usual}")


def _add_window(writer: GGUFWriter, config: PreTrainedConfig, architecture: Architecture) -> int:
    """Write the sliding window; return the length of context to write.

    A graph without windows attends to everything, which is the same up to the window's length: that becomes the length of context.
    """
    context: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if architecture.window:
        kinds = list(config.layer_types)
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        if kinds != ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(kinds))]:
            raise ValueError(f"layer_types is {kinds}, but llama.cpp computes one full layer at every n-th place only")
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(period)
    elif architecture.arch is gguf.MODEL_ARCH.PHI3:
        writer.add_sliding_window(window or 0)  # required there; 0: none
    if window is not None and window < context and not architecture.window:
        logger.warning("llama.cpp has no sliding window for %s: the file says context_length %d", architecture.arch.name, window)
        return window
    return context


def origin(checkpoint: Checkpoint, parameters: int, given: Mapping[str, str]) -> Metadata:
    """general.* of the file, from model card, config and directory; `given` goes first. Raises ValueError for unknown fields."""
    known = {field.name for field in fields(Metadata)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"metadata has no field {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    metadata = Metadata.load(model_path=checkpoint.directory, total_params=parameters)
    for field, value in {"name": model_name(checkpoint), **given}.items():
        setattr(metadata, field, value)
    return metadata


def file_name(checkpoint: Checkpoint, encoding: str) -> str:
    """MODEL-TYPE.gguf, which the Hub, llama.cpp and Ollama find by its type; of a quantized checkpoint MODEL-AWQ-TYPE.gguf, to be told from
    a file of that type that was made from the float weights."""
    name = model_name(checkpoint)
    quantized = any(isinstance(entry.kind, QuantSpec) for entry in checkpoint.names())
    mark = "-AWQ" if quantized and "awq" not in re.split(r"[-_.]", name.lower()) else ""
    return f"{name}{mark}-{encoding}.gguf"


def model_name(checkpoint: Checkpoint) -> str:
    """What the model is called, without its owner: the original, where a report names it; else the checkpoint. The language model of one
    that sees images is -text."""
    config, made = checkpoint.config, getattr(checkpoint.model, "awq_report", None)  # of a model that was quantized in this process
    original = quantized_from(checkpoint.directory) if made is None else made.base_model
    name = str(original.get("name") or identify(checkpoint.label)["name"]).rpartition("/")[2]
    return name if config.get_text_config() is config else f"{name}-text"
