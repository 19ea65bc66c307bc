"""Instructions decoded into Python functions, once a kernel: operands are looked up and checked, what is not known is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.arithmetic import OPERATIONS, TYPES, bits_of
from tests.kernels.ptx.handlers import HANDLERS
from tests.kernels.ptx.memory import Global, Violation
from tests.kernels.ptx.parse import Address, Function, Instruction, Operand, UnknownPtx
from tests.kernels.ptx.shared import SHARED_BASE, Shared
from tests.kernels.ptx.wgmma import WGMMA, Multiplications

Array = NDArray[Any]
Values = Callable[["Threads"], Array]
Step = Callable[["Threads"], "int | None"]  # gives the index of the instruction to go on at, or None for the next

# What a register holds where a predicate left it unwritten: a NaN in every format, and no address
POISON = {1: 0, 16: 0x7FFF, 32: 0x7FFF7FFF, 64: 0x7FFF7FFF7FFF7FFF}
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z")


class Threads:
    """Of one program: a register is an array of a value for each thread."""

    def __init__(self, count: int, memory: Global, shared_size: int, registers: dict[str, Array]) -> None:
        self.memory, self.shared, self.registers = memory, Shared(shared_size, count), registers
        self.multiplications = Multiplications()
        self.everybody = np.arange(count)

    def active(self, mask: Values | None) -> Array:
        return self.everybody if mask is None else np.flatnonzero(mask(self))

    def put(self, name: str, value: Array, mask: Array | None, bits: int) -> None:
        """Into a register, for the threads where mask holds."""
        if name == "_":
            return
        if mask is not None and not mask.all():
            before = self.registers.get(name)
            if before is None:
                before = np.full(len(self.everybody), POISON[bits], bool if bits == 1 else f"u{bits // 8}")
            value = np.where(mask, value.view(before.dtype), before)
        self.registers[name] = value


class Decoder:
    """constants: registers that hold what is the same for every program. parameters: the kernel's, by name."""

    def __init__(self, function: Function) -> None:
        self.function, self.now = function, function.instructions[0]
        self.constants: dict[str, Array] = {}

    def unknown(self, what: str) -> UnknownPtx:
        return UnknownPtx(f"line {self.now.line}: {what} in `{self.now.text}`")

    def constant(self, value: int, bits: int) -> str:
        name = f"{value}:{bits}"
        self.constants[name] = np.full(self.function.threads, value & (1 << bits) - 1, bool if bits == 1 else f"u{bits // 8}")
        return name

    def width(self, register: str, bits: int, exact: bool) -> int:
        """Of a register that is to hold `bits`, no fewer and, if exact, no more."""
        width = bits_of(self.function.registers[register])
        if width != bits and (exact or width < bits):
            raise self.unknown(f"{register} of {width} bits for {bits}")
        return width

    def source(self, operand: Operand, kind: str, exact: bool = True) -> Values:
        """What gives an operand's values as `kind`."""
        bits, dtype = bits_of(kind), np.dtype(TYPES[kind])
        if not isinstance(operand, str):
            raise self.unknown(f"the operand {operand}")
        narrow, name, low = False, operand, f"u{dtype.itemsize}"
        if operand in self.function.registers:
            narrow = self.width(operand, bits, exact) != bits
        elif re.fullmatch(r"-?\d+U?|0[xX][0-9a-fA-F]+U?", operand):
            name = self.constant(int(operand.rstrip("U"), 0), bits)
        elif re.fullmatch(r"0f[0-9a-fA-F]{8}", operand) and bits == 32:
            name = self.constant(int(operand[2:], 16), bits)
        elif operand == "global_smem":
            name = self.constant(SHARED_BASE, bits)
        elif not (operand in SPECIAL and bits == 32):
            raise self.unknown(f"the operand {operand}")

        def get(threads: Threads) -> Array:
            value = threads.registers.get(name)
            if value is None:
                raise Violation(f"{name} is read and was never written, or is a result that was not waited for")
            return value.view(f"u{value.itemsize}").astype(low).view(dtype) if narrow else value.view(dtype)

        return get

    def destination(self, operand: Operand, kind: str, exact: bool = True) -> tuple[str, int]:
        """A register's name and width; the name _ takes anything."""
        if operand == "_":
            return "_", bits_of(kind)
        if not isinstance(operand, str) or operand not in self.function.registers:
            raise self.unknown(f"the result {operand}")
        return operand, self.width(operand, bits_of(kind), exact)

    def decode(self, instruction: Instruction) -> Step:
        self.now, mask = instruction, None
        if instruction.predicate is not None:
            holds = self.source(instruction.predicate, "pred")
            mask = (lambda threads: ~holds(threads)) if instruction.negated else holds
        operands = list(instruction.operands)
        if (operation := OPERATIONS.get(instruction.name)) is not None:
            wider = instruction.name.startswith("cvt.")  # may be what it takes the low bits of
            return self.lanewise(operation.result, operation.operands, operation.compute, operands, mask, not wider)
        for pattern, handler in (HANDLERS | WGMMA).items():
            if (match := re.fullmatch(pattern, instruction.name)) is not None:
                return handler(self, operands, mask, **match.groupdict())
        raise self.unknown(f"the instruction {instruction.name}")

    def lanewise(
        self,
        result: str,
        kinds: Sequence[str],
        compute: Callable[..., Array],
        operands: list[Operand],
        mask: Values | None,
        exact: bool = True,
    ) -> Step:
        """The first operand is a function of the others, thread by thread."""
        self.expect(operands, len(kinds) + 1)
        to, bits = self.destination(operands[0], result)
        sources = [self.source(operand, kind, exact) for operand, kind in zip(operands[1:], kinds, strict=True)]

        def step(threads: Threads) -> None:
            value = compute(*[source(threads) for source in sources])
            if mask is None:
                threads.registers[to] = value
            else:
                threads.put(to, value, mask(threads), bits)

        return step

    def expect(self, operands: list[Operand], count: int) -> None:
        if len(operands) != count:
            raise self.unknown(f"{len(operands)} operands where {count} are known")

    def vector(self, operand: Operand, count: int) -> tuple[str, ...]:
        found = operand if isinstance(operand, tuple) else (operand,)
        if len(found) != count or not all(isinstance(one, str) for one in found):
            raise self.unknown(f"{operand} for {count} registers")
        return found  # type: ignore[return-value]

    def address(self, operand: Operand, space: str) -> Values:
        if not isinstance(operand, Address):
            raise self.unknown(f"the address {operand}")
        bits = 64 if space == "global" else 32
        base, offset = self.source(operand.base, f"u{bits}"), np.array(operand.offset % 2**bits, f"u{bits // 8}")
        return lambda threads: base(threads) + offset

    def everybody(self, mask: Values | None) -> None:
        if mask is not None:
            raise self.unknown("a predicate before what all threads take part in")
