"""Tokens a second of whole models through generate, and their peak memory: the float model against the quantized one.

python -m benchmarks.decode                     a random Llama of 1B shape, in bfloat16, on the CPU
python -m benchmarks.decode --shape 8B --device cuda             on a GPU, a kernel launched at a time
python -m benchmarks.decode --shape 8B --device cuda --graphs    compiled, replaying CUDA graphs

The models are random and written to a temporary directory; each is loaded in a process of its own. The vocabulary has 8,000 tokens, tied,
so that embeddings, which stay in float, do not hide what happens to the rest. Memory is the peak above what Python and the libraries take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM

from awq_hf import AwqConfig, AwqLinear
from awq_hf.kernels import native
from awq_hf.matrices import is_matrix
from awq_hf.spec import QuantizedWeight, QuantSpec
from benchmarks import gpu
from benchmarks.common import publish, quiet
from benchmarks.memory import Sampler, resident

SHAPES: dict[str, dict[str, int]] = {  # of the decoder blocks of Llama-3.2-1B and Llama-3-8B, and a small one to try the script with
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    "small": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2),
}
SPEC = QuantSpec(4, 128)
VOCABULARY = 8_000
SETTLED = 8  # tokens after which every step is alike: generate makes a new cache each time, and CUDA graphs are recorded again for it


def write_float(directory: Path, shape: str, dtype: torch.dtype, device: str) -> None:
    config = LlamaConfig(**SHAPES[shape], vocab_size=VOCABULARY, tie_word_embeddings=True)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        LlamaForCausalLM(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)


def write_quantized(source: Path, directory: Path, device: str) -> None:
    """Random codes: what they are changes nothing about time and memory."""
    model = AutoModelForCausalLM.from_pretrained(source, device_map=device)
    for name, linear in list(model.model.named_modules()):
        if is_matrix(linear):
            n, k = linear.weight.shape
            q, zeros = (torch.randint(16, (n, columns), dtype=torch.uint8, device=device) for columns in (k, k // SPEC.group_size))
            scales = torch.full(zeros.shape, 0.1 / k**0.5, dtype=torch.float16, device=device)
            model.model.set_submodule(name, AwqLinear.from_quantized(QuantizedWeight(q, scales, zeros, SPEC)))
    config = AwqConfig(bits=SPEC.bits, group_size=SPEC.group_size, modules_to_not_convert=["lm_head"])
    config.describe([SPEC])
    model.config.quantization_config = config
    model.save_pretrained(directory)


def measure(directory: str, device: str, prompt: int, tokens: int, repeats: int, graphs: bool) -> dict[str, Any]:
    """In the child process: load, generate, and say how fast and with how much memory."""
    sampler, start = Sampler(), resident()
    sampler.start()
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=device)
    ids = torch.randint(3, VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    options: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))
    if graphs:  # generate compiles the steps after the prompt by itself, for a static cache
        options |= dict(cache_implementation="static", compile_config=CompileConfig(mode="reduce-overhead", fullgraph=True))
    seconds: list[float] = []
    for _ in range(repeats + 1):  # the first one warms up
        lengths = []
        # What comes before the first steady token is taken off. The longer one first: generate keeps its cache's length for the shorter
        # one, where another length would be compiled anew, with sizes that vary.
        for new in (SETTLED + tokens, SETTLED):
            began = time.perf_counter()
            model.generate(ids, min_new_tokens=new, max_new_tokens=new, **options)
            if device != "cpu":
                torch.cuda.synchronize(device)
            lengths.append(time.perf_counter() - began)
        seconds.append(lengths[0] - lengths[1])
    peak = torch.cuda.max_memory_allocated(device) if device != "cpu" else max(sampler.peaks.values()) - start
    return {"tokens_per_second": tokens / sorted(seconds[1:])[repeats // 2], "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--graphs", action="store_true", help="static cache, compiled, with CUDA graphs")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", metavar="DIRECTORY")
    options = parser.parse_args()
    quiet()
    if options.child:
        found = measure(options.child, options.device, options.prompt, options.tokens, options.repeats, options.graphs)
        print(json.dumps(found))
        return
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    if options.device != "cpu":
        gpu.require("benchmarks.decode --device cuda")
    if options.graphs and options.device == "cpu":
        parser.error("--graphs needs a GPU: --device cuda")
    with tempfile.TemporaryDirectory() as directory:
        models = {options.dtype: Path(directory) / "float", "awq-hf, 4 bits": Path(directory) / "awq"}
        source, quantized = models.values()
        write_float(source, options.shape, getattr(torch, options.dtype), options.device)
        write_quantized(source, quantized, options.device)
        if options.device != "cpu":
            torch.cuda.empty_cache()  # the GPU is the child processes' now
        for name, path in models.items():
            command = [sys.executable, "-m", "benchmarks.decode", "--child", str(path), *sys.argv[1:]]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(result.stderr)
            found = json.loads(result.stdout.splitlines()[-1])
            rows.append({"model": name, "tokens/s": found["tokens_per_second"], "peak MB": found["peak"] / 1e6})
    speed, memory = rows[0]["tokens/s"], rows[0]["peak MB"]
    for row in rows:
        row["speed, of the float model's"] = row["tokens/s"] / speed
        row["memory, of the float model's"] = row["peak MB"] / memory
        if options.device == "cpu":
            del row["tokens/s"]  # an absolute time of a processor that other work shares says nothing
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    device = f"cpu {instructions}" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    how, suffix = (", CUDA graphs", "_graphs") if options.graphs else ("", "")
    if options.device == "cpu" and native.missing() is None:
        how, suffix = ", C++ kernel", "_native"
    publish(
        f"decode_{device.replace(' ', '-')}_{options.shape}{suffix}", f"decoding with a random {options.shape} Llama on {device}{how}", rows
    )


if __name__ == "__main__":
    main()
