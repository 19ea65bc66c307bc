"""Preflight: which Linears are taken, and every shape that cannot be stored refused before any work."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from awq_hf.blocks import matrices_of
from awq_hf.preflight import OUTSIDE, SKIPPED, check_calls, check_in_memory, check_weights, make_plan
from awq_hf.recipe import Recipe
from awq_hf.spec import QuantSpec


class Special(nn.Linear):
    """A router, say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


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


def test_targets_are_the_plain_matrices_of_the_blocks_that_are_not_skipped() -> None:
    model = model_of(block(), block())
    assert list(matrices_of(block())) == ["attn.q_proj", "mlp.0", "mlp.2"]
    assert list(make_plan(model, recipe()).specs) == [f"layers.{i}.{name}" for i in range(2) for name in ("attn.q_proj", "mlp.0", "mlp.2")]
    assert list(make_plan(model, recipe(skip=("mlp", "layers.0"))).specs) == ["layers.1.attn.q_proj"]


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_shapes_that_fit_pass(group_size: int) -> None:
    with torch.device("meta"):
        make_plan(model_of(block(), block()), recipe(group_size=group_size))


def test_in_features_that_do_not_divide_are_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(ValueError, match="2 layers do not fit bits=4, group_size=64") as error:
        make_plan(model_of(block(), block()), recipe(group_size=64))
    message = str(error.value)
    assert "layers.0.mlp.2: in_features 96 is not divisible by group_size 64" in message and "layers.1.mlp.2" in message
    assert "mlp.0:" not in message and "q_proj" not in message
    assert "Group sizes that divide every layer: [-1, 16, 32]" in message and "modules_to_not_convert=" in message


def test_out_features_need_a_multiple_of_eight_at_four_bits_only() -> None:
    model = model_of(block(inner=96), nn.ModuleDict({"odd": nn.Linear(64, 12)}))
    with pytest.raises(ValueError, match="layers.1.odd: out_features 12 is not a multiple of 8, which the 4-bit format needs"):
        make_plan(model, recipe())
    for bits in (2, 3, 8):
        make_plan(model, recipe(bits=bits))
    make_plan(model, recipe(skip=("odd",)))


def test_many_misfits_are_counted_not_listed() -> None:
    with pytest.raises(ValueError, match="12 layers do not fit") as error:
        make_plan(model_of(*(block() for _ in range(12))), recipe(group_size=64))
    assert str(error.value).count("in_features 96") == 8 and "and 4 more" in str(error.value)


def leave_out(error: pytest.ExceptionInfo[ValueError]) -> tuple[str, ...]:
    found = re.search(r"modules_to_not_convert=\[(.*)\]", str(error.value))
    assert found
    return tuple(re.findall(r"'([^']*)'", found[1]))


def test_the_suggested_modules_to_not_convert_leave_the_misfits_and_nothing_else() -> None:
    model = model_of(*(block() for _ in range(3)))  # with names that end in a number: layers.0.mlp.2
    with pytest.raises(ValueError) as error:
        make_plan(model, recipe(group_size=64))
    followed = recipe(group_size=64, skip=leave_out(error))
    make_plan(model, followed)
    assert [name for name, why in make_plan(model, followed).left_in_float.items() if why == SKIPPED] == [
        f"layers.{i}.mlp.2" for i in range(3)
    ]


def test_nothing_left_to_quantize_is_refused() -> None:
    with pytest.raises(ValueError, match="no Linear .* left to quantize; shorten modules_to_not_convert"):
        make_plan(model_of(block()), recipe(skip=("layers",)))


def test_weights_that_were_not_loaded_are_refused_by_name() -> None:
    model = model_of(block())
    check_in_memory(model, None)
    model.layers[0].attn.q_proj.to("meta")  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"2 weights are not in memory \(the first is layers.0.attn.q_proj.weight\).*device_map"):
        check_in_memory(model, None)
    check_in_memory(model, "layers")
    with pytest.raises(ValueError, match="2 weights are not in memory"):
        check_in_memory(model, "layer")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = model_of(block(), block())
    linear = model.get_submodule("layers.1.mlp.0")
    linear.get_parameter("weight").data[3, 5] = value
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.0\.weight holds NaN or infinity"):
        check_weights(model, make_plan(model, recipe()), "layers.1")
    check_weights(model, make_plan(model, recipe()), "layers.0")
    check_weights(model, make_plan(model, recipe(skip=("layers.1.mlp.0",))), "layers.1")


