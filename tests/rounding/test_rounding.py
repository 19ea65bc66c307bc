"""Rounding: GPTQ against its textbook form, descent against brute force, and what holds for every method of the table."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from awq_hf.affine import MIN_SCALE, Grid, choose_grid, dequantize, quantize
from awq_hf.rounding import ROUNDERS
from awq_hf.rounding.descent import codes_by_descent, round_by_descent
from awq_hf.rounding.gptq import RoundingFailed, damping, inverse_factor, round_by_gptq
from awq_hf.spec import QuantSpec


def correlated(n: int, seed: int = 0) -> Tensor:
    """E[x x^T] of inputs with a few strong directions and channels of very different size: float32 [n, n]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator) + 2 * torch.randn(4 * n, 3, generator=generator) @ torch.randn(3, n, generator=generator)
    x = x * torch.exp(torch.randn(n, generator=generator))
    return x.T @ x / len(x)


def damped(h: Tensor, shrinkage: float = 0.0) -> Tensor:
    return h + torch.diag(damping(h, shrinkage))


def error(codes: Tensor, grid: Grid, weight: Tensor, h: Tensor, shrinkage: float = 0.0) -> Tensor:
    """d H d^T of every row on the damped statistic: float64 [out]."""
    d = dequantize(codes, grid).double() - weight.double()
    return ((d @ damped(h, shrinkage).double()) * d).sum(1)


def textbook_gptq(weight: Tensor, grid: Grid, h: Tensor) -> Tensor:
    """Optimal brain quantization, one column at a time in float64, with the inverse updated by elimination."""
    w, inverse = weight.double().clone(), torch.linalg.inv(damped(h).double())
    scales, zero_points = (t.double() for t in grid.expand(weight.shape[1]))
    codes = torch.empty_like(w)
    for j in damped(h).diagonal().argsort(descending=True, stable=True).tolist():
        codes[:, j] = ((w[:, j] / scales[:, j]).round() + zero_points[:, j]).clamp(0, grid.spec.max_code)
        err = (w[:, j] - (codes[:, j] - zero_points[:, j]) * scales[:, j]) / inverse[j, j]
        w = w - err[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("method", ROUNDERS)
@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(3, -1), QuantSpec(2, 32, True), QuantSpec(8, 16)])
def test_every_method_gives_storable_codes_and_leaves_its_arguments_alone(method: str, spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(5, 96), correlated(96)
    grid = choose_grid(weight, spec)
    before = [t.clone() for t in (weight, h, grid.scales, grid.zero_points)]
    codes, found = ROUNDERS[method](weight, grid, h, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, h, grid.scales, grid.zero_points), strict=True))
    assert codes.shape == weight.shape and torch.equal(codes, codes.round())
    assert codes.min() >= 0 and codes.max() <= spec.max_code
    assert torch.equal(found.scales.half().float(), found.scales) and bool((found.scales >= MIN_SCALE).all())
    assert torch.equal(found.zero_points, grid.zero_points) and found.spec == spec


@pytest.mark.parametrize("method", ROUNDERS)
def test_every_method_keeps_a_weight_that_is_on_the_grid(method: str) -> None:
    weight = torch.arange(-7, 9).repeat(4, 2) * torch.tensor([[1.0], [0.5], [8.0], [2.0**-9]])
    grid = choose_grid(weight, QuantSpec(4, 16))
    codes, found = ROUNDERS[method](weight, grid, correlated(32), 0.0)
    assert torch.equal(dequantize(codes, found), weight)


@pytest.mark.parametrize("method", ROUNDERS)
@pytest.mark.parametrize("weight_value", [0.0, 1e-40])
def test_every_method_keeps_zero_groups_zero(method: str, weight_value: float) -> None:
    weight = torch.cat([torch.full((3, 16), weight_value), torch.linspace(-1, 1, 48).view(3, 16)], 1)
    h = torch.eye(32)
    codes, found = ROUNDERS[method](weight, choose_grid(weight, QuantSpec(4, 16)), h, 0.0)
    assert torch.equal(dequantize(codes, found)[:, :16], torch.zeros(3, 16))


@pytest.mark.parametrize("method", ROUNDERS)
def test_every_method_survives_channels_that_are_always_zero(method: str) -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(6, 48), correlated(48)
    h[5], h[:, 5] = 0, 0
    h[40], h[:, 40] = 0, 0
    codes, found = ROUNDERS[method](weight, choose_grid(weight, QuantSpec(4, 16)), h, 0.0)
    assert bool(torch.isfinite(dequantize(codes, found)).all())
    zero_codes, _ = ROUNDERS[method](weight, choose_grid(weight, QuantSpec(4, 16)), torch.zeros(48, 48), 0.0)
    assert bool(((zero_codes - quantize(weight, choose_grid(weight, QuantSpec(4, 16)))).abs() <= 1).all())


def test_gptq_is_nearest_when_channels_are_uncorrelated() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 150)
    grid = choose_grid(weight, QuantSpec(3, -1))
    codes, _ = round_by_gptq(weight, grid, torch.diag(torch.rand(150) + 0.1))
    assert torch.equal(codes, quantize(weight, grid))


