"""Tokens sorted by expert, and back: what a grouped product of experts needs around it.

Nothing here waits for the device or depends on the order of threads, so that it can be captured in a CUDA graph and repeats bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Router's choice [tokens, top_k], int -> order, int64 [tokens * top_k], and offsets, int32 [experts + 1].

    order[i] // top_k is the token in place i after sorting, order[i] % top_k which of its experts; the places of expert e are
    offsets[e] to offsets[e + 1]. Tokens of an expert keep their order.
    """
    ids, order = expert_ids.reshape(-1).sort(stable=True)
    limits = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(ids, limits, out_int32=True)


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Sorted results y [tokens * top_k, out], the order from `route`, weights [tokens, top_k] -> sums [tokens, out]. Inverse of sorting."""
    tokens, top_k = weights.shape
    unsorted = torch.empty_like(y).index_copy(0, order, y)
    return torch.bmm(weights[:, None].to(y.dtype), unsorted.view(tokens, top_k, -1))[:, 0]
