"""config.json as programs read it that know transformers 4: with rope_theta and rope_scaling beside rope_parameters.

transformers 5 writes `rope_parameters` only. Readers that look for the older keys (mlx-lm's Llama and Qwen2, older vLLM) find none and take
a default base without a word: logits are then off by more than half their size. transformers ignores the older keys when both are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def with_older_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json's content with the older keys added, in the configs inside it (text_config) too."""
    result = {key: with_older_rope_keys(value) if isinstance(value, dict) else value for key, value in config.items()}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:  # not one for each kind of layer
        result.setdefault("rope_theta", parameters["rope_theta"])
        if parameters.get("rope_type", "default") != "default":
            result.setdefault("rope_scaling", {key: value for key, value in parameters.items() if key != "rope_theta"})
    return result


def add_older_rope_keys(directory: str | Path) -> None:
    """Rewrite config.json in `directory`, whole or not at all."""
    path = Path(directory) / "config.json"
    partial = path.with_name(".config.json.partial")
    config = with_older_rope_keys(json.loads(path.read_text(encoding="utf-8")))
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
