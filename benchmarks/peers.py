"""Other programs beside awq-hf: the same model, the same calibration tokens, the same evaluation.

    python -m benchmarks.peers --peer autoawq=ENV/bin/python --peer llmcompressor=ENV/bin/python ...
    python -m benchmarks.peers --model DIR --text FILE --group-size 32 --peer ...     another model, as in benchmarks.quality
    python -m benchmarks.peers --only awq-hf                                          one row again; the others stay as they are
    python -m benchmarks.peers --tables                                               write the READMEs' tables from results/ again

Every program runs in a Python environment of its own, since their requirements exclude each other; benchmarks/README.md has the
commands that make them. A driver (peer_drivers/) quantizes and writes a checkpoint. Here its integers are read, dequantized into float32
and evaluated in float32, so that nothing but the weights differs; and their logits are compared with those of the program's own
quantized model. --jobs DIR keeps checkpoints and logs there, and takes from there what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from awq_hf import export
from awq_hf.calibration.data import load_windows
from benchmarks.common import RESULTS, Subject, quiet, show, write
from benchmarks.peer_drivers.driver import PROBES, Job
from benchmarks.peer_table import PROGRAMS, Program, brief, in_order, merged, update_tables, with_shares

SAMPLES = 64
SAME = 0.02  # of the logits' norm: what a program that computes in float16 may differ from float32
OWN = "awq_hf"  # the driver that runs in this environment


class Bench:
    """Quantizes a subject's model by one program after the other, and evaluates what came out."""

    def __init__(self, subject: Subject, group_size: int, pythons: dict[str, str], jobs: Path) -> None:
        self.subject, self.group_size, self.pythons, self.jobs = subject, group_size, pythons, jobs
        self.tokens = load_windows([subject.calibration], None, subject.seq_len).sample(SAMPLES, seed=0).input_ids
        self.original = subject.load()

    def row(self, program: Program, bits: int) -> dict[str, Any]:
        """What is known of one program at one width; with `failed` where it did not come to a result."""
        name = f"{self.subject.name}-{bits}-g{self.group_size}-{program.driver}-{program.method}"
        job = Job(str(self.subject.source.resolve()), bits, self.group_size, program.method, self.jobs.resolve() / name)
        row: dict[str, Any] = {"program": program.name, "bits": bits, "group size": self.group_size, "patch": program.patch}
        try:
            self.drive(program, job)
        except subprocess.SubprocessError:
            lines = (job.folder / "log").read_text(errors="replace").strip().splitlines() or ["no output"]
            return row | {"failed": lines[-1]}
        return row | json.loads((job.folder / "result.json").read_text()) | self.stored(job) | self.evaluated(job, program.faithful)

    def drive(self, program: Program, job: Job) -> None:
        """Run the driver, unless it has finished here before, on the same tokens."""
        done = job.folder / "done"
        if done.exists() and torch.equal(job.tokens, self.tokens):
            return
        if job.folder.exists():
            shutil.rmtree(job.folder)
        job.folder.mkdir(parents=True)
        save_file({"tokens": self.tokens}, job.folder / "tokens.safetensors")
        # the folder that Python starts in holds this package alone: the repository's root has others, like `kernels`
        (job.folder / "benchmarks").symlink_to(Path(__file__).parent)
        command = [self.pythons[program.driver], "-m", f"benchmarks.peer_drivers.{program.driver}", str(job.write())]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        with (job.folder / "log").open("w") as log:
            subprocess.run(command, cwd=job.folder, env=environment, stdout=log, stderr=log, check=True)
        done.touch()

    def stored(self, job: Job) -> dict[str, float]:
        """Size of the checkpoint, and bits for each of the weights that were quantized; nothing of one that holds them as floats."""
        layers = {
            name.removesuffix(".weight"): w.numel() for name, w in self.original.named_parameters() if ".layers." in name and w.ndim == 2
        }
        total = own = 0
        for file in job.checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    total += (size := tensors.get_tensor(name).nbytes)
                    own += size if name.rpartition(".")[0] in layers else 0
        bits = 8 * own / sum(layers.values())
        return {"bits per weight": bits, "checkpoint MB": total / 1e6} if bits < 16 else {}

    def evaluated(self, job: Job, faithful: bool) -> dict[str, Any]:
        dense = job.folder / "dense"
        if not dense.exists():
            export(job.checkpoint, "dense", dense, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        apart = self.apart(job, model)
        if faithful and apart > SAME:
            raise RuntimeError(f"{job.folder}: the weights give logits that are {apart:.2g} of their norm from the program's own")
        found = self.subject.measure(model, self.original)
        return {
            "logits apart": apart,
            "KL": found.kl,
            "KL error": found.kl_se,
            "top-1": found.top1,
            "perplexity": found.perplexity,
            "perplexity float": found.reference_perplexity,
            "evaluation tokens": found.tokens,
        }

    @torch.no_grad()
    def apart(self, job: Job, model: Any) -> float:
        """How far the program's own quantized model is from these weights in float32."""
        theirs = load_file(job.folder / "logits.safetensors")["logits"]
        ours = model(input_ids=self.tokens[:PROBES], use_cache=False).logits
        return float((theirs - ours).norm() / ours.norm())


def results(name: str) -> Path:
    return RESULTS / f"peers_{name}.json"


def main() -> None:
    names = [program.name for program in PROGRAMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument(
        "--peer", action="append", default=[], metavar="DRIVER=PYTHON", help="whose environment; those without one are left out"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="PROGRAM", default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--jobs", type=Path)
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    if options.tables:
        return update_tables()
    quiet()
    subject = Subject.from_directory(options.model, options.text) if options.model else Subject.packaged()
    subject.dtype = "float32"
    pythons = {OWN: sys.executable} | dict(peer.split("=", 1) for peer in options.peer)
    chosen = [p for p in PROGRAMS if p.name in options.only]
    if missing := sorted({p.driver for p in chosen} - pythons.keys()):
        print(f"left out, for want of --peer NAME=PYTHON: {', '.join(missing)}")
    with TemporaryDirectory() as temporary:
        bench = Bench(subject, options.group_size, pythons, options.jobs or Path(temporary))
        for bits in options.bits:
            for program in chosen:
                if program.driver in pythons and bits in program.bits:
                    publish(subject.name, bench.row(program, bits))
    return update_tables()


def publish(name: str, row: dict[str, Any]) -> None:
    """Into the results, in place of the same program's older row."""
    file = results(name)
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = with_shares(in_order(merged(old, row)))
    write(file.stem, f"{name}: awq-hf and other programs, {SAMPLES} x 256 calibration tokens", rows)
    show(f"{name}, {row['bits']} bits", [brief(r) for r in rows if r["bits"] == row["bits"]])


if __name__ == "__main__":
    main()
