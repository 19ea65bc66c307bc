"""Peak memory of exporting an AWQ checkpoint: what is the process's own, and what are pages of the file that it reads (Linux).

python -m benchmarks.export_memory                       a random Llama: 4 blocks of 8B shape, 32,000 tokens; 1 GB
python -m benchmarks.export_memory --blocks 32           all of it

Every export runs in a process of its own, whose memory is sampled; what Python and the libraries take before it is subtracted. Pages of a
file are the page cache's: the system takes them back when it needs memory, and yet they count as the process's (RSS).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from awq_hf import demo
from awq_hf.headers import INDEX, WEIGHTS
from benchmarks.common import publish, quiet

HIDDEN, INNER, KEYS, VOCABULARY, GROUP = 4096, 14_336, 1024, 32_000, 128
LINEARS = {  # of a block: out, in
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SHARD = "500MB"  # of what is written
EXPORTS: dict[str, dict[str, Any]] = {
    "gguf": {},
    "awq": dict(max_shard_size=SHARD),
    "compressed-tensors": dict(max_shard_size=SHARD),
    "gptq": dict(max_shard_size=SHARD),
    "dense": dict(max_shard_size=SHARD),
}


def block(number: int) -> dict[str, Tensor]:
    """Random codes: what they are changes nothing."""
    prefix, tensors = f"model.layers.{number}", {}
    for name, (n, k) in LINEARS.items():
        words = lambda rows, n=n: torch.randint(-(2**31), 2**31, (rows, n // 8), dtype=torch.int64).to(torch.int32)  # noqa: E731
        tensors[f"{prefix}.{name}.qweight"], tensors[f"{prefix}.{name}.qzeros"] = words(k), words(k // GROUP)
        tensors[f"{prefix}.{name}.scales"] = torch.rand(k // GROUP, n).mul(0.01).half()
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
    return tensors


def write(directory: Path, blocks: int, shards: bool) -> int:
    """A checkpoint in one file, or in one for each block and one for the rest; its bytes of weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, dtype="float16", architectures=["LlamaForCausalLM"],
    ).to_dict()  # fmt: skip
    config["quantization_config"] = dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for path in demo.MODEL.glob("tokenizer*"):  # its 1,024 tokens and no names for the others
        shutil.copy(path, directory)
    ends = {name: torch.randn(VOCABULARY, HIDDEN).mul(0.02).half() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ends["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
    parts = [ends, *map(block, range(blocks))]
    if shards:
        files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        files, parts = [WEIGHTS], [{name: tensor for part in parts for name, tensor in part.items()}]
    for file, part in zip(files, parts, strict=True):
        save_file(part, directory / file, metadata={"format": "pt"})
    return sum(tensor.nbytes for part in parts for tensor in part.values())


class Sampler(threading.Thread):
    """Peaks of a process's own memory, of pages of files, and of their sum, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = (0, 0, 0)

    def look(self) -> tuple[int, int, int]:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own, file = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return own, file, own + file

    def run(self) -> None:
        while True:
            own, file, both = (max(pair) for pair in zip(self.peaks, self.look(), strict=True))
            self.peaks = own, file, both
            time.sleep(0.002)


def measure(source: str, target: str, out: str) -> None:
    """In the child process: export, and print the peaks above what there was before as JSON."""
    import awq_hf.to_gguf  # what is imported on the way belongs to the start

    quiet()
    sampler = Sampler()
    start = sampler.look()
    sampler.start()
    options = EXPORTS[target]
    if target == "gguf":
        options = options | dict(progress=False)
    awq_hf.export(source, target, out, **options)
    print(json.dumps([peak - before for peak, before in zip(sampler.peaks, start, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--targets", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "TARGET", "OUT"))
    options = parser.parse_args()
    if options.child:
        measure(*options.child)
        return
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for shards in (False, True):
            source, out = Path(directory, "awq"), Path(directory, "out")
            size = write(source, options.blocks, shards)
            for target in options.targets:
                path = out / "model.gguf" if target == "gguf" else out
                command = [sys.executable, "-m", "benchmarks.export_memory", "--child", str(source), target, str(path)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                own, file, both = (value / 1e6 for value in json.loads(done.stdout.splitlines()[-1]))
                written = sum(path.stat().st_size for path in out.iterdir()) / 1e6
                files = f"{options.blocks + 1} files" if shards else "1 file"
                row = {"target": target, "read from": files, "MB read": size / 1e6, "MB written": written}
                rows.append({**row, "own": own, "pages of files": file, "both": both})
                shutil.rmtree(out)
            shutil.rmtree(source)
    largest = 2 * VOCABULARY * HIDDEN / 1e6
    title = f"peak MB of exporting {options.blocks} blocks of 8B shape; largest tensor {largest:.0f} MB, shards written {SHARD}"
    publish("export_memory", title, rows)


if __name__ == "__main__":
    main()
