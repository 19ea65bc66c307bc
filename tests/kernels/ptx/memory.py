"""Global memory that refuses what a GPU would let pass: accesses out of a tensor, reads of what was never written, races."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

WINDOW = 40  # bits of an address inside a window, in whose middle a tensor lies: what misses one does not hit another
NOBODY = -1


class Violation(Exception):
    """What a program may not do."""


def bytes_of(starts: Array, size: int) -> Array:
    """[lanes] -> [lanes, size]: the indices of the bytes that each lane accesses."""
    return starts[:, None] + np.arange(size)


def check_alignment(addresses: Array, size: int) -> None:
    if (addresses % size).any():
        raise Violation(f"an address that is not a multiple of {size}: {int(addresses[addresses % size != 0][0]):#x}")


class Buffer:
    """A tensor's memory. known: which bytes hold something, all unless given."""

    def __init__(self, name: str, data: Array, address: int, known: Array | None) -> None:
        self.name, self.data, self.address, self.known = name, data, address, known
        self.writer = np.full(len(data), NOBODY, np.int32)  # program that wrote a byte


class Global:
    """The buffers that a launch was given pointers to. Each byte is written once in a launch and not read in it after that."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.program = 0

    def add(self, name: str, data: Array, alignment: int, known: Array | None = None) -> int:
        """data: uint8 [bytes], shared with its owner. alignment: the address modulo 256. Returns its address here."""
        middle = (2 * len(self.buffers) + 3) << (WINDOW - 1)  # the first window is nobody's
        self.buffers.append(Buffer(name, data, middle + alignment, known))
        return self.buffers[-1].address

    def _at(self, addresses: Array, size: int) -> tuple[Buffer, Array]:
        check_alignment(addresses, size)
        index = int(addresses[0] >> WINDOW) - 1
        if not 0 <= index < len(self.buffers):
            raise Violation(f"{int(addresses[0]):#x} is in no tensor")
        buffer = self.buffers[index]
        starts = addresses.astype(np.int64) - buffer.address
        if (wrong := (starts < 0) | (starts > len(buffer.data) - size)).any():
            raise Violation(f"{size} bytes at {int(starts[wrong][0])} of {buffer.name}, which has {len(buffer.data)}")
        return buffer, bytes_of(starts, size)

    def read(self, addresses: Array, size: int) -> Array:
        """uint64 [lanes] -> uint8 [lanes, size]."""
        if not len(addresses):
            return np.empty((0, size), np.uint8)
        buffer, at = self._at(addresses, size)
        if buffer.known is not None and not buffer.known[at].all():
            raise Violation(f"a read of {buffer.name} where nothing was written")
        if (buffer.writer[at] != NOBODY).any():
            raise Violation(f"a read of {buffer.name} where the same launch writes")
        return buffer.data[at]

    def write(self, addresses: Array, values: Array) -> None:
        if not len(addresses):
            return
        buffer, at = self._at(addresses, values.shape[1])
        if (buffer.writer[at] != NOBODY).any() or len(np.unique(addresses)) < len(addresses):
            raise Violation(f"{buffer.name} is written twice in a launch")
        buffer.data[at] = values
        buffer.writer[at] = self.program
        if buffer.known is not None:
            buffer.known[at] = True
