"""Times tile configurations of kernels/tuning.py: for every shape and number of tokens the best, and for every line of the tables too."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from awq_hf.kernels import gemm, gemv, kernel_layout, tuning
from awq_hf.kernels.tuning import GemmConfig, GemvConfig
from benchmarks import gpu
from benchmarks.kernel_rivals import SPEC, TOLERANCE, Contender, Weight, packed_bytes, relative_error

BUDGET = 0.02  # seconds of timing for a configuration
FINALISTS = 4  # configurations that are timed with other numbers of splits
PROGRAMS = 4 * tuning.PROGRAMS  # up to which K is split

Config = GemvConfig | GemmConfig


def gemv_configs(k: int) -> list[GemvConfig]:
    """All that read a row of k columns, 32 to a piece, without idle threads: one piece a thread at a time."""
    warps = [w for w in (1, 2, 4, 8) if w == 1 or 32 * w * 32 <= k]
    return [GemvConfig(warps=w, stages=1, rows=rows, quads=32 * w) for w in warps for rows in (1, 2, 4, 8)]


def gemm_configs(m: int) -> list[GemmConfig]:
    """Tiles of as many tokens as there are, and of half as many, from 8 to 128."""
    fitting = min(128, max(8, 1 << (m - 1).bit_length()))
    return [
        GemmConfig(warps=warps, stages=stages, bn=bn, bm=bm, registers=registers)
        for bm in sorted({fitting, max(8, fitting // 2)})
        for bn in (64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for registers in ((None, 128) if bm <= 16 else (None,))
    ]


def split_counts(m: int, n: int, k: int, config: GemmConfig) -> list[int]:
    """Powers of two that leave each split a block of 128 columns, and not many more programs than the table aims at."""
    tiles, blocks = math.ceil(m / config.bm) * math.ceil(n / config.bn), math.ceil(k / kernel_layout.BLOCK)
    return [1 << i for i in range(blocks.bit_length()) if i == 0 or (1 << i <= blocks and tiles << i <= PROGRAMS)]


@dataclass
class Tuner:
    tokens: list[int]
    # line of a table -> configuration -> time over the best one's, for every shape and dtype
    slower: dict[tuple[str, str], dict[Config, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def rows(self, weight: Weight, dtype_name: str, dtype: torch.dtype) -> list[dict[str, Any]]:
        parts = kernel_layout.to_kernel(weight.q, weight.scales, weight.zero_points, SPEC.bits)
        copies = Contender("", parts, lambda x, parts: x, packed_bytes(weight)).copies
        n, k = weight.shape
        rows = []
        for m in self.tokens:
            x = torch.randn(m, k, device="cuda").to(dtype)
            for kernel in ("gemv", "gemm") if m == 1 else ("gemm",):
                times, failed = _search(kernel, x, weight, copies)
                shape = {"out x in": f"{n} x {k}", "dtype": dtype_name, "M": m, "kernel": kernel, "failed": failed}
                rows.append(shape | self._result(kernel, m, n, k, times))
        return rows

    def _result(self, kernel: str, m: int, n: int, k: int, times: dict[tuple[Config, int], float]) -> dict[str, Any]:
        """times: (configuration, splits) -> seconds."""
        table = _of_table(kernel, m, n, k)
        if not times:
            return {"table us": "", "best us": "", "table / best": "", "best": "", "splits": "", "splits of the table": table[1]}
        (config, splits), least = min(times.items(), key=lambda item: item[1])
        line = (kernel, f"in_features {k}" if kernel == "gemv" else f"M = {m}")
        for one in {config for config, _ in times}:
            best = min(seconds for (other, _), seconds in times.items() if other == one)
            self.slower[line][one].append(best / least)
        now = times.get(table)
        found = {"table us": now * 1e6 if now else "", "best us": least * 1e6, "table / best": now / least if now else ""}
        return found | {"best": _text(config), "splits": splits, "splits of the table": table[1]}

    def summary(self) -> list[dict[str, Any]]:
        """For every line of the tables the configuration whose time, relative to each shape's best, has the least geometric mean."""
        rows = []
        for (kernel, line), configs in sorted(self.slower.items(), key=lambda item: (item[0][0], int(item[0][1].split()[-1]))):
            complete = max(map(len, configs.values()))
            means = {config: math.exp(sum(map(math.log, s)) / len(s)) for config, s in configs.items() if len(s) == complete}
            config = min(means, key=means.__getitem__)
            rows.append({"kernel": kernel, "line": line, "configuration": _text(config), "time / best of each shape": means[config]})
        return rows or [{"kernel": "no configuration ran"}]


def _text(config: Config) -> str:
    return ", ".join(f"{name}={value}" for name, value in vars(config).items() if value is not None)


def _of_table(kernel: str, m: int, n: int, k: int) -> tuple[Config, int]:
    if kernel == "gemv":
        return tuning.gemv_config(n, k), 1
    config = tuning.gemm_config(m)
    return config, tuning.splits(m, n, k, config)


def _search(kernel: str, x: Tensor, weight: Weight, copies: list[Any]) -> tuple[dict[tuple[Config, int], float], int]:
    """Seconds of all configurations, of the best ones with every number of splits; and how many failed or were wrong."""
    m, (n, k) = x.shape[0], weight.shape
    times: dict[tuple[Config, int], float] = {}
    tried = 0
    for config, splits in _candidates(kernel, m, n, k, times):
        tried += 1
        try:
            if not relative_error(_run(x, copies[0], config, splits), x, weight) <= TOLERANCE:
                raise ArithmeticError(f"wrong result of {config}, {splits} splits")
            times[config, splits] = gpu.seconds([partial(_run, x, parts, config, splits) for parts in copies], BUDGET)
        except Exception as error:  # too many registers or too much shared memory, for the most part
            if isinstance(error, ArithmeticError):
                print(error)
            torch.cuda.synchronize()  # raises where the device is lost, and with it everything that would follow
    return times, tried - len(times)


def _candidates(kernel: str, m: int, n: int, k: int, times: dict[tuple[Config, int], float]) -> Iterator[tuple[Config, int]]:
    """times: filled by the caller, between one candidate and the next."""
    table = _of_table(kernel, m, n, k)
    yield table
    if kernel == "gemv":
        yield from ((one, 1) for one in gemv_configs(k) if one != table[0])
        return
    for config in gemm_configs(m):
        if (candidate := (config, tuning.splits(m, n, k, config))) != table:
            yield candidate
    for best, done in sorted(times, key=times.__getitem__)[:FINALISTS]:
        if isinstance(best, GemmConfig):
            yield from ((best, splits) for splits in split_counts(m, n, k, best) if splits != done)


def _run(x: Tensor, parts: Any, config: Config, splits: int) -> Tensor:
    words, scales, zeros = parts
    if isinstance(config, GemvConfig):
        return gemv.gemv(x, words, scales, zeros, None, SPEC.bits, config)
    return gemm.gemm(x, words, scales, zeros, None, SPEC.bits, config, splits)
