"""One thread for loops of small operations.

The column loops of rounding make thousands of operations on a few rows. Spread over threads, each ends in a barrier, and on a
machine that is busy with something else a barrier lasts as long as the scheduler lets a thread wait: seconds became minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALL = 1 << 20  # elements of a block below which one thread is as fast as several


@contextmanager
def one_thread_if_small(block: Tensor) -> Iterator[None]:
    """Run the enclosed operations on one CPU thread when `block`, what they work on, is small."""
    threads = torch.get_num_threads()
    if threads == 1 or block.device.type != "cpu" or block.numel() >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
