"""The corrected target against a least-squares solver, and its strength against a search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_hf.calibration.stats import Moments, output_error
from awq_hf.transforms.correction import DAMP, corrected_target

IN, OUT = 12, 5


def inputs(tokens: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """x of the quantized stream and x0 of the float one: correlated errors, so that there is something to correct."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(tokens, IN, generator=generator)
    mix = torch.randn(IN, IN, generator=torch.Generator().manual_seed(99))
    return x0 + noise * (x0 @ mix + torch.randn(tokens, IN, generator=generator)), x0


def moments(x: Tensor, x0: Tensor | None, d: Tensor | None = None) -> Moments:
    found = Moments()
    found.add(x, x0, want_ee=x0 is not None, d=d)
    return found


def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("tokens", [400, 8])  # 8 tokens: only the damping makes the solution unique
def test_full_correction_is_the_ridge_regression_of_the_float_output(tokens: int) -> None:
    w, (x, x0) = weight(), inputs(tokens, 0.1, 0)
    target, strength, _ = corrected_target(w, moments(x, x0), None)
    # min_T |T x - W x0|^2 + damp |T - W|^2, as one least-squares problem with the damping as extra rows
    x, x0, w64 = x.double(), x0.double(), w.double()
    root = (DAMP * x.pow(2).mean(0).mean() * tokens).sqrt()
    rows = torch.cat([x, root * torch.eye(IN, dtype=torch.float64)])
    values = torch.cat([x0 @ w64.T, root * w64.T])
    expected = torch.linalg.lstsq(rows, values).solution.T
    assert strength == 1.0
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)


def test_there_is_nothing_to_correct_without_input_error() -> None:
    w, (x, x0) = weight(), inputs(100, 0.1, 0)
    target, strength, _ = corrected_target(w, moments(x, None), None)
    assert strength == 0.0 and torch.equal(target, w)
    target, _, _ = corrected_target(w, moments(x0, x0), moments(x0, x0))
    assert torch.equal(target, w)


def test_strength_is_the_best_on_the_held_out_slice() -> None:
    w = weight()
    interior = 0
    for seed in range(20):
        train, held = (moments(*inputs(tokens, 0.3, seed + 100 * i)) for i, tokens in enumerate((14, 40)))
        target, strength, _ = corrected_target(w, train, held)
        full, _, _ = corrected_target(w, train, None)
        torch.testing.assert_close(target, w + strength * (full - w), rtol=1e-4, atol=1e-4)
        trials = torch.linspace(0, 1, 101).tolist()
        losses = [float(output_error(w, w + c * (full - w), held).sum()) for c in trials]
        assert float(output_error(w, target, held).sum()) <= min(losses) * (1 + 1e-4)
        assert abs(strength - trials[losses.index(min(losses))]) <= 0.02
        interior += 0 < strength < 1
    assert interior >= 5, "the parabola's minimum is often between the ends"


def test_a_correction_that_hurts_on_held_out_text_is_not_made() -> None:
    w, (x, x0) = weight(), inputs(50, 0.05, 0)
    opposite = moments(x0 - (x - x0), x0)  # errors of the other sign
    target, strength, _ = corrected_target(w, moments(x, x0), opposite)
    assert strength == 0.0 and torch.equal(target, w)


def test_a_held_out_slice_without_error_asks_for_full_strength_only_if_it_has_no_say() -> None:
    w, (x, x0) = weight(), inputs(50, 0.3, 0)
    _, strength, _ = corrected_target(w, moments(x, x0), moments(x, None))
    assert strength == 1.0


def test_an_unusable_statistic_leaves_the_weight_alone() -> None:
    w, (x, x0) = weight(), inputs(50, 0.3, 0)
    x[3, 4] = float("nan")
    target, strength, _ = corrected_target(w, moments(x, x0), None)
    assert strength == 0.0 and torch.equal(target, w)


