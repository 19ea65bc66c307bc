"""python -I reader.py PROGRAM FOLDER: loads checkpoints with a program that is not ours, in a process that never imports awq_hf.

For every FOLDER/*/ that has checkpoint/ and prompt.json (a text, or a list of token ids), writes the float32 logits
[tokens, vocabulary] to PROGRAM.npy beside them, or to PROGRAM.refused why the program did not load the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def mlx(checkpoint: Path, prompt: str | list[int]) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import load_model, load_tokenizer

    mx.set_default_device(mx.cpu)
    model, _ = load_model(checkpoint)
    model.set_dtype(mx.float32)
    return model(mx.array([load_tokenizer(checkpoint).encode(prompt) if isinstance(prompt, str) else prompt]))[0]


def gptqmodel(checkpoint: Path, prompt: str | list[int]) -> Any:
    """transformers' own AWQ, whose Linears are gptqmodel's. torch_awq: its backend that compiles nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig

    config = AwqConfig(backend="torch_awq")  # the rest comes from the checkpoint
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.float32)
    assert any(type(module).__module__.startswith("gptqmodel.") for module in model.modules())
    ids = AutoTokenizer.from_pretrained(checkpoint).encode(prompt) if isinstance(prompt, str) else prompt
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


PROGRAMS = {"mlx": mlx, "gptqmodel": gptqmodel}


def main(program: str, folder: Path) -> None:
    for prompt in sorted(folder.glob("*/prompt.json")):
        try:
            logits = np.array(PROGRAMS[program](prompt.parent / "checkpoint", json.loads(prompt.read_text())))
        except ValueError as error:  # anything else ends the process
            (prompt.parent / f"{program}.refused").write_text(str(error))
        else:
            assert logits.dtype == np.float32
            np.save(prompt.parent / f"{program}.npy", logits)
    assert "awq_hf" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
