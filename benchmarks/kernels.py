"""How fast the kernels multiply on a GPU, against cuBLAS, other 4-bit kernels and what the device's memory and arithmetic allow.

python -m benchmarks.kernels                                   every shape of every model, every number of tokens
python -m benchmarks.kernels --models Llama-3-8B --dtypes bf16 --tokens 1 16 128
python -m benchmarks.kernels --kernels                         our kernels one by one: where to go over from one to the next
python -m benchmarks.kernels --tune --tokens 1 8               tile configurations: what to write into kernels/tuning.py

Prints a table for every shape; writes a file for every model to results/, and plots of the comparison. Weights take turns so that the L2
cache holds none. A result that is wrong is left out, and so is what is not installed; the output says which and why.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from awq_hf.kernels import dispatch
from benchmarks import gpu, kernel_plot, kernel_tuning
from benchmarks.common import quiet, show, write
from benchmarks.kernel_rivals import CUBLAS, OURS, RIVALS, SPEC, Contender, Weight, our_kernels, our_layout, ours

MODELS = {  # (out_features, in_features): query and output, key and value, gate and up, down
    "Llama-3-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Llama-3-70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "Qwen3-0.6B": ((2048, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (1024, 3072)),
    "small": ((256, 256), (1024, 256), (256, 1024)),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# What is aimed at on an H200. Share of the limit for one token, by the number of weights; speed over cuBLAS, by tokens up to which it
# holds, for matrices of at least LARGE weights; and no loss to the named rivals at any size.
SHARES = {4096 * 4096: 0.5, 4096 * 14336: 0.7, 8192 * 28672: 0.8}
SPEEDUPS = ((16, 2.5), (64, 1.5), (128, 1.0), (1024, 0.8), (math.inf, 0.94))
LARGE = 4096 * 4096
NEVER_BELOW = ("gemlite", "tinygemm")


class Device(NamedTuple):
    copy: float  # bytes a second
    peak: dict[str, float]  # dtype -> operations a second

    def __str__(self) -> str:
        peaks = "".join(f", {dtype} matmul {peak / 1e12:.0f} TFLOP/s" for dtype, peak in self.peak.items())
        return f"copy {self.copy / 1e12:.2f} TB/s{peaks}"


def limit(n: int, k: int, m: int, copy: float, peak: float) -> tuple[float, str]:
    """Seconds that y = x W^T takes at least, and what sets them: moving W, x and y once at `copy`, or multiplying at `peak`."""
    moved = n * k * SPEC.bits_per_weight(k) / 8 + 2 * m * (n + k)
    return max((moved / copy, "memory"), (2 * m * n * k / peak, "compute"))


def row(n: int, k: int, m: int, dtype: str, seconds: dict[str, float], unstable: list[str], device: Device) -> dict[str, Any]:
    """A line of the table. seconds: of our kernel and of the rivals that were timed; unstable: those whose bits change between calls."""
    least, bound = limit(n, k, m, device.copy, device.peak[dtype])
    times = {f"{name} us": seconds[name] * 1e6 if name in seconds else "" for name in (OURS, *RIVALS)}
    faster = {f"x {name}": seconds[name] / seconds[OURS] if {name, OURS} <= seconds.keys() else "" for name in RIVALS}
    share = least / seconds[OURS] if OURS in seconds else ""
    shape = {"out x in": f"{n} x {k}", "dtype": dtype, "M": m}
    limits = {"limit us": least * 1e6, "bound": bound, "share": share}
    return {**shape, **times, **limits, **faster, "bits change": ", ".join(unstable), "target": target(n, k, m, seconds, least)}


def target(n: int, k: int, m: int, seconds: dict[str, float], least: float) -> str:
    """What is missed of the targets, "met" when nothing is, "" where there are none or nothing was measured."""
    if OURS not in seconds:
        return ""
    wanted: list[tuple[str, float, float]] = []  # name, found, wanted
    if m == 1 and n * k in SHARES:
        wanted.append(("of the limit", least / seconds[OURS], SHARES[n * k]))
    if n * k >= LARGE and CUBLAS in seconds:
        wanted.append(("x cuBLAS", seconds[CUBLAS] / seconds[OURS], next(speed for tokens, speed in SPEEDUPS if m <= tokens)))
    wanted += [(f"x {name}", seconds[name] / seconds[OURS], 1.0) for name in NEVER_BELOW if name in seconds]
    missed = [f"{found:.2f} {name}, not {least:g}" for name, found, least in wanted if found < least]
    return "; ".join(missed) or ("met" if wanted else "")


class LeftOut(dict[str, None]):
    """What was not measured and why: printed once, kept for the file."""

    def add(self, who: str, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        message = f"left out: {who}: {lines[0][:200] if lines else type(error).__name__}"
        if message not in self:
            print(message)
        self[message] = None
        try:
            torch.cuda.synchronize()
        except Exception as lost:  # after an illegal access of memory every call fails
            raise SystemExit(f"{who} has left the GPU unusable ({lost}); measure the rest without it, in a new process") from None


def contenders(weight: Weight, dtype: torch.dtype, names: list[str], left_out: LeftOut) -> list[Contender]:
    found = [ours(weight, dtype)]
    for name in names:
        try:
            found.append(RIVALS[name](weight, dtype))
        except Exception as error:  # whatever a rival's code raises
            left_out.add(f"{name}, {dtype}", error)
    return found


def time_all(those: list[Contender], weight: Weight, m: int, dtype: torch.dtype, left_out: LeftOut) -> tuple[dict[str, float], list[str]]:
    """Seconds of the contenders that are right, and the names of those whose bits change."""
    seconds, unstable = {}, []
    x = torch.randn(m, weight.shape[1], device="cuda").to(dtype)
    for contender in those:
        if not contender.takes(m):
            continue
        try:
            if not contender.check(x, weight):
                unstable.append(contender.name)
            seconds[contender.name] = contender.seconds(x)
        except Exception as error:
            left_out.add(f"{contender.name}, {weight.shape[0]} x {weight.shape[1]}, {dtype}, M = {m}", error)
    return seconds, unstable


Rows = Callable[[Weight, str, LeftOut], list[dict[str, Any]]]  # of a shape, for the name of a dtype


def compare(options: argparse.Namespace, device: Device) -> Rows:
    def rows(weight: Weight, dtype: str, left_out: LeftOut) -> list[dict[str, Any]]:
        those = contenders(weight, DTYPES[dtype], options.rivals, left_out)
        return [row(*weight.shape, m, dtype, *time_all(those, weight, m, DTYPES[dtype], left_out), device) for m in options.tokens]

    return rows


def one_by_one(options: argparse.Namespace) -> Rows:
    def rows(weight: Weight, dtype: str, left_out: LeftOut) -> list[dict[str, Any]]:
        those, (layout, _) = our_kernels(weight, DTYPES[dtype]), our_layout(weight, DTYPES[dtype])
        found = []
        for m in options.tokens:
            seconds, unstable = time_all(those, weight, m, DTYPES[dtype], left_out)
            chosen = dispatch.choose(weight.problem(m, DTYPES[dtype]), layout)
            found.append(kernel_row(*weight.shape, m, dtype, seconds, unstable, [c.name for c in those], chosen.name if chosen else ""))
        return found

    return rows


def kernel_row(
    n: int, k: int, m: int, dtype: str, seconds: dict[str, float], unstable: list[str], names: list[str], chosen: str
) -> dict[str, Any]:
    """A line of --kernels. chosen: what the dispatch takes; "chosen / fastest" above 1 says that a crossover is in the wrong place."""
    best = min(seconds, key=seconds.__getitem__, default="")
    times = {f"{name} us": seconds[name] * 1e6 if name in seconds else "" for name in names}
    ratio = seconds[chosen] / seconds[best] if chosen in seconds else ""
    shape = {"out x in": f"{n} x {k}", "dtype": dtype, "M": m}
    return {**shape, **times, "fastest": best, "chosen": chosen, "chosen / fastest": ratio, "bits change": ", ".join(unstable)}


def readable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the columns that are empty, or in the title."""
    kept = [key for key in rows[0] if key not in ("out x in", "dtype") and any(row[key] != "" for row in rows)]
    return [{key: row[key] for key in kept} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--kernels", action="store_true", help="our kernels one by one")
    mode.add_argument("--tune", action="store_true", help="tile configurations of kernels/tuning.py")
    options = parser.parse_args()
    if min(options.tokens) < 1:
        parser.error(f"--tokens {min(options.tokens)}: there must be at least 1")
    gpu.require("benchmarks.kernels")
    quiet()
    torch.manual_seed(0)
    with torch.no_grad():
        try:
            our_layout(Weight.random(256, 256), torch.float16)
        except RuntimeError as error:
            raise SystemExit(f"no kernel of ours runs here, nothing was measured or written: {error}") from None
        for model in options.models:
            measure(model, options)


def measure(model: str, options: argparse.Namespace) -> None:
    """The limits are measured anew for every model: clocks change while a GPU works."""
    device = Device(gpu.copy_bandwidth(), {name: gpu.matmul_peak(DTYPES[name]) for name in options.dtypes})
    tuner = kernel_tuning.Tuner(options.tokens)
    kind, rows_of = "kernels", compare(options, device)
    if options.kernels:
        kind, rows_of = "kernels_one_by_one", one_by_one(options)
    if options.tune:
        kind, rows_of = "kernels_tuning", lambda weight, dtype, left_out: tuner.rows(weight, dtype, DTYPES[dtype])
    name, title = f"{kind}_{gpu.name()}_{model}", f"{model} on {torch.cuda.get_device_name()}: {device}"
    rows: list[dict[str, Any]] = []
    left_out = LeftOut()
    for n, k in MODELS[model]:
        for dtype in options.dtypes:
            weight = Weight.random(n, k)
            found = rows_of(weight, dtype, left_out)
            show(f"{n} x {k} in {dtype}, {title}", readable(found))
            rows += found
            torch.cuda.empty_cache()
        write(name, title, rows, left_out=list(left_out), copy_bandwidth=device.copy, matmul_peak=device.peak)
    if options.tune:
        show("the best for all shapes together", tuner.summary())
    if kind == "kernels":
        kernel_plot.save(name, rows)


if __name__ == "__main__":
    main()
