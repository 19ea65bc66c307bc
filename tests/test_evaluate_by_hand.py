"""Evaluation of models whose probabilities are powers of two: every figure by hand."""

from __future__ import annotations

import math
import sys
import types
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import awq_hf

module = sys.modules["awq_hf.evaluate"]  # the package's attribute of this name is the function


class Fixed(nn.Module):
    """Logits that depend on the token alone: row t of a float64 table; NaN at padding, where nobody may look."""

    def __init__(self, probabilities: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities, dtype=torch.float64).log()
        self.alive: list[weakref.ref[Tensor]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> types.SimpleNamespace:
        logits, self.mask = self.logits[input_ids], attention_mask
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask[..., None] == 0, math.nan)
        self.alive.append(weakref.ref(logits))
        return types.SimpleNamespace(logits=logits)


P = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
Q = [1 / 8, 1 / 2, 1 / 4, 1 / 8]
UNIFORM = [1 / 4] * 4
LN2 = math.log(2)
# KL(P || Q) = (1/2 * 2 - 1/4 * 1 - 1/8 * 1) ln 2 = 0.625 ln 2, the other way round 0.5 ln 2; KL(P || UNIFORM) = 0.25 ln 2, most likely
# tokens: 0 of P, 1 of Q, 0 of UNIFORM. After token 0 models agree, after 1 they differ by 0.625 ln 2, after 2 by 0.25 ln 2.
FIXED_REFERENCE = [P, P, P, P]
FIXED_MODEL = [P, Q, UNIFORM, P]


def fixed() -> tuple[Fixed, Fixed]:
    return Fixed(FIXED_MODEL), Fixed(FIXED_REFERENCE)


def test_by_hand() -> None:
    """Windows 1 0 2, 2 2 1 and 1 3: positions 8, predictions 5; the last window is padded."""
    model, reference = fixed()
    found = awq_hf.evaluate(model, reference, [torch.tensor([1, 0, 2, 2, 2, 1, 1, 3])], seq_len=3)
    for each in (model, reference):
        assert each.mask is not None and each.mask.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    # Bits of the next token: model Q(0) + P(2), U(2) + U(1), Q(3); reference P(0) + P(2), P(2) + P(1), P(3)
    ours, theirs = [3 + 3, 2 + 2, 3], [1 + 3, 3 + 2, 3]
    assert found.perplexity == pytest.approx(2 ** (sum(ours) / 5), rel=1e-12)
    assert found.reference_perplexity == pytest.approx(2 ** (sum(theirs) / 5), rel=1e-12)
    assert found.loss_difference == pytest.approx(0.2 * LN2, rel=1e-12)
    residuals = [2 - 0.2 * 2, -1 - 0.2 * 2, 0 - 0.2 * 1]
    assert found.loss_difference_se == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 5 * LN2, rel=1e-12)
    # KL in units of ln 2: .625 0 .25 | .25 .25 .625 | .625 0
    sums, mean = [0.875, 1.125, 0.625], 2.625 / 8
    assert found.kl == pytest.approx(mean * LN2, rel=1e-12)
    residuals = [sums[0] - 3 * mean, sums[1] - 3 * mean, sums[2] - 2 * mean]
    assert found.kl_se == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 8 * LN2, rel=1e-12)
    assert found.kl_median == pytest.approx(0.25 * LN2, rel=1e-12)
    assert found.kl_99 == found.kl_999 == pytest.approx(0.625 * LN2, rel=1e-12)
    assert found.top1 == 5 / 8 and found.tokens == 8


def test_quantiles_lie_between_positions() -> None:
    """41 positions, one of which differs more: 99 % is place 39.6 of 0..40, 99.9 % place 39.96."""
    found = awq_hf.evaluate(*fixed(), [torch.tensor([2] * 30 + [1] + [2] * 10)], seq_len=8)
    assert found.kl_median == pytest.approx(0.25 * LN2, rel=1e-12)
    assert found.kl_99 == pytest.approx((0.25 + 0.6 * 0.375) * LN2, rel=1e-12)
    assert found.kl_999 == pytest.approx((0.25 + 0.96 * 0.375) * LN2, rel=1e-12)


@pytest.mark.parametrize("seq_len, tokens, has_errors", [(8, [1, 2, 3], (False, False)), (4, [1, 2, 3, 1, 2], (False, True))])
def test_a_standard_error_needs_two_windows(seq_len: int, tokens: list[int], has_errors: tuple[bool, bool]) -> None:
    """A window of one token predicts nothing, but has a position."""
    found = awq_hf.evaluate(*fixed(), [torch.tensor(tokens)], seq_len=seq_len)
    assert (found.loss_difference_se is not None, found.kl_se is not None) == has_errors
    assert found.kl is not None and found.loss_difference is not None


def test_small_divergences_are_not_lost_in_rounding() -> None:
    """Probabilities 1/2 and 1/2 against logits 0 and d: ln cosh(d / 2) = d^2 / 8 up to d^4; float32 would give 0 or -1e-8."""
    model, reference = fixed()
    reference.logits, model.logits = torch.zeros(2, 2), torch.tensor([[0.0, 1e-5], [0.0, 1e-5]])
    assert awq_hf.evaluate(model, reference, [torch.tensor([0, 1, 1, 0])]).kl == pytest.approx(1e-10 / 8, rel=1e-3)


def test_infinitely_bad_is_a_number() -> None:
    """Perplexity overflows; divergence does not, though probabilities vanish."""
    model, reference = fixed()
    reference.logits, model.logits = torch.tensor([[0.0, 1e5]] * 2), torch.tensor([[1e5, 0.0]] * 2)
    found = awq_hf.evaluate(model, reference, [torch.ones(9, dtype=torch.int64)])
    assert (found.perplexity, found.kl, found.loss_difference, found.top1) == (math.inf, 1e5, 1e5, 0)


def test_one_pair_of_logits_is_in_memory() -> None:
    model, reference = fixed()
    seen: list[int] = []
    count = lambda *_: seen.append(sum(logits() is not None for each in (model, reference) for logits in each.alive))  # noqa: E731
    for each in (model, reference):
        each.register_forward_hook(count)
    awq_hf.evaluate(model, reference, [torch.arange(64) % 4], seq_len=4, batch_size=2)
    assert seen == [1, 2] * 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.figures.CHUNK", 4)  # one position
    tokens = [torch.tensor([0, 0, 0, 0, 0, 0, 0, 2, 0, 0])]  # windows of 3: the 2 is token 1 of window 2
    for broken in (0, 1):
        pair = fixed()
        pair[broken].logits[2, 1] = value
        name = ("mine", "the reference")[broken]
        with pytest.raises(ValueError, match=rf"{name} computes logits that are not finite \(window 2, token 1,.*float64"):
            awq_hf.evaluate_many({"mine": pair[0]}, pair[1], tokens, seq_len=3, batch_size=2)
    with pytest.raises(ValueError, match="the model computes logits that are not finite"):
        awq_hf.evaluate(pair[1], None, tokens)


def test_vocabularies_of_different_size() -> None:
    with pytest.raises(ValueError, match="the model computes logits for 5 tokens and the reference for 4"):
        awq_hf.evaluate(Fixed([[1 / 5] * 5] * 5), fixed()[1], [torch.arange(4)])
