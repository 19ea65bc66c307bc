"""What a run will take: memory by adding up what block.py holds at once, time by counting its arithmetic.

Letters: T calibration tokens, of which 1 / HELD_OUT are held out; e bytes of an activation; and for Linears that share an input
k input channels and R output channels together. Both are estimates: where they were compared with runs, memory was good to within a
factor of two, and a run took up to three times the time that was counted.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import get_max_memory

from awq_hf.calibration.data import HELD_OUT
from awq_hf.parallel import ROWS, in_parallel, one_thread_each, workers
from awq_hf.pipeline import PROBE_TOKENS
from awq_hf.products import linear
from awq_hf.recipe import Recipe
from awq_hf.rounding.descent import SWEEPS
from awq_hf.rounding.gptq import BLOCK

# The range that is given for an estimated time. Its upper end is the farther one: caches, memory and other programs share what a short
# measurement had for itself, and nothing makes a run faster than its arithmetic.
LOW, HIGH = 0.7, 2.5
# Freed, but in pieces that do not fit the next request: a share of the working set, and on the CPU what glibc does not give back.
FRAGMENTS, GLIBC = 0.4, 200_000_000
PROBE_FORWARDS = 60  # of the search for folds in a block with the usual ten producers


@dataclass(frozen=True)
class Group:
    """Linears that share an input. rows: out_features of those to be quantized; outputs: of all of them; folded: scales are searched.

    Of experts it is one of `count`, which a `share` of the tokens reaches; their inputs are computed when they are needed.
    """

    in_features: int
    rows: tuple[int, ...]
    outputs: int
    folded: bool
    share: float = 1.0
    count: int = 1


@dataclass(frozen=True)
class BlockCost:
    """One kind of block. count: how many there are; parameters: elements of its matrices; active: of those, what a token is multiplied
    with (a few of many experts); probed: seconds that its probe took."""

    count: int
    parameters: int
    active: float
    groups: tuple[Group, ...]
    probed: float | None = None


# Memory


def peak_memory(blocks: Iterable[BlockCost], recipe: Recipe, device: str, result_bytes: int, hidden: int, itemsize: int) -> dict[str, int]:
    """Bytes at the peak, by what they are for. hidden: width of the hidden states; itemsize: of the model's dtype.

    result_bytes: of the quantized model, which is there in the end, with what stays float of it.
    """
    blocks = list(blocks)
    threads, tokens = _threads(device), recipe.samples * recipe.seq_len
    rows = math.inf if threads is None else threads * ROWS
    streams = 3 if recipe.stream == "quantized" else 2  # of each stream what enters the block, and what has come out of it
    streams += recipe.mends_residuals  # the float one between the block's branches
    working = {
        "hidden states": streams * tokens * hidden * itemsize,
        # run_float keeps the inputs of all groups of a block until they are rounded.
        "inputs of a block's Linears": max(sum(tokens * g.in_features for g in b.groups if g.count == 1) for b in blocks) * itemsize,
        "forwards under way": max(_paused(b.groups, tokens, hidden) for b in blocks) * itemsize if recipe.stream == "quantized" else 0,
        # The probe's float32 copy of a block is gone before the first statistic is summed.
        "statistics and rounding": max(max([4 * b.parameters, *(_rounding(g, recipe, rows) for g in b.groups)]) for b in blocks),
    }
    return {
        "quantized model": result_bytes,
        # The others are in their files, or quantized already (awq_hf/streaming.py).
        "float weights of one block": max(b.parameters for b in blocks) * itemsize,
        **working,
        "freed, but not given back": int(FRAGMENTS * sum(working.values())) + (0 if threads is None else GLIBC),
    }


def _paused(groups: tuple[Group, ...], tokens: int, hidden: int) -> int:
    """Elements that the paused calls of a block hold: the residual and the normed hidden states, what went into the next Linears, and
    what the ones before them put out (queries, keys and values while the output projection waits)."""
    groups = tuple(g for g in groups if g.count == 1)
    before = [0, *(g.outputs for g in groups)]
    return max((tokens * (2 * hidden + g.in_features + outputs) for g, outputs in zip(groups, before, strict=False)), default=0)


def _rounding(group: Group, recipe: Recipe, rows_at_a_time: float) -> int:
    """Bytes while the weights of one group are rounded, all of it float32."""
    if not group.rows:
        return 0
    rows, k = sum(group.rows), group.in_features
    moments = 5 if recipe.stream == "quantized" else 2  # [k, k]: H and P of the search, H, P and R of the held-out slice
    square = moments + 2  # GPTQ: of a reordered copy of H, its factor, inverse and the inverse's factor two at a time
    # [R, k]: folded weights, their targets, these joined to one matrix, and codes, in pieces and then joined; C of the search, C and K of
    # the held-out slice; [rows at a time, k]: W, Q, scale and zero point of each weight, D, the codes before the sweep, four temporaries
    tall = 8 if _may_be_added(group, recipe) else 5
    return int(4 * k * (square * k + tall * rows + 10 * min(rows, rows_at_a_time)))


def _may_be_added(group: Group, recipe: Recipe) -> bool:
    """Whether what a Linear puts out may be added to the residual stream, which is not looked into for a forecast."""
    return recipe.mends_residuals and len(group.rows) == 1 and group.count == 1


def _threads(device: str) -> int | None:
    """How many pieces of rows are worked on at a time, each by one thread; None on a GPU, which takes all rows at once."""
    return torch.get_num_threads() if torch.device(device).type == "cpu" else None


def this_program(device: str) -> dict[str, int]:
    """What Python, torch and transformers have taken by themselves, on the CPU. To be asked for before there is anything else."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {"this program": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit} if torch.device(device).type == "cpu" else {}


