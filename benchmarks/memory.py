"""Peak memory of quantizing inside from_pretrained, and what it consists of (Linux, CPU).

python -m benchmarks.memory                     a random Llama of 1B shape, 4 of its 16 blocks, 32 x 512 tokens
python -m benchmarks.memory --blocks 16         all of it
python -m benchmarks.memory --weights           many small blocks, rounded plainly, so that weights are what there is: of a model that was
                                                loaded whole, and from files; for GGUF; measuring

The model is written to a temporary directory first and loaded in a process of its own, whose memory is sampled. "Above Python" is the
peak of a phase less what Python and the libraries take.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from awq_hf import demo
from benchmarks.common import publish, quiet

SHAPE = dict(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8)
MANY = dict(vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=8)  # blocks, 24
SEQ_LEN = 512


def resident() -> int:
    """Bytes of this process in memory: its own, and files that it maps (a checkpoint that is not copied)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) * 1024


class Sampler(threading.Thread):
    """Peak memory of every phase that `phase` is set to."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "loading, and between the phases"
        self.peaks: dict[str, int] = {}

    def run(self) -> None:
        while True:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), resident())
            time.sleep(0.005)


def measure(directory: str, windows: int, step: str) -> None:
    """In the child process: take one of STEPS, and print what was seen as JSON."""
    from contextlib import contextmanager

    from awq_hf.report import Report

    quiet()
    sampler, timed = Sampler(), Report.timed

    @contextmanager
    def sampled(report: Report, phase: str) -> Any:
        with timed(report, phase):
            before, sampler.phase = sampler.phase, phase
            try:
                yield
            finally:
                sampler.phase = before

    setattr(Report, "timed", sampled)  # noqa: B010
    start = resident()
    sampler.start()
    kept = STEPS[step](directory, windows)
    found = {"start": start, "end": resident(), "peaks": sampler.peaks}
    print(json.dumps(found))
    if hasattr(kept, "save_pretrained"):
        kept.save_pretrained(f"{directory}/{OUT}")


def options_of(windows: int) -> dict[str, Any]:
    tokens = [torch.randint(MANY["vocab_size"], (SEQ_LEN,), generator=torch.Generator().manual_seed(i)) for i in range(windows)]
    return dict(calibration=tokens, samples=windows, seq_len=SEQ_LEN)


def quantize(directory: str, windows: int, make: Any = None) -> Any:
    from awq_hf import AwqConfig

    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=(make or AwqConfig)(**options_of(windows)))


def round_plainly(directory: str, windows: int) -> Any:
    from awq_hf import AwqConfig

    return quantize(directory, windows, AwqConfig.plain_rounding)


def round_loaded(directory: str, windows: int) -> Any:
    import awq_hf

    return awq_hf.quantize(AutoModelForCausalLM.from_pretrained(directory), awq_hf.AwqConfig.plain_rounding(**options_of(windows)))


def search_for_gguf(directory: str, windows: int, **wanted: Any) -> None:
    from awq_hf import AwqConfig
    from awq_hf.to_gguf import to_gguf

    config = AwqConfig(**options_of(windows), scale=False, correction=False, rounding="nearest")
    Path(directory, GGUF).mkdir(exist_ok=True)  # apart from the float model, as `awq-hf export gguf` has it
    to_gguf(directory, f"{directory}/{GGUF}/model.gguf", config=config, progress=False, overwrite=True, **wanted)


def compare(place: str, directory: str, _windows: int) -> None:
    from awq_hf.measure import measure

    measure(f"{directory}/{place}", directory, max_tokens=4 * SEQ_LEN, batch_size=1)


OUT, GGUF = "awq", "gguf"
STEPS: dict[str, Callable[[str, int], Any]] = {
    "the search": quantize,
    "plain rounding, loaded whole before": round_loaded,
    "plain rounding, from files": round_plainly,
    "for GGUF, types chosen for 4.5 bits a weight, from files": partial(search_for_gguf, target_bpw=4.5),
    "for GGUF (Q4_0), from files": partial(search_for_gguf, type="Q4_0"),  # after the other one: this file is measured
    "measuring a checkpoint, a window at a time": partial(compare, OUT),
    "measuring a GGUF file, a window at a time": partial(compare, GGUF),
}


def terms(config: LlamaConfig, windows: int) -> dict[str, int]:
    """The largest parts of one block's working set, in bytes, computed from shapes: what the measured peak should be made of."""
    hidden, inner, tokens = config.hidden_size, config.intermediate_size, windows * SEQ_LEN
    heads = hidden + 2 * config.num_key_value_heads * (hidden // config.num_attention_heads) + hidden
    weights = hidden * heads + 3 * hidden * inner
    return {
        "one block's weights (bfloat16)": 2 * weights,
        "its float32 copy for finding folds": 4 * weights,
        "float inputs of its layers (bfloat16)": 2 * tokens * (3 * hidden + inner),
        "hidden states of both streams (bfloat16)": 2 * 2 * tokens * hidden,
        "five moments of the widest layer (float32)": 5 * 4 * inner * inner,
        "three factorizations of it (float32)": 3 * 4 * inner * inner,
    }


def in_child(directory: str, windows: int, step: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--child", directory, "--windows", str(windows), "--step", step]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found


def weights_alone(directory: str, size: int) -> None:
    """Where the float weights are makes the difference; many small blocks and two windows, so that statistics and activations do not."""
    rows: list[dict[str, Any]] = [{"part": "float model", "MB": size / 1e6}]
    for path in demo.MODEL.glob("tokenizer*"):  # its 1,024 tokens and no names for the others
        shutil.copy(path, directory)
    for step in list(STEPS)[1:]:
        found = in_child(directory, 2, step)
        rows.append({"part": f"above Python, at the peak: {step}", "MB": (max(found["peaks"].values()) - found["start"]) / 1e6})
        rows.append({"part": f"above Python, at the end: {step}", "MB": (found["end"] - found["start"]) / 1e6})
        print(rows[-2:], flush=True)
    publish("memory_weights", f"memory of 24 blocks of width 1024, 2 x {SEQ_LEN} tokens", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--child", metavar="DIRECTORY", help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, default=next(iter(STEPS)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.child:
        measure(options.child, options.windows, options.step)
        return
    torch.manual_seed(0)
    shape, blocks = (MANY, 24) if options.weights else (SHAPE, options.blocks)
    config = LlamaConfig(**shape, num_hidden_layers=blocks, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as directory:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(directory)
        del model
        if options.weights:
            weights_alone(directory, size)
            return
        found = in_child(directory, options.windows, next(iter(STEPS)))
    rows: list[dict[str, Any]] = [{"part": "float model", "MB": size / 1e6}, {"part": "python and libraries", "MB": found["start"] / 1e6}]
    rows += [{"part": f"above Python: {name}", "MB": max(0, peak - found["start"]) / 1e6} for name, peak in found["peaks"].items()]
    rows += [{"part": f"computed: {name}", "MB": value / 1e6} for name, value in terms(config, options.windows).items()]
    rows += [{"part": "quantized model, at the end", "MB": (found["end"] - found["start"]) / 1e6}]
    title = f"memory of quantizing {options.blocks} blocks of 1B shape, {options.windows} x {SEQ_LEN} tokens"
    publish("memory", title, rows)


if __name__ == "__main__":
    main()
