"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from awq_hf import freed

PROGRAM = """
import ctypes, torch
from pathlib import Path
from awq_hf.freed import give_back

def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))

torch.empty(1 << 22).fill_(1)  # 16 MB, mapped and freed: from now on glibc keeps pieces of this size in its heap
pieces, pins = zip(*[(torch.ones(1 << 20), torch.ones(1 << 14)) for _ in range(64)])  # what stays keeps the heap from shrinking
del pieces
before = resident()
give_back()
print(before - resident())
"""


def test_does_nothing_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.freed.ctypes.CDLL", lambda _name: object())
    freed._malloc_trim.cache_clear()
    try:
        assert freed._malloc_trim() is None
        freed.give_back()
    finally:
        freed._malloc_trim.cache_clear()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_gives_back_what_glibc_kept() -> None:
    kilobytes = int(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout)
    assert kilobytes > 100_000