def free_memory(device: str) -> int | None:
    """Bytes that are free on the device now, None where that cannot be asked for."""
    at = torch.device(device)
    return get_max_memory().get(at.type if at.type == "cpu" else at.index or 0)


# Time


def estimated_seconds(blocks: Iterable[BlockCost], recipe: Recipe, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(Least, most) seconds of quantizing without loading and saving, on this machine as fast as it is now."""
    work = sum((block_work(block, recipe, _threads(device)) for block in blocks), Work())
    seconds = measure_speed(device, dtype).seconds(work)
    return LOW * seconds, HIGH * seconds


@dataclass
class Work:
    """model_flops: of matrix products in the model's dtype; flops: in float32; passes: elements of float32 read and written once by an
    elementwise operation; calls: operations too small to count for anything but their being started."""

    model_flops: float = 0.0
    flops: float = 0.0
    passes: float = 0.0
    calls: float = 0.0
    seconds: float = 0.0  # measured already

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, count: float) -> Work:
        return Work(*(getattr(self, name) * count for name in self.__dataclass_fields__))


def block_work(block: BlockCost, recipe: Recipe, threads: int | None) -> Work:
    """The work on all blocks of one kind. threads: see `_threads`."""
    tokens = recipe.samples * recipe.seq_len
    streams = 2 if recipe.stream == "quantized" else 1
    probe_forward = Work(flops=2 * block.active * PROBE_TOKENS, passes=2 * block.parameters)
    found = Work(seconds=block.probed) if block.probed is not None else probe_forward * PROBE_FORWARDS
    each = Work(model_flops=2 * block.active * tokens * streams) + probe_forward * 5  # a baseline, verified; a step on; before and after
    for group in block.groups:
        if group.rows:
            each += _group_work(group, recipe, tokens * group.share, threads) * group.count
    return found + each * block.count


def _group_work(group: Group, recipe: Recipe, tokens: float, threads: int | None) -> Work:
    k, R = float(group.in_features), float(sum(group.rows))  # noqa: N806
    held, width = tokens / HELD_OUT, k if recipe.spec.group_size == -1 else min(k, recipe.spec.group_size)
    quantized = recipe.stream == "quantized"
    # A Cholesky factor takes k^3 / 3, at half the speed of a matrix product, and on one thread.
    cholesky = 2 / 3 * k**3 * (threads or 1)
    # Moments: a product of [k, T] and [T, k] for each; of the quantized stream H and P, and R on the held-out slice.
    work = Work(flops=2 * k * k * (2 * tokens + held if quantized else tokens), passes=(4 if quantized else 2) * tokens * k)
    if _may_be_added(group, recipe):  # C and, on the held-out slice, K; one more triangular solve, and three products to choose b
        work += Work(flops=2 * R * k * (tokens + held) + 8 * R * k * k)
    # Judging: H, P and R times a weight once, and H times the errors of plain rounding and of what was found.
    work += Work(flops=10 * R * k * k, passes=20 * R * k)
    # Passes over a weight: smoothing, range, dividing, rounding, clamping, back, error, its square and sum.
    if recipe.scale is not None and group.folded:
        work += Work(passes=(2 * recipe.scale.steps + 2) * 12 * R * k)
    if recipe.correction and quantized:  # a factor for each Linear, two triangular solves, and two products to choose c
        work += Work(flops=len(group.rows) * cholesky + 8 * R * k * k, passes=10 * R * k)
    if recipe.clip is not None:
        adjusted = 0 if recipe.spec.symmetric else 2 * len(recipe.clip.adjustments)
        candidates = 1 + len(recipe.clip.shrinks) + adjusted
        work += Work(flops=candidates * 2 * R * k * width, passes=candidates * 12 * R * k)
    if recipe.rounding != "nearest":  # GPTQ: two factors and an inverse; each column updates the rest of its block, in float32
        pieces = 1 if threads is None else max(1.0, R / ROWS)
        column = Work(passes=R * (BLOCK / 2 + 12), calls=12 * pieces)
        work += Work(flops=4 * cholesky + R * k * k) + column * k
        if recipe.rounding == "descent":
            work += (Work(flops=2 * R * k * (k + 2 * width)) + column * k) * SWEEPS
    return work


@dataclass(frozen=True)
class Speed:
    """Of this machine, measured by `measure_speed`: flops, elements and calls in a second."""

    model_flops: float
    flops: float
    passes: float
    calls: float

    def seconds(self, work: Work) -> float:
        return work.seconds + sum(getattr(work, name) / getattr(self, name) for name in self.__dataclass_fields__)


def measure_speed(device: str, dtype: torch.dtype) -> Speed:
    """Time matrix products in the model's dtype and in float32, passes over a matrix, and rows of tiny operations.

    On a CPU as a run goes about it: one on every thread. Spread over threads, single operations can take many times as long when the
    machine is busy with something else.
    """
    on_cpu = torch.device(device).type == "cpu"
    small, large = (torch.ones(shape, dtype=torch.float32, device=device) for shape in ((1,), (4096, 1024 if on_cpu else 16384)))
    with one_thread_each() if on_cpu else nullcontext():
        return Speed(
            model_flops=_product_speed(device, dtype),
            flops=_product_speed(device, torch.float32),
            passes=_speed(device, large.numel(), lambda: large * 2),
            calls=_speed(device, 200, lambda: [small + 1 for _ in range(200)]),
        )


def _product_speed(device: str, dtype: torch.dtype) -> float:
    """Of a small product, and where that is fast, as float16 on most CPUs is not, of one that is large enough to be typical.

    As the model's Linears are multiplied while it is quantized (products.py).
    """
    speed = 0.0
    for size in (256, 1024 if torch.device(device).type == "cpu" else 4096):
        flops = 2.0 * size**3
        if not speed or flops / speed < 0.5:
            x = torch.randn(size, size, device=device).to(dtype)
            speed = _speed(device, flops, lambda x=x: linear(x, x))  # type: ignore[misc]
    return speed


def _speed(device: str, amount: float, operation: Callable[[], object]) -> float:
    """Amount in a second, by the fastest of five times; the first ones also warm up caches and allocators."""

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    def timed() -> float:
        wait()
        began = time.perf_counter()
        in_parallel(lambda _: operation(), range(workers()))
        wait()
        return time.perf_counter() - began

    return amount * workers() / max(min(timed() for _ in range(5)), 1e-9)
