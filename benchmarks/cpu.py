"""How fast 4-bit weights multiply on this CPU: the kernels' paths against float Linears of the same shape, in one interleaved run.

python -m benchmarks.cpu                  what torch has
AWQ_HF_NATIVE=1 python -m benchmarks.cpu  also the kernel in C++

How many times as fast as the float Linear in the activations' dtype (medians), for the path that is chosen by the number of tokens and
for its parts; the last column is how far the choice is from the better part. Copies of a weight take turns.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from awq_hf.kernels import cpu, native
from awq_hf.kernels.problem import Problem
from benchmarks.common import publish, quiet

SHAPES = ((4096, 4096),)  # out_features, in_features
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KERNEL_TOKENS = 256  # above, the kernels alone are left out: they have lost by far
GROUP = 128
COPIES = 5  # of every weight
Call = Callable[[Tensor, int], Tensor]  # activations, which copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = [row for shape in SHAPES for dtype in cpu.DTYPES for row in _rows(*shape, dtype, options.repeats)]
    instructions = torch.backends.cpu.get_cpu_capability()
    title = (
        f"speed of y = x W^T, 4 bits in groups of {GROUP}, as a multiple of the float Linear's, {options.threads} threads, {instructions}"
    )
    publish(f"cpu_{instructions.lower()}", title, rows)


def _rows(n: int, k: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    calls = _calls(n, k, dtype)
    return [_row(n, k, m, dtype, calls, repeats) for m in TOKENS]


def _calls(n: int, k: int, dtype: torch.dtype) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    codes = lambda columns: torch.randint(0, 16, (n, columns), generator=generator, dtype=torch.uint8)  # noqa: E731
    weights = [(codes(k), (torch.rand(n, k // GROUP, generator=generator) + 0.1).half() / 64, codes(k // GROUP)) for _ in range(COPIES)]
    dense = [torch.randn(n, k, generator=generator).to(dtype) for _ in weights]
    calls: dict[str, Call] = {f"Linear {_name(dtype)}": lambda x, i: torch.nn.functional.linear(x, dense[i])}
    for module in (cpu, native):
        problem = Problem(m=1, n=n, k=k, groups=k // GROUP, dtype=dtype, device="cpu")
        if reason := module.supports(problem):
            print(f"{module.__name__}: {reason}")
            continue
        packed = [module.pack(*weight) for weight in weights]
        name = module.__name__.rsplit(".", 1)[-1]
        calls[name] = _call(module, packed, None)
        calls[f"{name}: kernel"] = _call(module, packed, max(TOKENS))
        calls[f"{name}: matmul"] = _call(module, packed, 0)
    return calls


def _call(module: Any, packed: list[Any], crossover: int | None) -> Call:
    """crossover: tokens up to which the kernel is used, or None for the module's own."""

    def call(x: Tensor, i: int) -> Tensor:
        own = module.crossover
        module.crossover = own if crossover is None else lambda _dtype: crossover
        try:
            return module.linear(x, *packed[i])
        finally:
            module.crossover = own

    return call


def _row(n: int, k: int, m: int, dtype: torch.dtype, calls: dict[str, Call], repeats: int) -> dict[str, Any]:
    x = torch.randn(m, k).to(dtype)
    measured = {name: call for name, call in calls.items() if m <= KERNEL_TOKENS or not name.endswith(": kernel")}
    times: dict[str, list[float]] = {name: [] for name in measured}
    turns = itertools.count()
    order, shuffled = list(measured.items()), random.Random(0)
    for _ in range(repeats):
        shuffled.shuffle(order)  # what a call leaves in the caches, the float Linear above all, is nobody's share in particular
        for name, call in order:
            start = time.perf_counter()
            call(x, next(turns) % COPIES)  # never one that the call before has left in the caches
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(values[1:] or values) for name, values in times.items()}
    return {"out x in": f"{n}x{k}", "dtype": _name(dtype), "tokens": m, **_summary(medians)}


def _summary(medians: dict[str, float]) -> dict[str, Any]:
    of_linear = next(iter(medians.values()))
    row: dict[str, Any] = {}
    for name in ("cpu", "native"):
        if name in medians:
            parts = {part: medians[part] for part in (f"{name}: kernel", f"{name}: matmul") if part in medians}
            row |= {f"{name}: kernel": ""} | {part: of_linear / median for part, median in parts.items()}
            row |= {name: of_linear / medians[name], f"{name}, time / best part's": medians[name] / min(parts.values())}
    return row


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
