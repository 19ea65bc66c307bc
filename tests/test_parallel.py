"""Parallel work: results in order, whatever the number of threads, and torch left as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save

import awq_hf
from awq_hf.parallel import ROWS, by_rows, in_parallel, one_thread_each, row_pieces, workers


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_pieces_keep_their_order_and_run_on_one_torch_thread_each(threads: int) -> None:
    def work(i: int) -> tuple[int, int, bool, str]:
        return i, torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name

    with one_thread_each():
        assert workers() == threads
        results = in_parallel(work, range(20))
        assert [(i, n, grad) for i, n, grad, _ in results] == [(i, 1, False) for i in range(20)]
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads and workers() == 1 and torch.is_grad_enabled()


def test_an_error_passes_through(threads: int) -> None:
    def fails(i: int) -> int:
        if i == 3:
            raise ZeroDivisionError
        return i

    with pytest.raises(ZeroDivisionError), one_thread_each():
        in_parallel(fails, range(9))
    assert torch.get_num_threads() == threads


def test_inside_another_only_the_outer_one_counts(threads: int) -> None:
    with one_thread_each():
        with one_thread_each():
            assert workers() == threads
        assert workers() == threads and in_parallel(lambda i: i, [1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1, 3 * ROWS - 1])
def test_rows_are_cut_without_gaps_and_put_together_again(rows: int, threads: int) -> None:
    matrix = torch.arange(rows * 2).view(rows, 2)
    assert torch.equal(torch.cat([matrix[piece] for piece in row_pieces(matrix)]), matrix)
    with one_thread_each():
        doubled, one = by_rows(lambda piece: (2 * matrix[piece], matrix[piece, 0]), matrix)
        assert torch.equal(doubled, 2 * matrix) and torch.equal(one, matrix[:, 0])
        assert torch.equal(by_rows(lambda piece: matrix[piece] + 1, matrix), matrix + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_threads(
    dtype: torch.dtype, tiny_llama: Callable[..., Any], small_config: Callable[..., Any]
) -> None:
    """Wide enough for several pieces of rows, and for torch itself to spread its operations over threads."""

    def quantized(threads: int) -> bytes:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            model = tiny_llama(dtype, hidden_size=256, intermediate_size=ROWS + 64, num_hidden_layers=1)
            return save({k: v.contiguous() for k, v in awq_hf.quantize(model, small_config(batch_size=2)).state_dict().items()})
        finally:
            torch.set_num_threads(before)

    assert quantized(1) == quantized(2) == quantized(4)