@pytest.mark.parametrize(("columns", "spec"), [(16, QuantSpec(4, 16)), (150, QuantSpec(3, -1)), (288, QuantSpec(4, 32))])
def test_gptq_is_its_textbook_form_across_blocks(columns: int, spec: QuantSpec) -> None:
    torch.manual_seed(1)
    weight, h = torch.randn(12, columns), correlated(columns)
    grid = choose_grid(weight, spec)
    codes, _ = round_by_gptq(weight, grid, h)
    expected = textbook_gptq(weight, grid, h)
    # A tie that float32 breaks otherwise may change the rest of its row: nearly all rows must be equal, every row as good.
    assert (codes.double() == expected).all(1).sum() >= 10
    torch.testing.assert_close(error(codes, grid, weight, h).sum(), error(expected.float(), grid, weight, h).sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(3, 32), QuantSpec(2, -1), QuantSpec(4, 64, True)])
def test_gptq_is_better_than_nearest_and_descent_never_worse_than_gptq(spec: QuantSpec) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        weight, h = torch.randn(8, 192), correlated(192, seed)
        grid = choose_grid(weight, spec)
        nearest, gptq, descent = (error(*ROUNDERS[m](weight, grid, h, 0.0), weight, h) for m in ("nearest", "gptq", "descent"))
        assert gptq.sum() < 0.9 * nearest.sum()
        assert bool((descent <= gptq * (1 + 1e-4)).all()), "row by row"
        assert descent.sum() < gptq.sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_descent_ends_where_no_single_code_or_scale_can_be_improved(symmetric: bool) -> None:
    best_of_all = 0
    every_code = torch.tensor(list(itertools.product(range(4), repeat=3))).float()  # [64, 3]
    for seed in range(40):
        torch.manual_seed(seed)
        weight, h = torch.randn(1, 3), correlated(3, seed)
        codes, grid = round_by_descent(weight, choose_grid(weight, QuantSpec(2, -1, symmetric)), h, sweeps=50)
        found = error(codes, grid, weight, h).item()
        everywhere = error(every_code, Grid(grid.scales.expand(64, 1), grid.zero_points.expand(64, 1), grid.spec), weight.expand(64, 3), h)
        neighbors = (every_code != codes).sum(1) <= 1  # the codes themselves and all that differ in one place
        assert found <= everywhere[neighbors].min().item() * (1 + 1e-4) + 1e-9
        best_of_all += found <= everywhere.min().item() * (1 + 1e-4) + 1e-9
        for factor in (1 - 2.0**-8, 1 - 2.0**-10, 1 + 2.0**-10, 1 + 2.0**-8):
            other = Grid((grid.scales * factor).half().float(), grid.zero_points, grid.spec)
            assert found <= error(codes, other, weight, h).item() * (1 + 1e-4) + 1e-9
    assert best_of_all >= 20, "a coordinate-wise minimum is often the best of all codes"


def test_more_sweeps_never_hurt() -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(8, 160), correlated(160)
    grid = choose_grid(weight, QuantSpec(2, 16))
    errors = [error(*round_by_descent(weight, grid, h, sweeps=sweeps), weight, h) for sweeps in range(6)]
    assert torch.equal(errors[0], error(*round_by_gptq(weight, grid, h), weight, h))
    assert all(bool((b <= a * (1 + 1e-4)).all()) for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_codes_on_a_grid_that_stays_are_the_best_that_each_can_be_alone(shrinkage: float) -> None:
    """Steps may be negative, as those of GGUF's symmetric types are, and zero points need be no integers."""
    torch.manual_seed(0)
    weight, h = torch.randn(6, 32), correlated(32)
    grid = choose_grid(weight, QuantSpec(3, 16))
    sign = torch.tensor([[1.0, -1.0]])
    grid = Grid(grid.scales * sign, torch.where(sign > 0, grid.zero_points, 7 - grid.zero_points) + 0.3, grid.spec)
    codes = codes_by_descent(weight, grid, h, shrinkage, sweeps=50)
    assert torch.equal(codes, codes.round()) and codes.min() == 0 and codes.max() == 7
    best = error(codes, grid, weight, h, shrinkage)
    assert (best < error(quantize(weight, grid), grid, weight, h, shrinkage)).all()
    for column in range(32):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (other[:, column] + step).clamp(0, 7)
            assert (error(other, grid, weight, h, shrinkage) >= best * (1 - 1e-5)).all()


def test_shrinkage_is_a_heavier_diagonal() -> None:
    h = correlated(24)
    shrunk = 0.7 * h + 0.3 * torch.diag(h.diagonal())
    floor = 0.7 * 0.01 * h.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(0.7 * damped(h, 0.3), shrunk + floor)


def test_without_correlations_nothing_is_left_but_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(6, 64), correlated(64)
    grid = choose_grid(weight, QuantSpec(4, 16))
    nearest = quantize(weight, grid)
    assert torch.equal(round_by_gptq(weight, grid, h, 1 - 1e-7)[0], nearest)
    assert not torch.equal(round_by_gptq(weight, grid, h, 0.3)[0], nearest)


def test_inverse_factor_is_the_upper_factor_of_the_inverse() -> None:
    h, order = correlated(20), torch.randperm(20)
    u = inverse_factor(h, damping(h), order).double()
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.T @ u @ damped(h)[order][:, order].double(), torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-3)


def test_damping_adds_a_share_of_the_mean_and_one_where_a_channel_is_dead() -> None:
    h = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(damped(h), torch.tensor([[4.02, 1.0, 0.0], [1.0, 2.02, 0.0], [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("method", ["gptq", "descent"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -5.0])
def test_an_unusable_statistic_is_an_error_of_its_own(method: str, bad: float) -> None:
    h = torch.eye(16)
    h[3, 3] = bad
    with pytest.raises(RoundingFailed, match="not positive definite"):
        ROUNDERS[method](torch.randn(2, 16), choose_grid(torch.randn(2, 16), QuantSpec(4, 16)), h, 0.0)
