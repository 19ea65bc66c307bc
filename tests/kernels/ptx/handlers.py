"""Instructions that are more than a function of a thread's own registers: memory, barriers, branches, and what warps do together.

A handler takes the decoder, the operands, the predicate's values or None, and the parts of the instruction's name; it gives a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx import warps
from tests.kernels.ptx.arithmetic import bits_of
from tests.kernels.ptx.memory import Violation
from tests.kernels.ptx.parse import Address, Operand

if TYPE_CHECKING:
    from tests.kernels.ptx.decode import Decoder, Step, Threads, Values

Array = NDArray[Any]


def move(decoder: Decoder, operands: list[Operand], mask: Values | None, kind: str) -> Step:
    """mov, which also packs narrower registers into one, the first lowest, and takes one apart."""
    decoder.expect(operands, 2)
    to, source = operands
    if isinstance(to, tuple):
        part = bits_of(kind) // len(to)
        names, whole = [decoder.destination(name, f"b{part}") for name in to], decoder.source(source, kind)

        def unpack(threads: Threads) -> None:
            parts = whole(threads).view(f"u{part // 8}").reshape(-1, len(names))
            for (name, width), values in zip(names, parts.T, strict=True):
                threads.put(name, values.copy(), mask and mask(threads), width)

        return unpack
    if isinstance(source, tuple):
        part = bits_of(kind) // len(source)
        pack = lambda *parts: np.stack(parts, -1).view(f"u{bits_of(kind) // 8}")[:, 0]  # noqa: E731
        return decoder.lanewise(kind, [f"b{part}"] * len(source), pack, [to, *source], mask)
    return decoder.lanewise(kind, [kind], lambda value: value, operands, mask)


def load_parameter(decoder: Decoder, operands: list[Operand], mask: Values | None, kind: str) -> Step:
    decoder.expect(operands, 2)
    decoder.everybody(mask)
    to, source = operands
    if not isinstance(source, Address) or source.offset or decoder.function.parameters.get(source.base) != f"u{bits_of(kind)}":
        raise decoder.unknown(f"the parameter {source}")
    name = decoder.destination(to, kind)[0]

    def step(threads: Threads) -> None:
        threads.registers[name] = threads.registers[source.base]

    return step


def load(
    decoder: Decoder, operands: list[Operand], mask: Values | None, space: str, count: str | None, kind: str, policy: str = ""
) -> Step:
    """ld of a vector's elements, each into a register that is as wide or wider: zeros fill it up."""
    decoder.expect(operands, 3 if policy else 2)
    bits, vector = bits_of(kind), decoder.vector(operands[0], int(count or 1))
    names = [decoder.destination(name, kind, exact=False) for name in vector]
    address, size = decoder.address(operands[1], space), bits // 8 * len(names)

    def step(threads: Threads) -> None:
        active = threads.active(mask)
        where = address(threads)[active]
        found = threads.memory.read(where, size) if space == "global" else threads.shared.read(where, size, active)
        elements = found.view(f"u{bits // 8}")
        for (name, width), values in zip(names, elements.T, strict=True):
            full = np.zeros(len(threads.everybody), f"u{width // 8}")
            full[active] = values
            threads.put(name, full, mask and mask(threads), width)

    return step


def store(decoder: Decoder, operands: list[Operand], mask: Values | None, space: str, count: str | None, kind: str) -> Step:
    decoder.expect(operands, 2)
    address = decoder.address(operands[0], space)
    sources = [decoder.source(name, kind, exact=False) for name in decoder.vector(operands[1], int(count or 1))]

    def step(threads: Threads) -> None:
        active = threads.active(mask)
        values = np.stack([source(threads)[active] for source in sources], -1).view(np.uint8)
        if space == "global":
            threads.memory.write(address(threads)[active], values)
        else:
            threads.shared.write(address(threads)[active], values, active)

    return step


def copy_async(decoder: Decoder, operands: list[Operand], mask: Values | None, level: str) -> Step:
    """cp.async of as many bytes as the source has, which are read now at the earliest; zeros for the rest."""
    decoder.expect(operands, 4)
    decoder.everybody(mask)
    to, source, size = decoder.address(operands[0], "shared"), decoder.address(operands[1], "global"), int(str(operands[2]), 0)
    length = decoder.source(operands[3], "u32")
    if size not in ((16,) if level == "cg" else (4, 8, 16)):
        raise decoder.unknown(f"{size} bytes")

    def step(threads: Threads) -> None:
        lengths = length(threads)
        some = lengths == size
        if (lengths[~some] != 0).any():
            raise Violation(f"cp.async of a part of {size} bytes: {int(lengths[~some].max())}")
        values = np.zeros((len(some), size), np.uint8)
        values[some] = threads.memory.read(source(threads)[some], size)
        threads.shared.copy(to(threads), values, threads.everybody)

    return step


def commit_group(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 0)
    decoder.everybody(mask)
    return lambda threads: threads.shared.commit()


def wait_group(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 1)
    decoder.everybody(mask)
    pending = int(str(operands[0]))
    return lambda threads: threads.shared.wait(pending)


