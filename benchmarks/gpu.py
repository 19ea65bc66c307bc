"""Times on a GPU: CUDA graphs of many launches, in which copies of a weight take turns so that the cache holds none of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

LAUNCHES = 24  # of a graph, at least
REPLAYS = (5, 50)  # at least and at most
PEAK_SIZES = (4096, 8192, 16384)  # of the square matrices whose products give the peak


def require(script: str) -> None:
    """Ends the program with status 1 where there is no GPU, before anything is written."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise SystemExit(f"{script} measures on an NVIDIA GPU, and torch finds none here: nothing was measured or written.")


def name() -> str:
    return torch.cuda.get_device_name().replace(" ", "-")


def cold_bytes() -> int:
    """Bytes that the copies of a weight take together, so that the L2 cache has lost each by its next turn."""
    return max(256 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size)


def seconds(calls: Sequence[Callable[[], object]], budget: float = 0.15) -> float:
    """Seconds of a call: the median over replays of a CUDA graph in which `calls` take turns. budget: seconds of replays, roughly."""
    for call in calls:  # the first call of a kernel compiles it
        call()
    torch.cuda.synchronize()
    graph, rounds = torch.cuda.CUDAGraph(), -(-LAUNCHES // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    least, most = REPLAYS
    (first,) = _replays(graph, 1)
    times = _replays(graph, min(most, max(least, int(budget / first))))
    return statistics.median(times) / (rounds * len(calls))


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying a gibibyte on the device."""
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)])


def matmul_peak(dtype: torch.dtype) -> float:
    """Operations a second of cuBLAS's fastest product of large square matrices; a multiplication and an addition are two."""
    return max(_matmul_rate(size, dtype) for size in PEAK_SIZES)


def _matmul_rate(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds([lambda: torch.mm(a, b)])
