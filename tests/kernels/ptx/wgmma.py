"""wgmma: products of warpgroups that run on while their threads go on (PTX ISA 8.8, 9.7.16). Here they are computed at once, and what
may not be touched until they are waited for is an error to touch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx import warps
from tests.kernels.ptx.memory import Violation
from tests.kernels.ptx.parse import Operand

if TYPE_CHECKING:
    from tests.kernels.ptx.decode import Decoder, Step, Threads, Values

Array = NDArray[Any]

GROUP = 128  # threads of a warpgroup
DESCRIPTOR = {"start": (0, 14), "leading": (16, 14), "stride": (32, 14), "base": (49, 3), "swizzle": (62, 2)}  # first bit and how many
ROW = {1: 128, 2: 64}  # swizzle -> bytes of a row, of which eight are one after the other


class Multiplication(NamedTuple):
    results: tuple[str, ...]
    reads: list[tuple[Array, Array]]  # bytes of shared memory, and a thread of each warp that reads them


class Multiplications:
    """Under way: their results are in no register until they are waited for, and can only be added to."""

    def __init__(self) -> None:
        self.results: dict[str, Array] = {}
        self.fenced: dict[str, Array] = {}  # registers at the last fence
        self.open: list[Multiplication] = []
        self.groups: list[list[Multiplication]] = []

    def register(self, threads: Threads, name: str) -> Array:
        """Of the matrix that is multiplied: fenced since it was written."""
        value = threads.registers.get(name)
        if value is None or self.fenced.get(name) is not value:
            raise Violation(f"wgmma reads {name}, which was not fenced since it was written")
        return value.view(np.uint32)

    def accumulator(self, threads: Threads, name: str) -> Array:
        return (self.results[name] if name in self.results else self.register(threads, name)).view(np.float32)

    def start(self, threads: Threads, results: dict[str, Array], reads: list[tuple[Array, Array]]) -> None:
        self.results |= results
        for name in results:
            threads.registers.pop(name, None)
        self.open.append(Multiplication(tuple(results), reads))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, threads: Threads, pending: int) -> None:
        finished = max(0, len(self.groups) - pending)
        done, self.groups = self.groups[:finished], self.groups[finished:]
        under_way = {name for group in (*self.groups, self.open) for one in group for name in one.results}
        for one in (one for group in done for one in group):
            for at, readers in one.reads:
                threads.shared.read_is_over(at, readers)
            for name in {*one.results} - under_way:
                if name in self.results:
                    threads.registers[name] = self.results.pop(name)


def _addresses(descriptor: int, rows: int) -> Array:
    """Of 16 columns of B, [rows, 2] pieces of 16 bytes: a row after the other in K, swizzled."""
    field = {name: descriptor >> first & (1 << bits) - 1 for name, (first, bits) in DESCRIPTOR.items()}
    known = sum(((1 << bits) - 1) << first for first, bits in DESCRIPTOR.values())
    if descriptor & ~known or field["base"] or field["swizzle"] not in ROW:
        raise Violation(f"the matrix descriptor {descriptor:#x} is not known")
    row, n = ROW[field["swizzle"]], np.arange(rows)
    linear = 16 * field["start"] + (n // 8 * 16 * field["stride"] + n % 8 * row)[:, None] + np.arange(0, 32, 16)
    return linear ^ ((linear >> 7) & (row // 16 - 1)) << 4


def multiply(decoder: Decoder, operands: list[Operand], mask: Values | None, columns: str, kind: str) -> Step:
    """wgmma.mma_async m64nNk16, A from registers: of each warp 16 rows, as mma.sync has them; B from shared memory, K-major."""
    decoder.expect(operands, 7)
    decoder.everybody(mask)
    if operands[4:] != ["1", "1", "0"] or decoder.function.threads % GROUP:
        raise decoder.unknown("signs, a transposed matrix, or a part of a warpgroup")
    count = int(columns)
    results, left = decoder.vector(operands[0], count // 2), decoder.vector(operands[1], 4)
    for name in (*results, *left):
        decoder.destination(name, "b32")
    descriptors, adds = decoder.source(operands[2], "u64"), decoder.source(operands[3], "pred")

    def right(threads: Threads, first: int) -> tuple[Array, tuple[Array, Array]]:
        """B of the warpgroup from a thread on: float32 [columns, 16], and what was read."""
        own = descriptors(threads)[first : first + GROUP]
        if (own != own[0]).any():
            raise Violation("a matrix descriptor that differs among the threads of a warpgroup")
        readers = np.arange(first, first + GROUP, 32)
        at = threads.shared.read_by_wgmma(_addresses(int(own[0]), count).ravel(), 16, readers)
        return warps.widened(threads.shared.data[at].view(np.uint16).reshape(count, 16), kind), (at, readers)

    def step(threads: Threads) -> None:
        state = threads.multiplications
        a = warps.left_matrices([state.register(threads, name) for name in left], kind)  # [warps, 16, 16]
        parts = [right(threads, first) for first in range(0, len(threads.everybody), GROUP)]
        b = np.repeat(np.stack([part for part, _ in parts]), GROUP // 32, 0)  # [warps, columns, 16]
        sums = warps.result_registers(a @ b.transpose(0, 2, 1))
        if adds(threads).all():
            sums = [state.accumulator(threads, name) + value for name, value in zip(results, sums, strict=True)]
        elif adds(threads).any():
            raise Violation("wgmma adds for some threads and not for others")
        state.start(threads, dict(zip(results, sums, strict=True)), [read for _, read in parts])

    return step


def fence(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 0)
    decoder.everybody(mask)

    def step(threads: Threads) -> None:
        threads.multiplications.fenced = dict(threads.registers)

    return step


def proxy_fence(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 0)
    decoder.everybody(mask)
    return lambda threads: threads.shared.fenced.fill(True)


def commit_group(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 0)
    decoder.everybody(mask)
    return lambda threads: threads.multiplications.commit()


def wait_group(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 1)
    decoder.everybody(mask)
    pending = int(str(operands[0]))
    return lambda threads: threads.multiplications.wait(threads, pending)


WGMMA: dict[str, Callable[..., Step]] = {
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k16\.f32\.(?P<kind>f16|bf16)\.(?P=kind)": multiply,
    r"wgmma\.fence\.sync\.aligned": fence,
    r"wgmma\.commit_group\.sync\.aligned": commit_group,
    r"wgmma\.wait_group\.sync\.aligned": wait_group,
    r"fence\.proxy\.async\.shared::cta": proxy_fence,
}
