"""The affine grid: exact cases by hand, properties over arbitrary float32 weights, and the weights that have no grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awq_hf.affine import (
    MAX_SCALE,
    MIN_SCALE,
    Grid,
    choose_grid,
    dequantize,
    dequantize_weight,
    fake_quantize,
    quantize,
    to_quantized_weight,
    to_storable,
)
from awq_hf.spec import BITS, QuantSpec

ROWS, COLUMNS, GROUP = 2, 32, 16
specs = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from([GROUP, -1]), st.booleans())
# 60000 keeps the scale of 2 bits (the whole range over 3) below the largest float16
finite = st.floats(-60000, 60000, width=32)
weights = st.lists(finite, min_size=ROWS * COLUMNS, max_size=ROWS * COLUMNS).map(lambda v: torch.tensor(v).view(ROWS, COLUMNS))


@given(weights, specs)
def test_codes_zero_points_and_scales_are_storable(weight: Tensor, spec: QuantSpec) -> None:
    grid = choose_grid(weight, spec)
    codes = quantize(weight, grid)
    for integers in (codes, grid.zero_points):
        assert torch.equal(integers, integers.round()) and integers.min() >= 0 and integers.max() <= spec.max_code
    assert torch.equal(grid.scales.half().float(), grid.scales) and bool((grid.scales >= MIN_SCALE).all())
    assert not spec.symmetric or bool((grid.zero_points == spec.middle_code).all())


@given(weights, specs)
def test_error_is_at_most_half_a_step_inside_the_range_and_the_distance_to_it_outside(weight: Tensor, spec: QuantSpec) -> None:
    grid = choose_grid(weight, spec)
    scales, zero_points = (t.double() for t in grid.expand(COLUMNS))
    error = (fake_quantize(weight, grid).double() - weight.double()).abs()
    beyond = torch.maximum(-zero_points * scales - weight, weight - (spec.max_code - zero_points) * scales)
    assert bool((error <= torch.maximum(scales / 2, beyond) * (1 + 1e-6)).all())
    # The range itself misses a weight by half a step and what float16 takes from a normal scale, no more.
    bound = (0.5 + spec.max_code * 2.0**-11) * scales * (1 + 1e-6)
    assert bool((error <= bound)[scales >= 2.0**-14].all())


@given(st.data(), specs)
def test_quantize_inverts_dequantize_on_grid_points(data: st.DataObject, spec: QuantSpec) -> None:
    groups = 1 if spec.group_size == -1 else COLUMNS // GROUP
    integers = lambda n: data.draw(st.lists(st.integers(0, spec.max_code), min_size=n, max_size=n))  # noqa: E731
    scales = data.draw(st.lists(st.floats(2.0**-24, MAX_SCALE, width=16), min_size=ROWS * groups, max_size=ROWS * groups))
    grid = Grid(torch.tensor(scales).view(ROWS, groups), torch.tensor(integers(ROWS * groups)).float().view(ROWS, groups), spec)
    codes = torch.tensor(integers(ROWS * COLUMNS)).float().view(ROWS, COLUMNS)
    weight = dequantize(codes, grid)
    s, z = (t.double() for t in grid.expand(COLUMNS))
    assert torch.equal(weight.double(), (codes.double() - z) * s), "a dequantized weight is exact in float32"
    assert torch.equal(quantize(weight, grid), codes)
    stored = to_quantized_weight(codes, grid)
    assert torch.equal(dequantize_weight(stored), weight)


def test_a_weight_on_the_grid_is_kept_exactly() -> None:
    weight = torch.arange(-7, 9).flip(0).repeat(3, 2) * torch.tensor([[0.5], [2.0], [2.0**-10]])
    grid = choose_grid(weight, QuantSpec(4, 16))
    assert torch.equal(grid.scales, torch.tensor([[0.5], [2.0], [2.0**-10]]).expand(3, 2))
    assert bool((grid.zero_points == 7).all()) and torch.equal(fake_quantize(weight, grid), weight)


def test_symmetric_range_reaches_half_a_step_beyond_the_last_code() -> None:
    weight = torch.tensor([[7.5, -7.5, 7.0, 1.0, 0.0, -7.0] + [0.0] * 10]) / 8
    grid = choose_grid(weight, QuantSpec(4, 16, symmetric=True))
    assert grid.scales.item() == 1 / 8 and grid.zero_points.item() == 8
    assert quantize(weight, grid)[0, :6].tolist() == [15, 0, 15, 9, 8, 1]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-40, 2.0**-26])
def test_groups_of_zeros_and_denormals_become_zero(value: float, symmetric: bool) -> None:
    weight = torch.full((1, 16), value)
    grid = choose_grid(weight, QuantSpec(4, 16, symmetric))
    assert grid.scales.item() == MIN_SCALE
    assert torch.equal(fake_quantize(weight, grid), torch.zeros(1, 16))


@pytest.mark.parametrize(("low", "high", "zero_point"), [(3.0, 15.0, 0), (-15.0, -3.0, 15), (15.0, 15.0, 0), (-15.0, -15.0, 15)])
def test_one_signed_and_constant_groups_include_zero_in_their_range(low: float, high: float, zero_point: int) -> None:
    weight = torch.linspace(low, high, 13)[None].round().repeat(1, 2)[:, :16] / 4
    grid = choose_grid(weight, QuantSpec(4, 16))
    assert (grid.scales.item(), grid.zero_points.item()) == (0.25, zero_point)
    assert torch.equal(fake_quantize(weight, grid), weight)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -1e7])
def test_weights_that_have_no_scale_are_refused(bad: float, symmetric: bool) -> None:
    weight = torch.ones(2, 32)
    weight[1, 20] = bad
    with pytest.raises(ValueError, match=r"does not fit float16 \(at most 65504\).*not finite.*modules_to_not_convert"):
        choose_grid(weight, QuantSpec(4, 16, symmetric))


def test_largest_scale_is_accepted() -> None:
    assert to_storable(torch.tensor([MAX_SCALE, 1e-30])).tolist() == [MAX_SCALE, MIN_SCALE]
    with pytest.raises(ValueError, match=r"6.55e\+04|65504"):
        to_storable(torch.tensor([MAX_SCALE + 1]))


def test_odd_group_counts_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="in_features 40 is not divisible by group_size 16"):
        choose_grid(torch.ones(2, 40), QuantSpec(4, 16))


def test_shrinking_moves_each_end_of_the_range_alone() -> None:
    weight = torch.tensor([[-8.0, 22.0] + [1.0] * 14])
    spec = QuantSpec(4, 16)
    assert choose_grid(weight, spec).scales.item() == 2
    assert choose_grid(weight, spec, low=0.5, high=0.5).scales.item() == 1
    both = choose_grid(weight, spec, torch.full((1, 1), 1.0), torch.full((1, 1), 0.5))  # -8 .. 11
    assert both.scales.half().item() == torch.tensor(19 / 15).half().item()
    assert choose_grid(weight, QuantSpec(4, 16, True), high=15 / 44).scales.item() == 1


def test_grid_of_some_rows_and_columns_is_the_part_of_the_grid() -> None:
    torch.manual_seed(0)
    grid = choose_grid(torch.randn(5, 48), QuantSpec(3, 16))
    assert torch.equal(grid.rows(slice(1, 3)).scales, grid.scales[1:3])
    assert torch.equal(grid.columns(torch.tensor([2, 0])).zero_points, grid.zero_points[:, [2, 0]])


def test_dequantized_weight_is_rounded_once_to_the_wanted_dtype() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 48)
    grid = choose_grid(weight, QuantSpec(8, 16))
    stored = to_quantized_weight(quantize(weight, grid), grid)
    assert (stored.q.dtype, stored.scales.dtype, stored.zero_points.dtype) == (torch.uint8, torch.float16, torch.uint8)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize_weight(stored, dtype), fake_quantize(weight, grid).to(dtype))


def test_dequantizing_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(21, 64)
    spec = QuantSpec(4, 32)
    grid = choose_grid(weight, spec)
    stored = to_quantized_weight(quantize(weight, grid), grid)
    monkeypatch.setattr("awq_hf.affine.PIECE", 4 * 64)  # 5 pieces of 4 rows and one of 1
    assert torch.equal(dequantize_weight(stored), fake_quantize(weight, grid))
