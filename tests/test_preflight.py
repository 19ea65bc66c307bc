"""Preflight: which Linears are taken, and every shape that cannot be stored refused before any work."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from awq_hf.blocks import linears_of
from awq_hf.preflight import check_shapes, check_weights, targets
from awq_hf.recipe import Recipe
from awq_hf.spec import QuantSpec


class Special(nn.Linear):
    pass


def block(width: int = 64, inner: int = 96) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "attn": nn.ModuleDict({"q_proj": nn.Linear(width, width), "special": Special(5, 5)}),
            "norm": nn.LayerNorm(width),
            "mlp": nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)),
        }
    )


def model_of(*blocks: nn.Module) -> nn.Module:
    model = nn.Module()
    model.head, model.layers = nn.Linear(7, 7), nn.ModuleList(blocks)
    return model


def recipe(bits: int = 4, group_size: int = 32, skip: tuple[str, ...] = ()) -> Recipe:
    return Recipe(spec=QuantSpec(bits, group_size), skip=skip)


def test_targets_are_the_plain_linears_of_the_blocks_that_are_not_skipped() -> None:
    model = model_of(block(), block())
    assert list(linears_of(block())) == ["attn.q_proj", "mlp.0", "mlp.2"]
    assert list(targets(model, recipe())) == [f"layers.{i}.{name}" for i in range(2) for name in ("attn.q_proj", "mlp.0", "mlp.2")]
    assert list(targets(model, recipe(skip=("mlp", "layers.0")))) == ["layers.1.attn.q_proj"]


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_shapes_that_fit_pass(group_size: int) -> None:
    with torch.device("meta"):
        check_shapes(model_of(block(), block()), recipe(group_size=group_size))


def test_in_features_that_do_not_divide_are_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(ValueError, match="2 layers do not fit bits=4, group_size=64") as error:
        check_shapes(model_of(block(), block()), recipe(group_size=64))
    message = str(error.value)
    assert "layers.0.mlp.2: in_features 96 is not divisible by group_size 64" in message and "layers.1.mlp.2" in message
    assert "mlp.0:" not in message and "q_proj" not in message
    assert "Group sizes that divide every layer: [-1, 16, 32]" in message and "modules_to_not_convert=" in message


def test_out_features_need_a_multiple_of_eight_at_four_bits_only() -> None:
    model = model_of(block(inner=96), nn.ModuleDict({"odd": nn.Linear(64, 12)}))
    with pytest.raises(ValueError, match="layers.1.odd: out_features 12 is not a multiple of 8, which the 4-bit format needs"):
        check_shapes(model, recipe())
    for bits in (2, 3, 8):
        check_shapes(model, recipe(bits=bits))
    check_shapes(model, recipe(skip=("odd",)))


def test_many_misfits_are_counted_not_listed() -> None:
    with pytest.raises(ValueError, match="12 layers do not fit") as error:
        check_shapes(model_of(*(block() for _ in range(12))), recipe(group_size=64))
    assert str(error.value).count("in_features 96") == 8 and "and 4 more" in str(error.value)


def leave_out(error: pytest.ExceptionInfo[ValueError]) -> tuple[str, ...]:
    found = re.search(r"modules_to_not_convert=\[(.*)\]", str(error.value))
    assert found
    return tuple(re.findall(r"'([^']*)'", found[1]))


def test_the_suggested_modules_to_not_convert_leave_the_misfits_and_nothing_else() -> None:
    model = model_of(*(block() for _ in range(3)))  # with names that end in a number: layers.0.mlp.2
    with pytest.raises(ValueError) as error:
        check_shapes(model, recipe(group_size=64))
    followed = recipe(group_size=64, skip=leave_out(error))
    check_shapes(model, followed)
    assert [name for name in targets(model, recipe()) if followed.skips(name)] == [f"layers.{i}.mlp.2" for i in range(3)]


def test_nothing_left_to_quantize_is_refused() -> None:
    with pytest.raises(ValueError, match="no Linear .* left to quantize; shorten modules_to_not_convert"):
        check_shapes(model_of(block()), recipe(skip=("layers",)))


def test_weights_that_were_not_loaded_are_refused_by_name() -> None:
    model = model_of(block())
    check_weights(model, recipe())
    model.layers[0].attn.q_proj.to("meta")  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"2 weights are not in memory \(the first is layers.0.attn.q_proj.weight\).*device_map"):
        check_weights(model, recipe())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = model_of(block(), block())
    linear = model.get_submodule("layers.1.mlp.0")
    linear.get_parameter("weight").data[3, 5] = value
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.0\.weight holds NaN or infinity"):
        check_weights(model, recipe())
    check_weights(model, recipe(skip=("layers.1.mlp.0",)))
