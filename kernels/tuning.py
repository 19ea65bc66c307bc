"""Tile configurations as data, and what the Triton kernels can be asked for. Nothing is searched while a model runs.

No number here has been timed. GEMV, GEMM and the limits on registers come from what the kernels compile to for sm_80, sm_90 and
sm_100: registers of a thread, programs that fit a multiprocessor, instructions of a weight. PROGRAMS and MIN_BLOCKS are estimates, and
so are `dequantize.CHUNK` and ROWS. In the loops a weight takes (sm_80 / 90 / 100) 6.1 / 5.4 / 5.1 instructions in the GEMV and
4.2 / 3.9 / 2.7 in the GEMM of 8 tokens: where issuing is what limits them, the GEMM is the faster one for one token as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from . import jit, kernel_layout
from .problem import Problem

MAX_TOKENS = 1 << 21  # a launch has 65,535 tiles of tokens at most (CUDA C programming guide, grid's y), the larger of 64 tokens


def unsupported(problem: Problem) -> str | None:
    """Why no Triton kernel can do `problem`, or None."""
    p = problem
    if reason := jit.unusable():
        return reason
    if p.device != "cuda" and not jit.INTERPRETED:
        return f"the kernel runs on a GPU, not on {p.device}"
    if torch.version.hip is not None:
        return "the kernel holds PTX, which NVIDIA's GPUs run"
    if p.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {str(p.dtype).removeprefix('torch.')}: cast the activations"
    if p.k % 2:
        return f"the kernel takes in_features in multiples of 2, not {p.k}"
    if p.n % 8:
        return f"the kernel takes out_features in multiples of 8, not {p.n}"
    padded = math.ceil(p.k / kernel_layout.BLOCK) * kernel_layout.BLOCK
    if max(p.n * padded * p.bits // 32, p.m * p.k, p.m * p.n) >= 2**31:
        return f"{p.m} x {p.n} x {p.k} does not fit the kernel's 32-bit offsets: pass fewer tokens at a time"
    if p.m > MAX_TOKENS:
        return f"the kernel takes up to {MAX_TOKENS} tokens, not {p.m}: pass fewer at a time"
    return kernel_layout.unsupported(p.k, p.groups, p.bits)


@dataclass(frozen=True)
class Config:
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Of the compiler. FP fusion is set because its default changes between releases of triton."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class GemvConfig(Config):
    rows: int  # of a program
    quads: int  # 16-byte pieces of every row that a program reads at a time: 32 columns each


@dataclass(frozen=True)
class GemmConfig(Config):
    bn: int  # out_features of a tile
    bm: int  # tokens of a tile
    registers: int | None = None  # that a thread may have, where the compiler would have it spill sooner

    def options(self) -> dict[str, Any]:
        return super().options() | ({} if self.registers is None else {"maxnreg": self.registers})


# Columns up to which a configuration is used (not timed). warps * 32 threads read `quads` pieces, one each. 8 rows took 254 registers on
# sm_100.
GEMV = (
    (1024, GemvConfig(warps=1, stages=1, rows=4, quads=32)),
    (2048, GemvConfig(warps=2, stages=1, rows=4, quads=64)),
    (math.inf, GemvConfig(warps=4, stages=1, rows=4, quads=128)),
)

# Tokens up to which a configuration is used (not timed). bn is at least 64, the rows of one wgmma. Tiles of 128 x 128 spill registers.
GEMM = (
    (8, GemmConfig(warps=4, stages=4, bn=64, bm=8, registers=128)),
    (16, GemmConfig(warps=4, stages=4, bn=64, bm=16, registers=128)),
    (32, GemmConfig(warps=4, stages=4, bn=64, bm=32)),
    (64, GemmConfig(warps=4, stages=3, bn=64, bm=64)),
    (math.inf, GemmConfig(warps=8, stages=3, bn=128, bm=64)),
)

# Not timed either. What split-K aims at: two for each of an H100's 132 multiprocessors, constant so that a result is the same on any device
PROGRAMS = 264
MIN_BLOCKS = 4  # of 128 columns that a split has at least: less should not be worth the trip through the workspace


def gemv_config(n: int, k: int) -> GemvConfig:
    return next(config for limit, config in GEMV if k <= limit)


def gemm_config(m: int) -> GemmConfig:
    return next(config for limit, config in GEMM if m <= limit)


def splits(m: int, n: int, k: int, config: GemmConfig) -> int:
    """Parts that K is cut into: a power of two, so that few kernels are compiled; none is empty."""
    tiles = math.ceil(m / config.bm) * math.ceil(n / config.bn)
    blocks = math.ceil(k / kernel_layout.BLOCK)
    wanted = min(PROGRAMS // tiles, blocks // MIN_BLOCKS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1
