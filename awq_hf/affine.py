"""Affine quantization on a grid of groups: q = clamp(round(w / s) + z, 0, 2^bits - 1), w ~ (q - z) * s.

All arithmetic is float32. Scales are rounded to float16, the dtype they are stored in, *before* integers are
chosen; (q - z) * s is then exact in float32 (8 + 11 bits), so every reader that keeps float32 sees the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from awq_hf.spec import QuantizedWeight, QuantSpec
from awq_hf.wording import option

MIN_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros or denormals still has a defined scale
MAX_SCALE = 65504.0  # the largest float16
PIECE = 1 << 24  # weights that are dequantized together


class Codes(Protocol):
    """What rounding has to know of how codes are stored: they run from 0 to max_code."""

    @property
    def max_code(self) -> int: ...


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight whose integers are not chosen yet.

    scales: float32 [out, groups], every value representable in float16; zero_points: float32 [out, groups], integers where
    spec is a QuantSpec.
    """

    scales: Tensor
    zero_points: Tensor
    spec: Codes

    def expand(self, in_features: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points for every weight, float32 [out, in]."""
        width = in_features // self.scales.shape[1]
        return self.scales.repeat_interleave(width, 1), self.zero_points.repeat_interleave(width, 1)

    def columns(self, index: Tensor) -> Grid:
        return Grid(self.scales[:, index], self.zero_points[:, index], self.spec)

    def rows(self, rows: slice) -> Grid:
        return Grid(self.scales[rows], self.zero_points[rows], self.spec)


def to_storable(scales: Tensor) -> Tensor:
    """Round positive scales to the nearest value that float16 holds, still as float32. Too large a scale raises ValueError."""
    if not bool((scales <= MAX_SCALE).all()):
        raise ValueError(
            f"a scale of {scales.max().item():.3g} does not fit float16 (at most {MAX_SCALE:.0f}), or a weight is not finite; "
            f"leave this layer in float ({option('modules_to_not_convert')})"
        )
    return scales.to(torch.float16).to(torch.float32).clamp(min=MIN_SCALE)


def choose_grid(weight: Tensor, spec: QuantSpec, low: float | Tensor = 1.0, high: float | Tensor = 1.0) -> Grid:
    """The grid that spans each group's range, its minimum shrunk by `low` and its maximum by `high` (1.0: unshrunk).

    weight: float32 [out, in]; low, high: numbers or float32 [out, groups]. Ranges always include zero, so that a
    group whose weights all have one sign is represented; symmetric grids use the larger magnitude and `high`.
    """
    out_features, in_features = weight.shape
    grouped = weight.view(out_features, -1, spec.group_width(in_features))  # [out, groups, width]
    minimum, maximum = grouped.aminmax(dim=-1)  # [out, groups]
    minimum, maximum = minimum.clamp(max=0) * low, maximum.clamp(min=0)
    if spec.symmetric:
        # Codes run from -2^(b-1) to 2^(b-1) - 1. A magnitude half a step beyond the last code is off by half a step, on either side.
        reach = torch.maximum(maximum, minimum.abs()) * high
        scales = to_storable(reach / (spec.middle_code - 0.5))
        return Grid(scales, torch.full_like(scales, spec.middle_code), spec)
    maximum = maximum * high
    scales = to_storable((maximum - minimum) / spec.max_code)
    return Grid(scales, (-minimum / scales).round().clamp(0, spec.max_code), spec)


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Integer codes of `weight` [out, in] on `grid`, rounded to nearest; float32 [out, in] holding integers."""
    out_features, in_features = weight.shape
    grouped = weight.view(out_features, grid.scales.shape[1], -1)
    codes = (grouped / grid.scales[..., None]).round_().add_(grid.zero_points[..., None]).clamp_(0, grid.spec.max_code)
    return codes.view(out_features, in_features)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """(codes - zero_points) * scales: float32 [out, in]. Inverse of `quantize` on grid points."""
    out_features, in_features = codes.shape
    grouped = codes.view(out_features, grid.scales.shape[1], -1)
    return ((grouped - grid.zero_points[..., None]) * grid.scales[..., None]).view(out_features, in_features)


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Quantize to nearest and dequantize again: float32 [out, in]."""
    return dequantize(quantize(weight, grid), grid)


def to_quantized_weight(codes: Tensor, grid: Grid) -> QuantizedWeight:
    """Freeze codes and grid in their stored dtypes. Nothing is rounded here: scales are representable by construction."""
    assert isinstance(grid.spec, QuantSpec)
    return QuantizedWeight(
        q=codes.to(torch.uint8),
        scales=grid.scales.to(torch.float16),
        zero_points=grid.zero_points.to(torch.uint8),
        spec=grid.spec,
    )


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that a QuantizedWeight stands for, exact in float32 and then rounded once to `dtype`: [out, in].

    Some rows at a time, as the float32 values and what it takes to compute them are six times a float16 result.
    """
    result = torch.empty(weight.shape, dtype=dtype, device=weight.q.device)
    rows = max(1, PIECE // weight.shape[1])
    parts = (part.split(rows) for part in (result, weight.q, weight.scales, weight.zero_points))
    for out, q, scales, zero_points in zip(*parts, strict=True):
        out.copy_(dequantize(q.to(torch.float32), Grid(scales.to(torch.float32), zero_points.to(torch.float32), weight.spec)))
    return result
