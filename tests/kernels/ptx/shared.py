"""Shared memory that refuses what a GPU would let pass: reads of what was never written or has not arrived, races."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.memory import NOBODY, Violation, bytes_of, check_alignment

Array = NDArray[Any]

SHARED_BASE = 1024  # aligned as swizzles need it, and no 0
SEVERAL = -2
WARP = 32


class Copy(NamedTuple):
    """A cp.async."""

    at: Array  # bytes
    values: Array
    threads: Array


class Shared:
    """Of a program. Between barriers no thread may access what another writes; a barrier of a warp orders the threads of that warp only.

    A byte on its way by cp.async belongs to nobody until its thread has waited for it, which counts as that thread's write. One that
    wgmma reads may not be written until that has been waited for; and it has to be fenced after it was written, as wgmma reads by way of
    another proxy.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.data = np.zeros(size, np.uint8)
        self.known, self.in_flight, self.in_use, self.fenced = (np.zeros(size, bool) for _ in range(4))
        self.accesses = [Accesses(size, np.arange(threads) // WARP, "warp"), Accesses(size, np.arange(threads), "thread")]
        self.open: list[Copy] = []
        self.groups: list[list[Copy]] = []

    def _at(self, addresses: Array, size: int) -> Array:
        check_alignment(addresses, size)
        starts = addresses.astype(np.int64) - SHARED_BASE
        if (wrong := (starts < 0) | (starts > len(self.data) - size)).any():
            raise Violation(f"{size} bytes at {int(starts[wrong][0])} of shared memory, which has {len(self.data)}")
        at = bytes_of(starts, size)
        if self.in_flight[at].any():
            raise Violation("an access to shared memory that a cp.async is still on its way to")
        return at

    def _to(self, addresses: Array, size: int, threads: Array) -> Array:
        at = self._at(addresses, size)
        if self.in_use[at].any():
            raise Violation("a write to shared memory that a wgmma may still read")
        for accesses in self.accesses:
            accesses.write(at, threads)
        return at

    def read(self, addresses: Array, size: int, threads: Array) -> Array:
        at = self._at(addresses, size)
        if not self.known[at].all():
            raise Violation("a read of shared memory where nothing was written")
        for accesses in self.accesses:
            accesses.read(at, threads)
        return self.data[at]

    def write(self, addresses: Array, values: Array, threads: Array) -> None:
        at = self._to(addresses, values.shape[1], threads)
        self.data[at], self.known[at], self.fenced[at] = values, True, False
        if not np.array_equal(self.data[at], values):
            raise Violation("lanes write different values to the same place in shared memory")

    def copy(self, addresses: Array, values: Array, threads: Array) -> None:
        """cp.async: what is overwritten may not be in use from now on."""
        at = self._to(addresses, values.shape[1], threads)
        if len(np.unique(addresses)) < len(addresses):
            raise Violation("two cp.async to the same place in shared memory")
        self.in_flight[at] = True
        self.open.append(Copy(at, values, threads))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Until no more than that many of the last groups are on their way."""
        finished = max(0, len(self.groups) - pending)
        done, self.groups = self.groups[:finished], self.groups[finished:]
        for at, values, threads in (copy for group in done for copy in group):
            self.data[at], self.known[at], self.fenced[at], self.in_flight[at] = values, True, False, False
            for accesses in self.accesses:
                accesses.write(at, threads)

    def read_by_wgmma(self, addresses: Array, size: int, threads: Array) -> Array:
        """What `threads`, one of each warp, read together. The caller says when it is over."""
        at = self._at(addresses, size)
        if not self.fenced[at].all():
            raise Violation("wgmma reads what was not fenced since it was written")
        self.in_use[at] = True
        for thread in threads:
            self.read(addresses, size, np.full(len(addresses), thread))
        return at

    def read_is_over(self, at: Array, threads: Array) -> None:
        self.in_use[at] = False
        for thread in threads:
            for accesses in self.accesses:
                accesses.read(at, np.full(len(at), thread))

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
