"""y = x W^T on a CPU with what torch has: its int4 kernel for few tokens, for many a dequantized piece of W at a time and a matmul.

torch's kernel (aten/src/ATen/native/cpu/int4mm_kernel.cpp) is vectorized for bfloat16 only, and takes s and (8 - z) s rounded to
bfloat16. float32 and float16 pass through it in bfloat16: `native` keeps their precision. The matmul's weights are exact in
float32, rounded once to bfloat16 where bfloat16 activations are multiplied in that (products.py).

Root mean square error relative to float64's result, 4096 x 4096, groups of 128; 4 bits themselves cost 0.10 of a normal weight:

    activations   int4 kernel   matmul   `native`   `reference.linear`
    bfloat16      0.0022        0.0023   0.0023     0.0023
    float32       0.0028        3e-7     3e-7       3e-7
    float16       0.0028        0.0002   0.0002     0.0003
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem
from .products import computed_in

GROUPS = (256, 128, 64, 32)  # columns that torch's kernel can have to a scale
COLUMNS = GROUPS[-1]  # a row is padded to a multiple of this
ROWS = 64  # W is padded to a multiple of this: torch's blocks of rows are then whole
CHUNK = 1 << 19  # weights dequantized at a time: a few MB, near the caches
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Tokens up to which torch's kernel is used: the crossover of the two paths, 4096 x 4096, 2 threads. With AVX-512 and bfloat16 instructions;
# with AVX2, and where nothing was measured.
CROSSOVER = {"AVX512": {torch.bfloat16: 128, torch.float32: 192, torch.float16: 192}, "AVX2": dict.fromkeys(DTYPES, 96)}


def crossover(dtype: torch.dtype) -> int:
    return CROSSOVER.get(torch.backends.cpu.get_cpu_capability(), CROSSOVER["AVX2"])[dtype]


class CpuWeight(NamedTuple):
    """W ~ (q - zeros) * scales, 4 bits. Rows and columns are padded with codes that meet the scale 0 or an x of 0."""

    words: Tensor  # uint8 [out padded to 64, in padded to 32 / 2], in torch's order, which differs between CPUs: never saved
    steps: Tensor  # bfloat16 [in / group, out padded, 2]: s and (8 - z) s, as torch's kernel reads them
    scales: Tensor  # float [out, groups]
    zeros: Tensor  # uint8 [out, groups]


class Order(NamedTuple):
    """Torch's order of nibbles: for every block of rows [in, rows / 2] bytes, whose low and high nibbles are these rows of the block."""

    rows: int
    low: slice
    high: slice

    def blocks(self, words: Tensor) -> Tensor:
        """[blocks, in, rows / 2]"""
        return words.view(-1, words.shape[1] * 2, self.rows // 2)

    def codes(self, blocks: Tensor, memory: Tensor | None = None) -> Tensor:
        """uint8 [in, rows of all blocks], in `memory` if given: enough bytes."""
        shape = blocks.shape[1], blocks.shape[0] * self.rows
        codes = torch.empty(shape, dtype=torch.uint8) if memory is None else memory[: shape[0] * shape[1]].view(shape)
        for i, block in enumerate(blocks):
            of_block = codes[:, i * self.rows : (i + 1) * self.rows]
            torch.bitwise_and(block, 15, out=of_block[:, self.low])
            torch.bitwise_right_shift(block, 4, out=of_block[:, self.high])
        return codes


@cache
def order() -> Order:
    """The order on this CPU, found by packing. Raises NotImplementedError if it is none that is known."""
    sample = (torch.arange(ROWS * COLUMNS) * 7919 >> 5).view(ROWS, COLUMNS) & 15
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(sample.int(), 1)
    for rows in (64, 32, 16, 8):
        for low, high in ((slice(0, rows // 2), slice(rows // 2, rows)), (slice(0, rows, 2), slice(1, rows, 2))):
            candidate = Order(rows, low, high)
            if torch.equal(candidate.codes(candidate.blocks(words)).T, sample):
                return candidate
    raise NotImplementedError(f"torch {torch.__version__} packs 4-bit weights in an order that is not known here")


def unsupported(problem: Problem) -> str | None:
    """Why no kernel for CPUs, this or `native`, can do `problem`, or None."""
    p = problem
    if p.device != "cpu":
        return f"the kernel runs on a CPU, not on {p.device}"
    if p.bits != 4:
        return f"the kernel reads 4 bits, not {p.bits}"
    if p.dtype not in DTYPES:
        return f"the kernel takes float32, bfloat16 and float16, not {str(p.dtype).removeprefix('torch.')}"
    return None


def supports(problem: Problem) -> str | None:
    """Why this path cannot do `problem`, or None."""
    if reason := unsupported(problem) or unsupported_groups(problem.k, problem.groups):
        return reason
    try:
        order()
    except NotImplementedError as error:
        return str(error)
    return None


def caution(problem: Problem) -> str | None:
    """What a user has to know of results, or None."""
    if problem.dtype == torch.bfloat16:
        return None
    name = str(problem.dtype).removeprefix("torch.")
    return (
        f"the model is {name}, but up to {crossover(problem.dtype)} tokens at a time are multiplied in bfloat16, which changes outputs by "
        f"0.3 %; AWQ_HF_NATIVE=1 compiles a kernel that computes in float32, AWQ_HF_KERNEL=reference is exact and slow"
    )


def unsupported_groups(columns: int, groups: int) -> str | None:
    """Why rows of `columns` in `groups` groups cannot be packed, or None."""
    if columns % groups:
        return f"{columns} columns are not divisible by {groups} groups"
    if groups > 1 and columns // groups % COLUMNS:
        return f"the kernel has groups of a multiple of {COLUMNS} columns, or one for the whole row, not of {columns // groups}"
    return None


def pack(q: Tensor, scales: Tensor, zeros: Tensor) -> CpuWeight:
    """Canonical uint8 codes q [out, in], scales and uint8 zeros [out, groups] -> CpuWeight, for a problem that `supports` accepts.

    scales and zeros are kept as they are. Raises ValueError for widths of groups that are refused.
    """
    (rows, columns), groups = q.shape, scales.shape[1]
    if reason := unsupported_groups(columns, groups):
        raise ValueError(reason)
    padded = rows + -rows % ROWS, columns + -columns % COLUMNS
    words = torch.empty(padded[0], padded[1] // 2, dtype=torch.uint8)
    step = max(ROWS, CHUNK // columns // ROWS * ROWS)
    for start in range(0, rows, step):  # torch takes codes as int32: 8 times their packed size
        codes = q[start : start + step]
        codes = torch.nn.functional.pad(codes, (0, -columns % COLUMNS, 0, -len(codes) % ROWS))
        words[start : start + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).view(len(codes), -1)
    width = padded[1] // groups
    group = next(group for group in GROUPS if width % group == 0)
    s = scales.to(torch.bfloat16).float()
    steps = torch.stack((s, (8 - zeros.float()) * s), -1).to(torch.bfloat16).transpose(0, 1)  # [groups, out, 2]
    steps = torch.nn.functional.pad(steps, (0, 0, 0, padded[0] - rows)).repeat_interleave(width // group, 0)
    return CpuWeight(words, steps.contiguous(), scales, zeros)


def unpack(weight: CpuWeight, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, scales and zeros of the canonical weight [out, columns]. Inverse of `pack`."""
    packed = order()
    q = torch.empty(weight.scales.shape[0], columns, dtype=torch.uint8)
    for rows, blocks in zip(q.split(packed.rows), packed.blocks(weight.words), strict=False):  # padding may be a block of its own
        rows.copy_(packed.codes(blocks[None]).T[: len(rows), :columns])
    return q, weight.scales, weight.zeros


def linear(x: Tensor, words: Tensor, steps: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias for a problem that `supports` accepts.

    x: [tokens, in], float32, bfloat16 or float16; words, steps, scales, zeros: as in `CpuWeight`; bias: [out], any float dtype.
    Returns [tokens, out] in x's dtype. The same bits every run; up to `crossover` tokens also whatever the number of threads.
    """
    x = torch.nn.functional.pad(x, (0, words.shape[1] * 2 - x.shape[1])) if x.shape[1] % COLUMNS else x
    if x.shape[0] <= crossover(x.dtype):
        group = words.shape[1] * 2 // steps.shape[0]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16).contiguous(), words, group, steps)
        if y.shape[1] != scales.shape[0]:  # a new tensor: one row of a padded one passes for contiguous
            y = y[:, : scales.shape[0]].clone(memory_format=torch.contiguous_format)
        y = y.to(x.dtype)
    else:
        y = _matmul(x, words, scales, zeros)
    return y if bias is None else y.add_(bias)


def _matmul(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """y = x W^T with W^T dequantized a few rows of W at a time."""
    packed, (rows, groups), columns = order(), scales.shape, x.shape[1]
    blocks = packed.blocks(words)
    dtype = computed_in(x.dtype, x.device)
    operand = x.to(dtype)
    y = x.new_empty(x.shape[0], rows)
    step = max(ROWS, CHUNK // columns // ROWS * ROWS)
    # allocated once: fresh pages cost more than what is written to them
    memory = [torch.empty(step * columns, dtype=of) for of in (torch.uint8, torch.float32, dtype)]
    for start in range(0, rows, step):
        codes = packed.codes(blocks[start // packed.rows : (start + step) // packed.rows], memory[0])
        width = min(step, rows - start)
        exact, rounded = (m[: columns * width] for m in memory[1:])
        weight = exact.view(groups, -1, width).copy_(codes.view(groups, -1, codes.shape[1])[..., :width])
        s, z = (t[start : start + step].T.float().contiguous() for t in (scales, zeros))  # [groups, width]
        # q s and z s are exact in float32, and so is their difference: 4 and 11 bits of scale make 15
        torch.addcmul((z * -s)[:, None], weight, s[:, None], out=weight)
        dense = exact if dtype == torch.float32 else rounded.copy_(exact)
        y[:, start : start + step] = operand @ dense.view(columns, width)
    return y
