"""Carrying out a fold: exact for powers of two, exact for any scale a norm can represent, and undone by its inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from awq_hf.folding.fold import FoldPoint, Gain, divided_parameters, multiplied_weight, representable_scales

CHANNELS = 64


class Norm(nn.Module):
    """A norm as far as a fold is concerned: a weight, and perhaps a bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)


def fold(gain: Gain) -> FoldPoint:
    return FoldPoint("producer", gain, torch.arange(CHANNELS), ("consumer",))


def powers(seed: int = 0) -> Tensor:
    return torch.exp2(torch.randint(-4, 5, (CHANNELS,), generator=torch.Generator().manual_seed(seed)).float())


def scales(seed: int = 0) -> Tensor:
    return torch.exp(torch.randn(CHANNELS, generator=torch.Generator().manual_seed(seed)))


def gain_of(gain: Gain, weight: Tensor) -> Tensor:
    return weight.double() + (1 if gain == "weight+1" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_biases_of_a_linear_are_divided_and_restored(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(10, CHANNELS).to(dtype)
    s = powers()
    divided = divided_parameters(fold("rows"), linear, s)
    assert divided["weight"].dtype == divided["bias"].dtype == dtype
    assert torch.equal(divided["weight"].double() * s[:, None], linear.weight.double())
    assert torch.equal(divided["bias"].double() * s, linear.bias.double())
    linear.load_state_dict(divided)
    undone = divided_parameters(fold("rows"), linear, 1 / s)
    torch.manual_seed(0)
    assert torch.equal(undone["weight"], nn.Linear(10, CHANNELS).to(dtype).weight)


def test_a_producer_without_bias_has_one_parameter_to_divide() -> None:
    assert list(divided_parameters(fold("rows"), nn.Linear(3, CHANNELS, bias=False), powers())) == ["weight"]
    assert list(divided_parameters(fold("weight"), Norm(torch.ones(CHANNELS)), powers())) == ["weight"]
    assert set(divided_parameters(fold("weight"), nn.LayerNorm(CHANNELS), powers())) == {"weight", "bias"}


def test_a_norm_that_multiplies_by_one_plus_its_weight() -> None:
    weight = torch.arange(CHANNELS) / 32 - 0.5  # 1 + w from 0.5 to 2.5, exactly
    divided = divided_parameters(fold("weight+1"), Norm(weight, weight), powers())
    assert torch.equal((1 + divided["weight"]) * powers(), 1 + weight)
    assert torch.equal(divided["bias"] * powers(), weight), "only the weight is stored less one"


def test_dividing_does_not_touch_the_producer() -> None:
    norm = Norm(torch.ones(CHANNELS))
    divided_parameters(fold("weight"), norm, powers())
    representable_scales(fold("weight"), norm, scales())
    assert torch.equal(norm.weight, torch.ones(CHANNELS))


@pytest.mark.parametrize("gain", ["weight", "weight+1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_absorbs_representable_scales_without_a_rounding_error(gain: Gain, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, wanted = Norm((1 + torch.rand(CHANNELS)).to(dtype)), scales()
    s = representable_scales(fold(gain), norm, wanted)
    after = divided_parameters(fold(gain), norm, s)["weight"]
    assert after.dtype == dtype and s.dtype == torch.float32
    torch.testing.assert_close(gain_of(gain, after) * s.double(), gain_of(gain, norm.weight), rtol=1e-6, atol=0)
    step = torch.finfo(dtype).eps * (8 if gain == "weight+1" else 1)  # of 1 + w, where w may be several times larger
    torch.testing.assert_close(s, wanted, rtol=step, atol=0)


def test_scales_of_a_linear_are_any_float() -> None:
    assert torch.equal(representable_scales(fold("rows"), nn.Linear(3, CHANNELS), scales()), scales())


def test_channels_that_cannot_be_divided_keep_their_scale_at_one() -> None:
    weight = torch.ones(CHANNELS, dtype=torch.float16)
    weight[0], weight[1], weight[2] = 0.0, 2.0**-24, -3.0
    wanted = torch.full((CHANNELS,), 4.0)
    wanted[3] = 1e-6  # 1e6 is beyond float16
    s = representable_scales(fold("weight"), Norm(weight), wanted)
    assert s[:5].tolist() == [1.0, 1.0, 4.0, 1.0, 4.0]
    after = divided_parameters(fold("weight"), Norm(weight), s)["weight"]
    assert torch.equal(after.float() * s, weight.float())
    canceled = representable_scales(fold("weight+1"), Norm(torch.full((CHANNELS,), -1.0)), wanted)
    assert torch.equal(canceled, torch.ones(CHANNELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consumers_columns_are_multiplied(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, CHANNELS).to(dtype)
    multiplied = multiplied_weight(weight, powers())
    assert multiplied.dtype == dtype and torch.equal(multiplied.double(), weight.double() * powers())


@pytest.mark.parametrize("bias", [False, True])
def test_a_fold_of_two_linears_leaves_their_product(bias: bool) -> None:
    torch.manual_seed(0)
    first, second, x = nn.Linear(10, 4, bias), nn.Linear(8, 3), torch.randn(7, 10)
    channel_map = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])  # each channel of the producer is read twice
    point, s = FoldPoint("first", "rows", channel_map, ("second",)), torch.tensor([0.5, 4.0, 1.0, 16.0])
    with torch.no_grad():
        before = second(first(x)[:, channel_map])
        for name, value in divided_parameters(point, first, s).items():
            first.get_parameter(name).copy_(value)
        second.weight.copy_(multiplied_weight(second.weight, s[channel_map]))
        assert torch.equal(second(first(x)[:, channel_map]), before)
