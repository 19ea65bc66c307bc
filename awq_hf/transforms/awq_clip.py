"""Clipping: a group's range is shrunk where the finer step that this buys is worth the weights it cuts off.

The loss of a group is its part of the layer's output error, d H_gg d^T, with H_gg the group's own block of H
(AWQ's code minimizes the same on a sample of tokens). The two ends of the range are searched separately; symmetric
grids have one. The unshrunk range is a candidate and is kept where nothing beats it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awq_hf.affine import Grid, choose_grid, fake_quantize
from awq_hf.parallel import by_rows
from awq_hf.spec import QuantSpec


@dataclass(frozen=True)
class ClipOptions:
    """shrinks: factors tried for both ends of a group's range; adjustments: factors then tried for each end alone."""

    shrinks: tuple[float, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)
    adjustments: tuple[float, ...] = (0.7, 0.8, 0.9, 1.1, 1.25, 1.4)


def search_clip(weight: Tensor, H: Tensor, spec: QuantSpec, options: ClipOptions) -> Grid:  # noqa: N803
    """The grid whose groups have the least loss each. weight: float32 [out, in]; H: float32 [in, in]."""
    blocks = diagonal_blocks(H, weight.shape[1] // spec.group_width(weight.shape[1]))
    scales, zero_points = by_rows(lambda rows: _search(weight[rows], blocks, spec, options), weight)
    return Grid(scales, zero_points, spec)


def _search(weight: Tensor, blocks: Tensor, spec: QuantSpec, options: ClipOptions) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups] for some rows. blocks: of H, [groups, width, width]."""
    low = high = weight.new_ones(weight.shape[0], len(blocks))
    best = group_loss(weight, choose_grid(weight, spec), blocks)
    stages = [(True, True, options.shrinks)]
    if not spec.symmetric:  # from there each end alone, inwards and outwards: 2 n + m candidates find what n^2 would
        stages += [(True, False, options.adjustments), (False, True, options.adjustments)]
    for move_low, move_high, factors in stages:
        start_low, start_high = low, high
        for factor in factors:
            trial_low = (start_low * factor).clamp(max=1) if move_low else start_low
            trial_high = (start_high * factor).clamp(max=1) if move_high else start_high
            loss = group_loss(weight, choose_grid(weight, spec, trial_low, trial_high), blocks)
            better = loss < best
            best = torch.where(better, loss, best)
            low, high = torch.where(better, trial_low, low), torch.where(better, trial_high, high)
    grid = choose_grid(weight, spec, low, high)
    return grid.scales, grid.zero_points


def diagonal_blocks(H: Tensor, groups: int) -> Tensor:  # noqa: N803
    """The blocks of H on its diagonal: [in, in] -> [groups, width, width]."""
    width = H.shape[0] // groups
    return H.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def group_loss(weight: Tensor, grid: Grid, blocks: Tensor) -> Tensor:
    """d H_gg d^T of each group when rounded to nearest on `grid`: [out, groups]."""
    out_features = weight.shape[0]
    d = (fake_quantize(weight, grid) - weight).view(out_features, blocks.shape[0], -1).transpose(0, 1)  # [groups, out, width]
    return (torch.bmm(d, blocks) * d).sum(-1).T
