"""Runs a kernel's PTX for sm_80 or sm_90, program by program (CTA by CTA), with all threads of one in lockstep.

Branches have to be uniform, as the compiler's are, which come from loops and conditions of whole programs. Instructions under a predicate
are carried out for the threads where it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.decode import Decoder, Threads
from tests.kernels.ptx.memory import Global, Violation
from tests.kernels.ptx.parse import parse


class Kernel:
    """shared: bytes of shared memory that a launch gives each program."""

    def __init__(self, text: str, shared: int = 0) -> None:
        self.function, self.shared = parse(text), shared
        decoder = Decoder(self.function)
        self.steps = [decoder.decode(instruction) for instruction in self.function.instructions]
        self.constants = {**decoder.constants, "%tid.x": np.arange(self.function.threads, dtype=np.uint32)}

    def launch(self, grid: Sequence[int], memory: Global, arguments: Sequence[int]) -> None:
        """arguments: of the kernel's parameters in order, addresses in `memory` for pointers."""
        registers = self.constants | {
            name: self._constant(value, kind) for (name, kind), value in zip(self.function.parameters.items(), arguments, strict=True)
        }
        x, y, z = (*grid, 1, 1)[:3]
        for memory.program, (k, j, i) in enumerate(product(range(z), range(y), range(x))):
            place = {f"%ctaid.{axis}": self._constant(value, "u32") for axis, value in (("x", i), ("y", j), ("z", k))}
            self._run(Threads(self.function.threads, memory, self.shared, registers | place), (i, j, k))

    def _constant(self, value: int, kind: str) -> NDArray[Any]:
        bits = int(kind[1:])
        return np.full(self.function.threads, value & (1 << bits) - 1, f"u{bits // 8}")

    def _run(self, threads: Threads, program: tuple[int, ...]) -> None:
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self.steps):
                try:
                    target = self.steps[at](threads)
                except Violation as error:
                    instruction = self.function.instructions[at]
                    place = f"{self.function.name}, program {program}, line {instruction.line}"
                    raise Violation(f"{place}, `{instruction.text}`: {error}") from None
                at = at + 1 if target is None else target
