"""Which class of transformers' or of a model's own a checkpoint is loaded with, and whether the latter's code may run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from awq_hf.wording import option


def class_of(architectures: Sequence[str] | None) -> Any:
    """The class that a config's `architectures` names, so that a head or a vision tower is not lost; else AutoModelForCausalLM."""
    for name in architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


class UntrustedCode(ValueError):
    """A model whose code comes with it, which nobody said may run."""


def check_code(content: Mapping[str, Any], name: str, trusted: bool) -> None:
    """Raise UntrustedCode for the config.json of a model that transformers does not know, but has code with it."""
    if content.get("auto_map") and not trusted and content.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UntrustedCode(
            f"{name} is a model of the type {content.get('model_type')!r}, whose code comes with it; read it, and if you trust it, say so: "
            f"{option('trust_remote_code', True)}"
        )


def read_config(name: str | os.PathLike[str], trusted: bool, **location: Any) -> Any:
    """AutoConfig.from_pretrained, which asks whether code may run; here it runs if `trusted`, and else that is an UntrustedCode."""
    content, _ = transformers.PreTrainedConfig.get_config_dict(name, **location)
    check_code(content, os.fspath(name), trusted)
    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trusted, **location)


def positions_of(config: Any) -> int | None:
    """How many tokens a model of this config takes at once, None where it has no limit, or does not say: XLNet's says -1."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def class_for(config: Any, trusted: bool) -> Any:
    """The class to load a model with: its own code's if that may run, else `class_of`. config: transformers', or config.json's content."""
    content = config if isinstance(config, dict) else vars(config)
    own = trusted and "AutoModelForCausalLM" in (content.get("auto_map") or {})
    return transformers.AutoModelForCausalLM if own else class_of(content.get("architectures"))


def empty_model(config: Any, dtype: Any, trusted: bool = False) -> Any:
    """A model of the config's own class on the meta device. Raises ValueError when transformers cannot build it."""
    kind = class_for(config, trusted)
    with torch.device("meta"):
        if kind is transformers.AutoModelForCausalLM:
            return kind.from_config(config, dtype=dtype, trust_remote_code=trusted)
        return kind._from_config(config, dtype=dtype)


def loaded_whole(kind: Any, place: Any, **options: Any) -> Any:
    """kind.from_pretrained, which makes up weights that the files lack; here that is a ValueError."""
    model, info = kind.from_pretrained(place, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"])):
        raise ValueError(f"{missing[0]} is not in the file, or of another shape")
    return model
