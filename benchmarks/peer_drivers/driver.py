"""What the drivers share. A driver runs in the environment of the program that it drives, so nothing of awq-hf's is imported here.

    python -m benchmarks.peer_drivers.NAME JOB.json

quantizes a model as its program's documentation does it, and leaves in the job's folder

    checkpoint/           what the program writes
    dense/                the same weights in float32, where awq-hf cannot read the checkpoint
    logits.safetensors    what the program's own quantized model computes for the first windows: dense weights must give the same
    result.json           versions, and seconds and memory of the quantization
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PROBES = 4  # windows whose logits are compared


@dataclass
class Job:
    """source: the float model's directory; method: which of the program's algorithms; folder: where tokens are and results go."""

    source: str
    bits: int
    group_size: int
    method: str
    folder: Path

    @classmethod
    def read(cls) -> Job:
        values = json.loads(Path(sys.argv[1]).read_text())
        return cls(**{**values, "folder": Path(values["folder"])})

    def write(self) -> Path:
        file = self.folder / "job.json"
        file.write_text(json.dumps({**asdict(self), "folder": str(self.folder)}))
        return file

    @property
    def tokens(self) -> Tensor:
        """int64 [windows, tokens]: the calibration data, whole."""
        return load_file(self.folder / "tokens.safetensors")["tokens"]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @contextmanager
    def measured(self, *packages: str) -> Iterator[None]:
        """Time and memory of what is inside: quantizing, without imports, loading and saving."""
        before, wall, cpu = peak_bytes(), time.perf_counter(), cpu_seconds()
        yield
        found = {"wall s": time.perf_counter() - wall, "CPU s": cpu_seconds() - cpu, "MB before": before / 1e6, "MB": peak_bytes() / 1e6}
        versions = {name: metadata.version(name) for name in (*packages, "torch", "transformers")}
        (self.folder / "result.json").write_text(json.dumps({**found, "versions": versions}))

    @torch.no_grad()
    def keep_logits(self, model: Any) -> None:
        logits = model(input_ids=self.tokens[:PROBES], use_cache=False).logits
        save_file({"logits": logits.float().contiguous()}, self.folder / "logits.safetensors")

    def write_dense(self, tensors: dict[str, Tensor]) -> None:
        """A model like the source, with these tensors in place of its own of the same name, in float32."""
        original = {name: t for file in Path(self.source).glob("*.safetensors") for name, t in load_file(file).items()}
        if unknown := tensors.keys() - original.keys() - {"lm_head.weight"}:  # tied: not in the files
            raise ValueError(f"the model has no {min(unknown)}")
        folder = self.folder / "dense"
        folder.mkdir()
        both = {name: tensors.get(name, t).float().contiguous() for name, t in original.items()}
        save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((Path(self.source) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def cpu_seconds() -> float:
    """Of this process and the children that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_bytes() -> int:
    """Of this process. Not ru_maxrss on Linux, which starts at what the parent had when it forked."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
