"""Work on CPU threads whose result does not depend on how many threads there are.

torch spreads a single operation over its threads and then sums in an order that depends on their number. Here every operation
runs on one thread, and threads take whole pieces of the work (rows of a matrix, batches), cut alike on every machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

ROWS = 512  # of a matrix in one piece: some megabytes of work, and never chosen by the number of threads

_local = threading.local()  # .pool: of the thread that opened `one_thread_each`


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within, torch computes every operation on one CPU thread, and `in_parallel` uses as many threads as torch had."""
    threads = torch.get_num_threads()
    if threads == 1 or workers() > 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, "awq_hf", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            _local.pool, _local.workers = pool, threads
            yield
    finally:
        _local.pool, _local.workers = None, 1
        torch.set_num_threads(threads)


def workers() -> int:
    """How many pieces `in_parallel` computes at a time."""
    return getattr(_local, "workers", 1)


def in_parallel(function: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """[function(piece) for piece in pieces], without gradients, on the threads of `one_thread_each`."""
    with torch.no_grad():
        if workers() == 1 or len(pieces) < 2:
            return [function(piece) for piece in pieces]
    return list(_local.pool.map(torch.no_grad()(function), pieces))


def row_pieces(matrix: torch.Tensor, rows: int = ROWS) -> list[slice]:
    """The rows of a matrix [rows, ...], cut into pieces; on a GPU one piece, since it has threads of its own."""
    count = matrix.shape[0]
    if matrix.device.type != "cpu":
        return [slice(0, count)]
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def by_rows(function: Callable[[slice], Any], matrix: torch.Tensor) -> Any:
    """Concatenate function(rows) over the pieces of `matrix`. function returns a tensor, or a tuple of tensors, [rows, ...]."""
    parts = in_parallel(function, row_pieces(matrix))
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    return torch.cat(parts)
