"""Recipe: validated once, one value for the whole run, and plain data when saved."""

from __future__ import annotations

import json
from typing import Any

import pytest

from awq_hf.recipe import Recipe
from awq_hf.rounding import ROUNDERS
from awq_hf.spec import QuantSpec
from awq_hf.transforms.awq_scale import ScaleOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, r"rounding='up' is not known; choose one of \['nearest', 'gptq', 'descent'\]"),
        ({"stream": "both"}, "stream='both' is not known; choose 'float' or 'quantized'"),
        ({"shrinkage": 1.0}, r"shrinkage=1.0 is not in \[0, 1\); 0 takes correlations as they are, 0.3 is the default"),
        ({"samples": 0}, "samples=0 is too small; give at least 1"),
        ({"seq_len": 1}, "seq_len=1 is too small; give at least 2"),
        ({"batch_size": -3}, "batch_size=-3 is too small; give at least 1"),
    ],
)
def test_wrong_values_are_refused_with_value_rule_and_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="group_size"):
        Recipe(group_size=32)  # type: ignore[call-arg]


@pytest.mark.parametrize("rounding", ROUNDERS)
def test_every_rounding_method_of_the_table_is_accepted(rounding: str) -> None:
    assert Recipe(rounding=rounding).rounding == rounding


def test_defaults_are_a_new_value_each_time_and_equal() -> None:
    assert Recipe() == Recipe() and Recipe() != Recipe(seed=1)


def test_there_are_residuals_to_mend_only_where_the_quantized_stream_is_corrected() -> None:
    assert Recipe().mends_residuals
    for options in (dict(residual=False), dict(correction=False), dict(stream="float")):
        assert not Recipe(**options).mends_residuals


def test_skipping_is_by_substring() -> None:
    recipe = Recipe(skip=("mlp", "layers.1."))
    assert recipe.spec_for("model.layers.0.mlp.up") is None and recipe.spec_for("model.layers.1.attn.q") is None
    assert recipe.spec_for("model.layers.11.attn.q") == Recipe().spec_for("anything") == QuantSpec()


def test_dict_is_plain_json() -> None:
    recipe = Recipe(spec=QuantSpec(3, 32, True), clip=None, scale=ScaleOptions(steps=7), skip=("lm_head",))
    saved = json.loads(json.dumps(recipe.to_dict()))
    assert saved["spec"] == {"bits": 3, "group_size": 32, "symmetric": True}
    assert saved["clip"] is None and saved["scale"] == {"steps": 7} and saved["skip"] == ["lm_head"]
    assert set(saved) == set(Recipe.__dataclass_fields__)
