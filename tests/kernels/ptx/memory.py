"""Global and shared memory that refuse what a GPU would let pass: accesses out of bounds, reads of what was never written, races."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

WINDOW = 40  # bits of an address inside a window, in whose middle a tensor lies: what misses one does not hit another
SHARED_BASE = 1024  # aligned as swizzles need it, and no 0
NOBODY, SEVERAL = -1, -2
WARP = 32


class Violation(Exception):
    """What a program may not do."""


def _bytes(starts: Array, size: int) -> Array:
    """[lanes] -> [lanes, size]: the indices of the bytes that each lane accesses."""
    return starts[:, None] + np.arange(size)


def _check_alignment(addresses: Array, size: int) -> None:
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
        _check_alignment(addresses, size)
        index = int(addresses[0] >> WINDOW) - 1
        if not 0 <= index < len(self.buffers):
            raise Violation(f"{int(addresses[0]):#x} is in no tensor")
        buffer = self.buffers[index]
        starts = addresses.astype(np.int64) - buffer.address
        if (wrong := (starts < 0) | (starts > len(buffer.data) - size)).any():
            raise Violation(f"{size} bytes at {int(starts[wrong][0])} of {buffer.name}, which has {len(buffer.data)}")
        return buffer, _bytes(starts, size)

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


class Shared:
    """Of a program. Between barriers no thread may access what another writes; a barrier of a warp orders the threads of that warp only.

    A byte on its way by cp.async belongs to nobody until its thread has waited for it, which counts as that thread's write.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.data, self.known, self.in_flight = np.zeros(size, np.uint8), np.zeros(size, bool), np.zeros(size, bool)
        self.accesses = [Accesses(size, np.arange(threads) // WARP, "warp"), Accesses(size, np.arange(threads), "thread")]
        self.open: list[tuple[Array, Array, Array]] = []  # copies: bytes, values, threads
        self.groups: list[list[tuple[Array, Array, Array]]] = []

    def _at(self, addresses: Array, size: int) -> Array:
        _check_alignment(addresses, size)
        starts = addresses.astype(np.int64) - SHARED_BASE
        if (wrong := (starts < 0) | (starts > len(self.data) - size)).any():
            raise Violation(f"{size} bytes at {int(starts[wrong][0])} of shared memory, which has {len(self.data)}")
        at = _bytes(starts, size)
        if self.in_flight[at].any():
            raise Violation("an access to shared memory that a cp.async is still on its way to")
        return at

    def read(self, addresses: Array, size: int, threads: Array) -> Array:
        at = self._at(addresses, size)
        if not self.known[at].all():
            raise Violation("a read of shared memory where nothing was written")
        for accesses in self.accesses:
            accesses.read(at, threads)
        return self.data[at]

    def write(self, addresses: Array, values: Array, threads: Array) -> None:
        at = self._at(addresses, values.shape[1])
        for accesses in self.accesses:
            accesses.write(at, threads)
        self.data[at] = values
        self.known[at] = True
        if not np.array_equal(self.data[at], values):
            raise Violation("lanes write different values to the same place in shared memory")

    def copy(self, addresses: Array, values: Array, threads: Array) -> None:
        """cp.async: what is overwritten may not be in use from now on."""
        at = self._at(addresses, values.shape[1])
        for accesses in self.accesses:
            accesses.write(at, threads)
        if len(np.unique(addresses)) < len(addresses):
            raise Violation("two cp.async to the same place in shared memory")
        self.in_flight[at] = True
        self.open.append((at, values, threads))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Until no more than that many of the last groups are on their way."""
        finished = max(0, len(self.groups) - pending)
        done, self.groups = self.groups[:finished], self.groups[finished:]
        for at, values, threads in (copy for group in done for copy in group):
            self.in_flight[at], self.known[at], self.data[at] = False, True, values
            for accesses in self.accesses:
                accesses.write(at, threads)

    def barrier(self) -> None:
        for accesses in self.accesses:
            accesses.forget()

    def warp_barrier(self) -> None:
        self.accesses[1].forget()


class Accesses:
    """Who wrote and who read each byte since the last barrier."""

    def __init__(self, size: int, party: Array, kind: str) -> None:
        self.party, self.kind = party.astype(np.int16), kind  # of each thread
        self.writer, self.reader = np.full(size, NOBODY, np.int16), np.full(size, NOBODY, np.int16)

    def forget(self) -> None:
        self.writer.fill(NOBODY)
        self.reader.fill(NOBODY)

    def _check(self, what: str, before: Array, party: Array) -> None:
        if (wrong := (before != NOBODY) & (before != party)).any():
            raise Violation(f"a {self.kind} {what} shared memory since the last barrier: {self._names(before, party, wrong)}")

    def _names(self, before: Array, party: Array, wrong: Array) -> str:
        other = int(before[wrong][0])
        return f"{self.kind} {int(np.broadcast_to(party, wrong.shape)[wrong][0])} after {'several' if other == SEVERAL else other}"

    def read(self, at: Array, threads: Array) -> None:
        party = self.party[threads][:, None]
        self._check("reads what another wrote to", self.writer[at], party)
        before = self.reader[at]
        self.reader[at] = np.where((before == NOBODY) | (before == party), party, SEVERAL)
        if (others := self.reader[at] != party).any():  # lanes of this instruction that read the same
            self.reader[at[others]] = SEVERAL

    def write(self, at: Array, threads: Array) -> None:
        party = self.party[threads][:, None]
        self._check("writes what another read from", self.reader[at], party)
        self._check("writes what another wrote to", self.writer[at], party)
        self.writer[at] = np.broadcast_to(party, at.shape)
