"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq_hf import freed
from awq_hf.freed import drop_file_pages

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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_pages_of_a_file_are_dropped_and_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1 << 21), "b": torch.ones(1 << 10)}
    save_file(tensors, tmp_path / "m.safetensors")
    mapped = load_file(tmp_path / "m.safetensors")
    assert torch.equal(mapped["a"], tensors["a"])  # reads it

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    before = resident()
    drop_file_pages(mapped["a"])
    assert before - resident() > 15_000  # of 16,384 kB
    assert torch.equal(mapped["a"], tensors["a"]) and torch.equal(mapped["b"], tensors["b"])


def test_memory_that_is_no_files_is_left_alone() -> None:
    tensor = torch.ones(1 << 20)
    drop_file_pages(tensor)
    drop_file_pages(torch.empty(0))
    drop_file_pages(torch.empty(4, device="meta"))
    assert bool((tensor == 1).all())
