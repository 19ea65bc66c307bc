"""Moments: an output error read from them equals the one computed from the activations, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_hf.calibration.data import Batch
from awq_hf.calibration.stats import Moments, output_energy, output_error

IN, OUT = 9, 4


def integers(*shape: int, seed: int = 0, reach: int = 4) -> Tensor:
    """Small integers: every sum of products below 2^24 is exact in float32."""
    return torch.randint(-reach, reach + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def direct_error(weight: Tensor, changed: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    return ((x.double() @ changed.double().T - x0.double() @ weight.double().T) ** 2).mean(0)


def test_moments_are_their_definitions_exactly() -> None:
    x, x0 = integers(32, IN), integers(32, IN, seed=1)
    found = Moments()
    found.add(x, x0, want_ee=True)
    e = x - x0
    assert found.tokens == 32 and found.P is not None and found.R is not None
    assert torch.equal(found.H, x.T @ x / 32) and torch.equal(found.P, e.T @ x / 32) and torch.equal(found.R, e.T @ e / 32)


@pytest.mark.parametrize("split", [[64], [1, 63], [20, 20, 24], [1] * 64])
def test_output_error_equals_the_mean_squared_error_however_tokens_are_split(split: list[int]) -> None:
    x, x0, weight, changed = integers(64, IN), integers(64, IN, seed=1), integers(OUT, IN, seed=2), integers(OUT, IN, seed=3)
    found = Moments()
    for part, part0 in zip(x.split(split), x0.split(split), strict=True):
        found.add(part, part0, want_ee=True)
    assert torch.equal(output_error(weight, changed, found).double(), direct_error(weight, changed, x, x0))


def test_an_output_that_makes_up_for_the_residual_stream_is_judged_by_the_sum() -> None:
    x, x0, weight, changed = integers(64, IN), integers(64, IN, seed=1), integers(OUT, IN, seed=2), integers(OUT, IN, seed=3)
    d, found = integers(64, OUT, seed=4), Moments()
    for part, part0, lacks in zip(x.split(20), x0.split(20), d.split(20), strict=True):
        found.add(part, part0, want_ee=True, d=lacks)
    assert found.C is not None and found.K is not None and found.S is not None
    assert torch.equal(found.C, d.T @ x / 64) and torch.equal(found.K, d.T @ (x - x0) / 64) and torch.equal(found.S, d.square().mean(0))
    expected = ((x.double() @ changed.double().T - x0.double() @ weight.double().T - d.double()) ** 2).mean(0)
    assert torch.equal(output_error(weight, changed, found).double(), expected)
    partial = Moments()
    partial.add(x, x0, d=d)
    assert partial.K is None and partial.S is None
    missing = output_error(weight, changed, found) - output_error(weight, changed, partial)
    assert torch.equal(missing, output_error(weight, 2 * changed, found) - output_error(weight, 2 * changed, partial)), "a constant"


def test_output_error_without_input_error() -> None:
    x, weight, changed = integers(64, IN), integers(OUT, IN, seed=2), integers(OUT, IN, seed=3)
    found = Moments()
    found.add(x)
    assert found.P is None and found.R is None
    assert torch.equal(output_error(weight, changed, found).double(), direct_error(weight, changed, x, x))
    assert torch.equal(output_error(weight, weight, found), torch.zeros(OUT))
    assert torch.equal(output_energy(weight, found).double(), direct_error(weight, 0 * weight, x, x))


def test_without_the_error_moment_only_a_constant_is_missing() -> None:
    x, x0, weight = integers(64, IN), integers(64, IN, seed=1), integers(OUT, IN, seed=2)
    whole, partial = Moments(), Moments()
    whole.add(x, x0, want_ee=True)
    partial.add(x, x0)
    assert partial.R is None
    missing = [
        output_error(weight, changed, whole) - output_error(weight, changed, partial)
        for changed in (weight, integers(OUT, IN, seed=3), integers(OUT, IN, seed=4))
    ]
    assert torch.equal(missing[0], missing[1]) and torch.equal(missing[0], missing[2]) and bool((missing[0] > 0).all())


@pytest.mark.parametrize("lengths", [[8, 8, 8, 8], [8, 1, 5, 2]])
def test_padding_does_not_count(lengths: list[int]) -> None:
    x, x0 = integers(4, 8, IN), integers(4, 8, IN, seed=1)
    weight, changed = integers(OUT, IN, seed=2), integers(OUT, IN, seed=3)
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    real = mask.bool()
    found = Moments()
    for rows in (slice(0, 3), slice(3, 4)):
        part = mask[rows]
        batch = Batch(torch.zeros_like(part), None if bool(part.all()) else part, held_out=False)
        found.add(batch.real_tokens(x[rows].reshape(-1, IN)), batch.real_tokens(x0[rows].reshape(-1, IN)), want_ee=True)
    assert found.tokens == sum(lengths)
    expected = direct_error(weight, changed, x[real], x0[real])
    torch.testing.assert_close(output_error(weight, changed, found).double(), expected, rtol=1e-6, atol=0)


def test_scaled_moments_are_those_of_the_scaled_inputs() -> None:
    x, x0 = integers(32, IN), integers(32, IN, seed=1)
    scales = torch.exp2(integers(IN, seed=5))
    found, expected = Moments(), Moments()
    found.add(x, x0, want_ee=True)
    expected.add(x / scales, x0 / scales, want_ee=True)
    scaled = found.scaled(scales)
    assert scaled.tokens == 32 and scaled.P is not None and expected.P is not None and scaled.R is not None and expected.R is not None
    for a, b in ((scaled.H, expected.H), (scaled.P, expected.P), (scaled.R, expected.R)):
        assert torch.equal(a, b)
    plain = Moments()
    plain.add(x)
    assert plain.scaled(scales).P is None and plain.scaled(scales).R is None


def test_white_noise_adds_to_an_output_error_what_it_would_in_every_channel_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(500, 6, generator=generator) * torch.arange(1, 7), torch.randn(4, 6, generator=generator)
    moments = Moments()
    moments.add(x)
    before = moments.H.clone()
    noisy = moments.with_white_noise(0.5)
    weight = torch.zeros(4, 6)
    expected = (x @ d.T).square().mean(0) + 0.5 * x.square().mean() * d.square().sum(1)
    torch.testing.assert_close(output_error(weight, d, noisy), expected)
    assert noisy.tokens == 500 and torch.equal(moments.H, before)


def test_a_fold_changes_no_output_error() -> None:
    """Scaling the weights by s and the inputs by 1 / s: the same function, so the same error."""
    x, x0, weight, changed = integers(32, IN), integers(32, IN, seed=1), integers(OUT, IN, seed=2), integers(OUT, IN, seed=3)
    scales = torch.exp2(integers(IN, seed=5))
    found = Moments()
    found.add(x, x0, want_ee=True)
    folded = output_error(weight * scales, changed * scales, found.scaled(scales))
    torch.testing.assert_close(folded, output_error(weight, changed, found), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_float32_whatever_the_inputs_are(dtype: torch.dtype) -> None:
    x = torch.full((3000, IN), 0.5, dtype=dtype)
    found = Moments()
    for part in x.split(7):
        found.add(part, part * 0, want_ee=True)
    for mean in (found.H, found.P, found.R):
        assert mean is not None and mean.dtype == torch.float32
        assert torch.equal(mean, torch.full((IN, IN), 750.0) / 3000)  # bfloat16 would have stuck at 256


def test_inputs_are_left_alone_and_not_kept() -> None:
    x, x0 = integers(8, IN), integers(8, IN, seed=1)
    before, before0 = x.clone(), x0.clone()
    found = Moments()
    found.add(x, x0, want_ee=True)
    h = found.H.clone()
    assert torch.equal(x, before) and torch.equal(x0, before0)
    x.zero_()
    assert torch.equal(found.H, h)


def test_a_layer_without_tokens_says_so() -> None:
    with pytest.raises(RuntimeError, match="no calibration token reached this layer"):
        _ = Moments().H


def test_what_has_been_read_takes_no_more_tokens() -> None:
    found = Moments()
    found.add(integers(4, IN))
    assert torch.equal(found.H, found.H)
    with pytest.raises(RuntimeError, match="have been read"):
        found.add(integers(4, IN))


def test_moments_are_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, none = Moments(), Moments(), Moments()
    x, y = (torch.randn(5, 3, generator=generator) for _ in range(2))
    a.add(x, x + 1, want_ee=True)
    b.add(y, y * 2, want_ee=True)
    mixed = a.mixed(b, 0.25)
    for name in ("H", "P", "R"):
        torch.testing.assert_close(getattr(mixed, name), 0.25 * getattr(a, name) + 0.75 * getattr(b, name))
    assert a.mixed(b, 1.0) is a and torch.equal(none.mixed(b, 0.0).H, b.H)
