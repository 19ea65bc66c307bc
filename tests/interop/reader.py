"""python -I reader.py PROGRAM FOLDER: loads checkpoints with a program that is not ours, in a process that never imports awq_hf.

For every FOLDER/*/ that has checkpoint/ and prompt.json (a text, or a list of token ids), writes the float32 logits
[tokens, vocabulary] to PROGRAM.npy beside them, or to PROGRAM.refused why the program did not load the checkpoint.
"""

from __future__ import annotations

import json
import os
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


def transformers(checkpoint: Path, prompt: str | list[int], **options: Any) -> Any:
    """The class that the checkpoint names, with what transformers has for its quantization."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(checkpoint, dtype=torch.float32, **options)
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


def compressed_tensors(checkpoint: Path, prompt: str | list[int]) -> Any:
    """transformers with compressed-tensors. Release 5.23 reads zero points only where it dequantizes while loading."""
    from transformers import CompressedTensorsConfig

    groups = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["config_groups"].values()
    if all(group["weights"]["symmetric"] for group in groups):
        return transformers(checkpoint, prompt)
    return transformers(checkpoint, prompt, quantization_config=CompressedTensorsConfig(dequantize=True))


def decompressor(checkpoint: Path, prompt: str | list[int]) -> Any:
    """Not logits: the weights that the compressed-tensors package makes of the packed modules, one after the other by name.

    It also finds out which Linears its matching takes for quantized, which have to be those that are packed.
    """
    import torch
    import transformers
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets
    from safetensors.torch import load_file

    stored = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    packed = sorted(name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed"))
    config = QuantizationConfig.model_validate(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(checkpoint))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    single = {name: torch.nn.Linear(1, 1) for name in packed if ".experts." in name}  # which other programs have one by one
    linears |= single
    assert packed == sorted(name for name, module in linears.items() if is_match(name, module, schemes, config.ignore))
    weights = []
    for name in packed:
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.weight_")}
        parts["weight_scale"] = parts["weight_scale"].float()  # the exact values
        scheme = schemes[match_targets(name, linears[name], schemes)[0]]
        decompress = BaseCompressor.get_value_from_registry(scheme.format).decompress
        weights.append(decompress(parts, scheme)["weight"].flatten())
    return torch.cat(weights)


def gptq(checkpoint: Path, prompt: str | list[int]) -> Any:
    """gptqmodel itself, which wants a tokenizer beside the model."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(checkpoint), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    assert any(type(module).__module__.startswith("gptqmodel.") for module in model.modules())
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0].float()


def vllm(checkpoint: Path, prompt: str | list[int]) -> Any:
    """vLLM, in this process and without compiling, in the checkpoint's dtype: in float32 it does not multiply 4 bits."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    model = LLM(str(checkpoint), enforce_eager=True, max_logprobs=-1, logprobs_mode="raw_logits")
    prompt = model.get_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
    everything = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1, detokenize=False)
    (found,) = model.generate([{"prompt_token_ids": prompt}], everything, use_tqdm=False)
    rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]  # each of them for the token after it
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows], dtype=np.float32)


PROGRAMS = {
    "mlx": mlx,
    "gptqmodel": gptqmodel,
    "transformers": transformers,
    "compressed_tensors": compressed_tensors,
    "decompressor": decompressor,
    "gptq": gptq,
    "vllm": vllm,
}


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
