"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


def give_back() -> None:
    """Have glibc return what was freed: every thread has a heap of its own, and keeps pieces of up to 32 MB for its next request."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def drop_file_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is a part of a mapped file and will not be read again (Linux; elsewhere nothing).

    The mapping lives as long as any tensor of the file does, and its pages count as the process's. They come back from the file if they
    are read after all. Memory that is not a file's is left alone.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.numel():
        return
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, stop = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop and _is_file(start, stop):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _is_file(start: int, stop: int) -> bool:
    """Whether one mapping of a file holds all these addresses."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        low, high = (int(address, 16) for address in addresses.split("-"))
        if low <= start and stop <= high:
            return int(inode) != 0
    return False
