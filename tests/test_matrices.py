"""What counts as a matrix: tried, not guessed from names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from awq_hf.matrices import as_kind, as_linear, is_matrix, shape_of


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WantsMore(nn.Linear):
    def __init__(self, in_features: int, out_features: int, experts: int) -> None:
        super().__init__(in_features, out_features * experts)


class HasChildren(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.adapter = nn.Linear(2, 2)


def test_linears_and_what_computes_like_them() -> None:
    assert all(is_matrix(module) for module in (nn.Linear(3, 4), FalconLinear(3, 4), Conv1D(4, 3)))
    others = (Doubled(3, 4), WantsMore(3, 4, 2), HasChildren(3, 4), nn.Embedding(3, 4), nn.LayerNorm(3), nn.Bilinear(3, 3, 4))
    assert not any(is_matrix(module) for module in others)
    with torch.device("meta"):  # as from_pretrained builds its model
        assert is_matrix(FalconLinear(3, 4)) and not is_matrix(Doubled(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_tried_in_float32_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    class Apart(nn.Linear):  # rounds twice, as FalconLinear does; a class of its own, as what was tried is remembered
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does while it builds its model
    try:
        assert is_matrix(Apart(3, 4))
    finally:
        torch.set_default_dtype(before)


def test_trying_leaves_random_numbers_alone() -> None:
    class Own(nn.Linear):
        pass

    module, state = Own(3, 4), torch.get_rng_state()
    assert is_matrix(module) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("module", [nn.Linear(3, 4), FalconLinear(3, 4, bias=False), Conv1D(4, 3)], ids=lambda m: type(m).__name__)
def test_as_linear_and_back(module: nn.Module) -> None:
    nn.init.normal_(module.get_parameter("weight"))
    x = torch.randn(2, 5, 3)
    linear = as_linear(module)
    assert isinstance(linear, nn.Linear) and shape_of(module) == shape_of(linear) == (4, 3)
    torch.testing.assert_close(linear(x), module(x))
    back = as_kind(type(module), linear.weight.data, linear.bias)
    assert type(back) is type(module) and torch.equal(back(x), module(x))
    assert back.state_dict().keys() == module.state_dict().keys()
