"""The clip search: never worse than the full range on any group, and what it must find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_hf.affine import Grid, choose_grid, fake_quantize
from awq_hf.spec import QuantSpec
from awq_hf.transforms.awq_clip import ClipOptions, diagonal_blocks, group_loss, search_clip

SPECS = [QuantSpec(4, 16), QuantSpec(2, 32), QuantSpec(3, -1), QuantSpec(4, 16, True), QuantSpec(2, -1, True)]


def statistic(n: int) -> Tensor:
    x = torch.randn(200, n) * torch.exp(torch.randn(n))
    return x.T @ x / 200


def loss_by_hand(weight: Tensor, grid: Grid, h: Tensor) -> Tensor:
    """d H_gg d^T, one group of one row at a time: float64 [out, groups]."""
    d = (fake_quantize(weight, grid) - weight).double()
    rows, groups = grid.scales.shape
    width = weight.shape[1] // groups
    part = [slice(g * width, (g + 1) * width) for g in range(groups)]
    return torch.stack([torch.stack([d[o, p] @ h[p, p].double() @ d[o, p] for p in part]) for o in range(rows)])


@pytest.mark.parametrize("spec", SPECS)
def test_no_group_is_worse_than_unclipped(spec: QuantSpec) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        weight, h = torch.randn(7, 96) ** 3, statistic(96)
        plain, found = choose_grid(weight, spec), search_clip(weight, h, spec, ClipOptions())
        ours, unclipped = loss_by_hand(weight, found, h), loss_by_hand(weight, plain, h)
        assert bool((ours <= unclipped * (1 + 1e-5)).all())
        assert ours.sum() < unclipped.sum()
        assert torch.equal(found.scales.half().float(), found.scales)
        assert bool((found.scales <= plain.scales).all()) and bool((found.scales >= 0.3 * plain.scales).all())


@pytest.mark.parametrize("spec", SPECS)
def test_group_loss_is_its_definition(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(5, 64), statistic(64)
    grid = choose_grid(weight, spec)
    loss = group_loss(weight, grid, diagonal_blocks(h, grid.scales.shape[1]))
    torch.testing.assert_close(loss.double(), loss_by_hand(weight, grid, h), rtol=1e-4, atol=1e-6)


def test_diagonal_blocks_are_the_groups_own_parts() -> None:
    h = torch.arange(36.0).view(6, 6)
    blocks = diagonal_blocks(h, 3)
    assert blocks.shape == (3, 2, 2)
    assert all(torch.equal(blocks[g], h[2 * g : 2 * g + 2, 2 * g : 2 * g + 2]) for g in range(3))


def test_a_weight_that_needs_no_clipping_keeps_its_range() -> None:
    weight = torch.arange(-7, 9).repeat(3, 2) / 4
    found = search_clip(weight, torch.eye(32), QuantSpec(4, 16), ClipOptions())
    assert torch.equal(found.scales, choose_grid(weight, QuantSpec(4, 16)).scales)
    assert torch.equal(fake_quantize(weight, found), weight)


@pytest.mark.parametrize(("outlier", "clipped_end"), [(6.0, "high"), (-6.0, "low")])
def test_an_outlier_nobody_reads_is_cut_off_at_its_end_only(outlier: float, clipped_end: str) -> None:
    torch.manual_seed(0)
    weight = torch.rand(1, 64) * 4 - 2
    weight[0, 10], weight[0, 11], weight[0, 12] = outlier, 2.0, -2.0
    h = torch.eye(64)
    h[10, 10] = 0
    grid = search_clip(weight, h, QuantSpec(3, -1), ClipOptions())
    low, high = (-grid.zero_points * grid.scales).item(), ((7 - grid.zero_points) * grid.scales).item()
    kept, cut = (low, high) if clipped_end == "high" else (-high, -low)
    assert cut < 0.75 * 6, "the outlier's end moved in ..."
    assert -kept / 2 > 1.1 * cut / 6, "... further than the end where every weight counts"


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_have_a_grid(symmetric: bool) -> None:
    weight = torch.zeros(3, 32)
    weight[:, 16:] = torch.linspace(-1, 1, 16)
    spec = QuantSpec(4, 16, symmetric)
    found = search_clip(weight, torch.eye(32), spec, ClipOptions())
    assert torch.equal(fake_quantize(weight, found)[:, :16], weight[:, :16])
    assert bool(torch.isfinite(found.scales).all())


def test_no_shrinks_is_no_clipping() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 32)
    found = search_clip(weight, statistic(32), QuantSpec(4, 16), ClipOptions(shrinks=(), adjustments=()))
    plain = choose_grid(weight, QuantSpec(4, 16))
    assert torch.equal(found.scales, plain.scales) and torch.equal(found.zero_points, plain.zero_points)