def barrier(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.everybody(mask)
    if operands != ["0"]:
        raise decoder.unknown("the barrier")
    return lambda threads: threads.shared.barrier()


def warp_barrier(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.everybody(mask)
    if operands != ["-1"]:
        raise decoder.unknown("the members")
    return lambda threads: threads.shared.warp_barrier()


def _all_members(threads: Threads, members: Values) -> None:
    if (members(threads) != 0xFFFFFFFF).any():
        raise Violation("threads of a warp that do not take part")


def shuffle(decoder: Decoder, operands: list[Operand], mask: Values | None, mode: str) -> Step:
    decoder.expect(operands, 5)
    decoder.everybody(mask)
    if operands[3] != "31":
        raise decoder.unknown("parts of a warp")
    name = decoder.destination(operands[0], "b32")[0]
    values, lane, members = (decoder.source(operands[index], "u32") for index in (1, 2, 4))

    def step(threads: Threads) -> None:
        _all_members(threads, members)
        threads.registers[name] = warps.shuffle(values(threads), mode, lane(threads))

    return step


def warp_sum(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 3)
    decoder.everybody(mask)
    name = decoder.destination(operands[0], "b32")[0]
    values, members = decoder.source(operands[1], "u32"), decoder.source(operands[2], "u32")

    def step(threads: Threads) -> None:
        _all_members(threads, members)
        threads.registers[name] = warps.sum_of_warp(values(threads))

    return step


def load_matrix(decoder: Decoder, operands: list[Operand], mask: Values | None, count: str, transposed: str | None) -> Step:
    decoder.expect(operands, 2)
    decoder.everybody(mask)
    names = [decoder.destination(name, "b32")[0] for name in decoder.vector(operands[0], int(count))]
    address, rows = decoder.address(operands[1], "shared"), warps.row_threads(decoder.function.threads, len(names)).ravel()

    def step(threads: Threads) -> None:
        found = threads.shared.read(address(threads)[rows], 16, rows)
        threads.registers.update(zip(names, warps.load_matrices(found, len(names), transposed is not None), strict=True))

    return step


def store_matrix(decoder: Decoder, operands: list[Operand], mask: Values | None, count: str, transposed: str | None) -> Step:
    decoder.expect(operands, 2)
    decoder.everybody(mask)
    sources = [decoder.source(name, "b32") for name in decoder.vector(operands[1], int(count))]
    address, rows = decoder.address(operands[0], "shared"), warps.row_threads(decoder.function.threads, len(sources)).ravel()

    def step(threads: Threads) -> None:
        values = warps.store_matrices([source(threads) for source in sources], transposed is not None)
        threads.shared.write(address(threads)[rows], values, rows)

    return step


def multiply(decoder: Decoder, operands: list[Operand], mask: Values | None, kind: str) -> Step:
    decoder.expect(operands, 4)
    decoder.everybody(mask)
    names = [decoder.destination(name, "f32")[0] for name in decoder.vector(operands[0], 4)]
    a, b, c = ([decoder.source(name, "u32") for name in decoder.vector(operands[at], count)] for at, count in ((1, 4), (2, 2), (3, 4)))

    def step(threads: Threads) -> None:
        left, right, total = ([get(threads) for get in part] for part in (a, b, c))
        threads.registers.update(zip(names, warps.multiply(left, right, total, kind), strict=True))

    return step


def policy(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    """A hint to caches has no meaning here, only a register."""
    decoder.expect(operands, 2)
    return decoder.lanewise("b64", ["b64"], lambda value: value, [operands[0], "1"], mask)


def branch(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 1)
    if operands[0] not in decoder.function.labels:
        raise decoder.unknown("the label")
    target = decoder.function.labels[str(operands[0])]

    def step(threads: Threads) -> int | None:
        taken = np.ones(1, bool) if mask is None else mask(threads)
        if taken.any() and not taken.all():
            raise Violation("a branch that some threads take and others do not")
        return target if taken.all() else None

    return step


def leave(decoder: Decoder, operands: list[Operand], mask: Values | None) -> Step:
    decoder.expect(operands, 0)
    decoder.everybody(mask)
    return lambda threads: len(decoder.function.instructions)


_VECTOR, _BITS = r"(?:\.v(?P<count>[24]))?", r"\.(?P<kind>b8|b16|b32|b64)"
_CTA = r"(?:::cta)?"  # which shared memory is without it as well
HANDLERS: dict[str, Callable[..., Step]] = {
    r"mov\.(?P<kind>pred|[bu](16|32|64))": move,
    r"ld\.param\.(?P<kind>b32|b64)": load_parameter,
    rf"ld\.(?P<space>global){_VECTOR}{_BITS}": load,
    rf"ld\.(?P<space>global)\.L1::evict_first(?P<policy>\.L2::cache_hint){_VECTOR}{_BITS}": load,
    rf"ld\.(?P<space>shared){_CTA}{_VECTOR}{_BITS}": load,
    rf"st\.(?P<space>global){_VECTOR}{_BITS}": store,
    rf"st\.(?P<space>shared){_CTA}{_VECTOR}{_BITS}": store,
    rf"cp\.async\.(?P<level>ca|cg)\.shared{_CTA}\.global": copy_async,
    r"cp\.async\.commit_group": commit_group,
    r"cp\.async\.wait_group": wait_group,
    r"bar\.sync": barrier,
    r"bar\.warp\.sync": warp_barrier,
    r"shfl\.sync\.(?P<mode>bfly|idx)\.b32": shuffle,
    r"redux\.sync\.add\.s32": warp_sum,
    rf"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<transposed>\.trans)?\.shared{_CTA}\.b16": load_matrix,
    rf"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<transposed>\.trans)?\.shared{_CTA}\.b16": store_matrix,
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<kind>f16|bf16)\.(?P=kind)\.f32": multiply,
    r"createpolicy\.fractional\.L2::evict_first\.b64": policy,
    r"bra(\.uni)?": branch,
    r"ret": leave,
}
