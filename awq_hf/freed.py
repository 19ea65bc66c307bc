"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


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
