"""Finding the decoder's blocks and their Linears."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from awq_hf.blocks import find_blocks, matrices_of


class Model(nn.Module):
    """A decoder with two lists, beside a vision tower that is larger than both."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleList([nn.Linear(64, 64)])
        self.model = nn.Module()
        self.model.few = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
        self.model.layers = nn.ModuleList([nn.Linear(8, 12) for _ in range(3)])

    def get_decoder(self) -> nn.Module:
        return self.model


def test_blocks_are_the_largest_list_below_the_decoder() -> None:
    model = Model()
    name, blocks = find_blocks(model)
    assert name == "model.layers" and blocks is model.model.layers
    assert find_blocks(model.model)[0] == "layers", "a model without get_decoder is searched whole"


def test_a_model_without_blocks_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no list of blocks \(nn.ModuleList\)"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleList()))


def test_subclasses_of_linear_that_compute_something_else_are_left_out() -> None:
    class Special(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    block = nn.ModuleDict({"plain": nn.Linear(8, 8), "special": Special(8, 8), "norm": nn.LayerNorm(8)})
    assert matrices_of(block).keys() == {"plain"}
