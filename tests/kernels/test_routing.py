"""Sorting tokens by expert, and the weighted sum that undoes it, against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awq_hf.kernels.routing import combine, route


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_tokens_are_sorted_by_expert_and_keep_their_order(tokens: int, top_k: int, experts: int, seed: int) -> None:
    ids = torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    order, offsets = route(ids, experts)
    assert (order.dtype, offsets.dtype, tuple(offsets.shape)) == (torch.int64, torch.int32, (experts + 1,))
    flat = ids.flatten().tolist()
    expected = [[i for i, e in enumerate(flat) if e == expert] for expert in range(experts)]
    assert order.tolist() == [i for part in expected for i in part]
    assert offsets.tolist() == [sum(len(part) for part in expected[:e]) for e in range(experts + 1)]


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_come_back_to_their_tokens_weighted(dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    ids = torch.tensor([[2, 0], [0, 3], [2, 1], [3, 2]], dtype=ids_dtype)
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.125, 0.5]])
    x = torch.arange(12.0).view(4, 3).to(dtype)
    order, offsets = route(ids, 5)
    expert = torch.arange(5).repeat_interleave(offsets.diff())
    y = x[order // 2] * (1 + expert[:, None]).to(dtype)  # expert e multiplies by e + 1
    result = combine(y, order, weights)
    assert result.dtype == dtype
    assert torch.equal(result.float(), x.float() * (weights * (1 + ids)).sum(1)[:, None])
