"""The scale search: which candidates there are, which one wins, and when none may."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_hf.affine import choose_grid, fake_quantize
from awq_hf.spec import QuantSpec
from awq_hf.transforms.awq_scale import FINALISTS, Consumer, ScaleOptions, nearest, nearest_losses, search_scales

SPEC = QuantSpec(3, 16)
IDENTITY = torch.arange(32)


def stored(weights: list[Tensor], spec: QuantSpec = SPEC) -> list[Consumer]:
    return [(weight, nearest(spec)) for weight in weights]


def energy(x: Tensor) -> Tensor:
    return x.pow(2).mean(0)


def salient(n: int = 32, tokens: int = 256, seed: int = 0) -> Tensor:
    """Inputs of which two channels are thirty times as large as the others."""
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 30
    x[:, 20] *= 30
    return x


def tried(weights: list[Tensor], channel_map: Tensor, channels: int, x: Tensor, steps: int) -> list[Tensor]:
    """The scales [in] of every candidate, as the loss sees them; none of them is better than another."""
    seen: list[Tensor] = []

    def record(scales: Tensor) -> float:
        seen.append(scales.clone())
        return 1.0

    choice = search_scales(stored(weights), channel_map, channels, energy(x), energy(x), ScaleOptions(steps), record)
    assert choice.family == "identity" and choice.alpha == 0 and torch.equal(choice.scales, torch.ones(channels))
    return seen


def test_nearest_loss_is_the_mean_squared_output_error_where_channels_are_uncorrelated() -> None:
    torch.manual_seed(0)
    weights, scales = [torch.randn(6, 32), torch.randn(3, 32)], torch.exp(torch.randn(32))
    x = torch.diag(torch.randn(32) * 5)  # 32 tokens, each with one channel
    direct = 0.0
    for weight in weights:
        changed = fake_quantize(weight * scales, choose_grid(weight * scales, SPEC)).double() / scales.double()
        direct += ((x.double() @ (changed - weight.double()).T) ** 2).sum(1).mean().item()
    before = [weight.clone() for weight in weights]
    assert nearest_losses(stored(weights), scales[None], energy(x))[0] == pytest.approx(direct, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_candidates_are_the_identity_and_every_alpha_up_to_one() -> None:
    torch.manual_seed(0)
    x = salient()
    seen = tried([torch.randn(8, 32)], IDENTITY, 32, x, 5)
    assert torch.equal(seen[0], torch.ones(32))
    assert len(seen) == 1 + 5 + 4  # identity; activations at 1/5 .. 1; activations and weights at 1/5 .. 4/5
    magnitude = x.pow(2).mean(0).sqrt()
    for alpha in (0.2, 0.4, 0.6, 0.8, 1.0):
        expected = magnitude**alpha
        expected = expected / (expected.max() * expected.min()).sqrt()
        assert any(torch.allclose(s, expected, rtol=1e-4) for s in seen), alpha


def test_a_better_scale_is_found_and_its_losses_are_what_they_claim() -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(16, 32), torch.randn(8, 32)], salient()
    choice = search_scales(stored(weights), IDENTITY, 32, energy(x), energy(salient(seed=1)), ScaleOptions())
    assert choice.alpha > 0 and choice.loss < 0.8 * choice.identity_loss
    assert choice.loss == pytest.approx(nearest_losses(stored(weights), choice.scales[None], energy(x))[0], rel=1e-6)
    assert choice.identity_loss == pytest.approx(nearest_losses(stored(weights), torch.ones(1, 32), energy(x))[0], rel=1e-6)
    assert bool((choice.scales[[3, 20]] > choice.scales.median()).all())


def test_alpha_one_can_win() -> None:
    x = salient()
    target = x.pow(2).mean(0).sqrt()
    target = target / (target.max() * target.min()).sqrt()
    choice = search_scales(
        stored([torch.ones(4, 32)]), IDENTITY, 32, energy(x), energy(x), ScaleOptions(), lambda s: float((s - target).abs().sum())
    )
    assert choice.alpha == 1.0 or choice.family.startswith("identity")  # the held-out slice may say no, the search may not
    assert choice.loss <= 1e-3 or choice.family == "identity (held-out slice)"


def test_a_weight_that_rounds_exactly_keeps_the_identity() -> None:
    weight = torch.arange(-3, 5).repeat(4, 4).float()
    choice = search_scales(stored([weight]), IDENTITY, 32, energy(salient()), energy(salient()), ScaleOptions())
    assert (choice.alpha, choice.family, choice.loss, choice.identity_loss) == (0.0, "identity", 0.0, 0.0)
    assert torch.equal(choice.scales, torch.ones(32))


def test_the_held_out_slice_can_refuse_the_winner_or_a_gain_that_is_noise() -> None:
    torch.manual_seed(0)
    weights, train = [torch.randn(16, 32)], energy(salient())
    searched = search_scales(stored(weights), IDENTITY, 32, train, train, ScaleOptions())
    elsewhere = torch.ones(32)  # all channels alike, but for those that the search protects at the cost of the others
    elsewhere[[3, 20]] = 0
    loss = lambda scales, held: nearest_losses(stored(weights), scales[None], held)[0]  # noqa: E731
    gains = [loss(torch.ones(32), held) - loss(searched.scales, held) for held in (train, elsewhere)]
    assert searched.alpha > 0 and gains[0] > 0 > gains[1]
    for share, kept in ((0.03, True), (0.003, False), (-0.05, False)):
        # Losses are linear in the energy: a mixture of the two on which the winner gains just this share.
        a, b = (gain - share * loss(torch.ones(32), held) for gain, held in zip(gains, (train, elsewhere), strict=True))
        mixture = train * (-b / (a - b)) + elsewhere * (a / (a - b))
        judged = search_scales(stored(weights), IDENTITY, 32, train, mixture, ScaleOptions())
        if kept:
            assert torch.equal(judged.scales, searched.scales) and judged.alpha == searched.alpha
        else:
            assert (judged.alpha, judged.family) == (0.0, "identity (held-out slice)")
            assert torch.equal(judged.scales, torch.ones(32)) and judged.loss == judged.identity_loss == searched.identity_loss


def test_channels_of_one_producer_share_one_scale() -> None:
    torch.manual_seed(0)
    repeat = torch.arange(16).view(2, 8).repeat_interleave(2, 0).reshape(-1)  # two heads of 8, each read twice
    x = salient()
    seen = tried([torch.randn(8, 32)], repeat, 16, x, 4)
    assert all(torch.equal(s[0:8], s[8:16]) and torch.equal(s[16:24], s[24:32]) for s in seen)
    power = x.pow(2).mean(0)
    shared = torch.stack([power[repeat == c].mean() for c in range(16)]).sqrt()
    shared = (shared / (shared.max() * shared.min()).sqrt())[repeat]
    assert any(torch.allclose(s, shared, rtol=1e-4) for s in seen)
    choice = search_scales(stored([torch.randn(8, 32)]), repeat, 16, energy(x), energy(x), ScaleOptions())
    assert choice.scales.shape == (16,)


@pytest.mark.parametrize("size", [1.0, 2.0**-20])
def test_producer_rows_that_nobody_reads_are_not_scaled_and_have_no_say(size: float) -> None:
    """A fused projection: rows 0-63 (queries, keys) go elsewhere, so dividing them would change the function."""
    torch.manual_seed(0)
    weights, x = [torch.randn(8, 32)], salient() * size
    fused = search_scales(stored(weights), IDENTITY + 64, 96, energy(x), energy(x), ScaleOptions())
    alone = search_scales(stored(weights), IDENTITY, 32, energy(x), energy(x), ScaleOptions())
    assert alone.alpha > 0 and torch.equal(fused.scales[:64], torch.ones(64))
    assert (fused.alpha, fused.family) == (alone.alpha, alone.family)
    torch.testing.assert_close(fused.scales[64:], alone.scales)


@pytest.mark.parametrize("dead", [[0], [0, 1, 2, 31], list(range(32))])
def test_dead_channels_and_zero_weights_get_finite_scales(dead: list[int]) -> None:
    torch.manual_seed(0)
    x, weight = salient(), torch.randn(8, 32)
    x[:, dead] = 0
    weight[:, 5] = 0
    for w in (weight, torch.zeros(8, 32)):
        for scales in tried([w], IDENTITY, 32, x, 4):
            assert bool(torch.isfinite(scales).all()) and bool((scales > 0).all())
        choice = search_scales(stored([w]), IDENTITY, 32, energy(x), energy(x), ScaleOptions())
        assert choice.loss <= choice.identity_loss and bool(torch.isfinite(choice.scales).all())


def test_judges_decide_between_the_best_few() -> None:
    """Consumers of 3 bits choose for judges of 4: the judges see few candidates, and theirs are the losses that are returned."""
    x, seen = salient(), []

    def judge(rows: Tensor, importance: Tensor) -> Tensor:
        seen.append(importance)
        return nearest(SPEC)(rows, importance)

    weights = [torch.randn(16, 32, generator=torch.Generator().manual_seed(5))]
    rough = stored(weights, QuantSpec(3, SPEC.group_size))
    choice = search_scales(rough, IDENTITY, 32, energy(x), energy(x), ScaleOptions(), judges=[(weights[0], judge)])
    assert len(seen) == 1 + FINALISTS + 2  # identity and finalists, then the winner and the identity on the held-out slice
    assert torch.equal(seen[0], energy(x))
    assert choice.identity_loss == pytest.approx(nearest_losses(stored(weights), torch.ones(1, 32), energy(x))[0], rel=1e-6)
    assert choice.alpha > 0
    torch.testing.assert_close(seen[-2], energy(x) / choice.scales**2)  # what reaches the smoothed weight