def test_arguments_are_left_alone() -> None:
    w, train = weight(), moments(*inputs(50, 0.3, 0))
    before = [t.clone() for t in (w, train.H, train.P) if t is not None]
    corrected_target(w, train, train)
    assert all(torch.equal(a, b) for a, b in zip(before, [t for t in (w, train.H, train.P) if t is not None], strict=True))


def lacking(x: Tensor, seed: int, noise: float = 1.0) -> Tensor:
    """What a residual stream lacks: something that x tells of, and noise."""
    mix = torch.randn(IN, OUT, generator=torch.Generator().manual_seed(98))
    return 0.2 * x @ mix + noise * torch.randn(len(x), OUT, generator=torch.Generator().manual_seed(seed))


def test_what_the_input_tells_of_the_residual_stream_is_made_up_for_exactly() -> None:
    """d = M x: the target W + M leaves no error of the sum behind; without it, all of d is left."""
    w, (x, _) = weight(), inputs(4000, 0.0, 0)
    d = lacking(x, 0, noise=0.0)
    train, held = (moments(*part) for part in ((x[:3000], x[:3000], d[:3000]), (x[3000:], x[3000:], d[3000:])))
    target, _, residual = corrected_target(w, train, held)
    assert residual == 1.0
    assert float(output_error(w, target, held).sum()) < 1e-3 * float(d.square().mean(0).sum())
    torch.testing.assert_close(float(output_error(w, w, held).sum()), float(d[3000:].square().mean(0).sum()), rtol=1e-4, atol=0)


def test_full_correction_is_the_ridge_regression_of_what_the_sum_should_be() -> None:
    w, (x, x0) = weight(), inputs(400, 0.1, 0)
    d = lacking(x, 0)
    target, *strengths = corrected_target(w, moments(x, x0, d), None)
    x, x0, w64 = x.double(), x0.double(), w.double()
    root = (DAMP * x.pow(2).mean(0).mean() * len(x)).sqrt()
    rows = torch.cat([x, root * torch.eye(IN, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([x0 @ w64.T + d, root * w64.T])).solution.T
    assert strengths == [1.0, 1.0]
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])  # -1: on the held-out text the stream lacks the opposite
def test_both_strengths_are_the_best_on_the_held_out_slice(sign: int) -> None:
    w, places = weight(), set()
    trials = torch.linspace(0, 1, 21).tolist()
    for seed in range(12):
        streams = [inputs(tokens, 0.3, seed + 100 * i) for i, tokens in enumerate((14, 40))]
        train, held = (moments(x, x0, (sign if i else 1) * lacking(x, seed + 100 * i)) for i, (x, x0) in enumerate(streams))
        target, strength, residual = corrected_target(w, train, held)
        full = corrected_target(w, train, None).target - w
        train_alone = moments(*streams[0])
        for_input = corrected_target(w, train_alone, None).target - w
        assert residual is not None
        torch.testing.assert_close(target, w + strength * for_input + residual * (full - for_input), rtol=1e-3, atol=1e-3)
        losses = [float(output_error(w, w + c * for_input + b * (full - for_input), held).sum()) for c in trials for b in trials]
        assert float(output_error(w, target, held).sum()) <= min(losses) * (1 + 1e-4)
        assert float(output_error(w, target, held).sum()) <= float(output_error(w, w, held).sum())
        places.add((0 < strength < 1, 0 < residual < 1))
    assert (True, sign == 1) in places, "both inside, or the residual's at its end"


def test_a_residual_stream_that_lacks_nothing_changes_nothing() -> None:
    w, (x, x0) = weight(), inputs(50, 0.3, 0)
    nothing = torch.zeros(50, OUT)
    with_it, without = (corrected_target(w, moments(x, x0, d), moments(x, x0, d)) for d in (nothing, None))
    assert with_it.strength == pytest.approx(without.strength) and (with_it.residual, without.residual) == (0.0, None)
    torch.testing.assert_close(with_it.target, without.target)