def test_what_stays_float_is_named_with_its_reason() -> None:
    left = make_plan(model_of(block(), block()), recipe(skip=("layers.0.mlp",))).left_in_float
    special = {f"layers.{i}.attn.special": "Special is not a plain Linear" for i in range(2)}
    assert left == {"head": OUTSIDE, "layers.0.mlp.0": SKIPPED, "layers.0.mlp.2": SKIPPED, **special}


def test_a_small_layer_that_does_not_fit_stays_float_and_a_larger_one_is_refused() -> None:
    gate = nn.ModuleDict({"gate": nn.Linear(64, 1), "large": nn.Linear(64, 128)})  # a gate of one output: 64 of 8256 weights
    plan = make_plan(model_of(gate), recipe())
    assert list(plan.specs) == ["layers.0.large"]
    assert plan.left_in_float["layers.0.gate"] == "small, and out_features 1 is not a multiple of 8, which the 4-bit format needs"
    with pytest.raises(ValueError, match="layers.0.gate: out_features 1"):
        make_plan(model_of(nn.ModuleDict({"gate": nn.Linear(64, 1), "large": nn.Linear(64, 96)})), recipe())


def test_overrides_choose_the_spec_of_each_layer() -> None:
    model = model_of(block(), block())
    overrides = (("layers.0.attn", None), ("attn", QuantSpec(8, 16)), ("mlp.2", QuantSpec(2, 32)))
    plan = make_plan(model, Recipe(spec=QuantSpec(4, 32), overrides=overrides))
    assert plan.specs == {
        "layers.0.mlp.0": QuantSpec(4, 32),
        "layers.0.mlp.2": QuantSpec(2, 32),
        "layers.1.attn.q_proj": QuantSpec(8, 16),
        "layers.1.mlp.0": QuantSpec(4, 32),
        "layers.1.mlp.2": QuantSpec(2, 32),
    }
    assert plan.left_in_float["layers.0.attn.q_proj"] == SKIPPED
    with pytest.raises(ValueError, match="overrides: 'q_porj' is in no layer's name, and has to be a part of one; did you mean 'q_proj'"):
        make_plan(model, Recipe(spec=QuantSpec(4, 32), overrides=(("q_porj", None),)))


@pytest.mark.parametrize(
    "part, hint",
    [
        ("q_porj", "did you mean 'q_proj'?"),
        ("layers.0.atn.q_proj", "did you mean 'layers.0.attn.q_proj'"),
        ("vision", "names look like 'layers.0.attn.q_proj'"),
    ],
)
def test_what_is_left_in_float_has_to_be_there(part: str, hint: str) -> None:
    with pytest.raises(ValueError, match="modules_to_not_convert: '.*' is in no module's name, and has to be a part of one") as error:
        make_plan(model_of(block(), block()), recipe(skip=("head", part)))
    assert repr(part) in str(error.value) and hint in str(error.value)


def test_what_would_stay_in_float_anyway_may_be_named() -> None:
    for part in ("head", "norm", "layers.0.norm", "attn.special"):
        assert make_plan(model_of(block(), block()), recipe(skip=(part,))).specs


def test_blocks_have_to_be_called_first_to_last_and_once() -> None:
    blocks = nn.ModuleList([block(), block(), block()])
    check_calls([0, 1, 2], "layers", blocks)
    for order, message in (
        ([0, 2], "calls layers.1 0 times for one text, and not once: it needs other inputs than text"),
        ([0, 0, 1, 2], "calls layers.0 2 times for one text, and not once: a block whose weights are used several times"),
        ([0, 2, 1], "in the order"),
    ):
        with pytest.raises(ValueError, match=message):
            check_calls(order, "layers", blocks)
