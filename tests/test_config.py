"""AwqConfig: what it accepts, what it refuses, and what it writes into config.json."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf import AwqConfig, QuantSpec

STORED = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}


def test_writes_the_keys_that_other_programs_read_and_no_others() -> None:
    assert AwqConfig().to_dict() == STORED
    assert AwqConfig(3, -1, zero_point=False, modules_to_not_convert=["lm_head"]).to_dict() == {
        **STORED,
        "bits": 3,
        "group_size": -1,
        "zero_point": False,
        "version": "awq_hf",
        "modules_to_not_convert": ["lm_head"],
    }


def test_what_is_written_is_json_whatever_the_calibration() -> None:
    config = AwqConfig(calibration=[torch.arange(5)], tokenizer=object())
    assert json.loads(json.dumps(config.to_dict())) == json.loads(config.to_json_string()) == STORED
    assert json.loads(json.dumps(AwqConfig(calibration=Path("notes.txt")).to_diff_dict()))["quant_method"] == "awq"


def test_reads_what_it_writes() -> None:
    config = AwqConfig(8, 64, zero_point=False, modules_to_not_convert=["vision"])
    assert AwqConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert AwqConfig.from_dict(config.to_dict()).spec() == QuantSpec(8, 64, symmetric=True)


@pytest.mark.parametrize(
    "written",
    [
        {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
        {"bits": 4, "group_size": 64, "checkpoint_format": "gemm"},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "format": "gemm"},
    ],
)
def test_reads_the_names_that_other_programs_wrote(written: dict[str, Any]) -> None:
    config = AwqConfig.from_dict(written)
    assert (config.spec(), config.version) == (QuantSpec(4, 64), "gemm")


def test_keeps_keys_it_does_not_know() -> None:
    written = {**STORED, "modules_in_block_to_quantize": [["a"]], "exllama_config": {"version": 2}}
    assert AwqConfig.from_dict(written).to_dict() == written


def test_returns_unused_keywords_as_transformers_expects() -> None:
    config, unused = AwqConfig.from_dict(STORED, return_unused_kwargs=True, bits=8, nonsense=1)
    assert (config.bits, unused) == (8, {"nonsense": 1})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 5}, "bits=5"),
        ({"group_size": 100}, "group_size=100"),
        ({"rounding": "floor"}, "rounding='floor'"),
        ({"stream": "both"}, "stream='both'"),
        ({"samples": 0}, "samples=0"),
        ({"seq_len": 1}, "seq_len=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"modules_to_not_convert": "lm_head"}, "give a list"),
    ],
)
def test_refuses_values_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AwqConfig(**options)


def test_refuses_options_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="group_sise"):
        AwqConfig(group_sise=64)  # type: ignore[call-arg]


def test_hands_every_option_to_the_recipe() -> None:
    recipe = AwqConfig(3, 64, False, ["a"], samples=5, seq_len=7, seed=11, batch_size=2, rounding="gptq", stream="float").recipe()
    assert recipe.spec == QuantSpec(3, 64, symmetric=True)
    assert (recipe.skip, recipe.samples, recipe.seq_len, recipe.seed, recipe.batch_size) == (("a",), 5, 7, 11, 2)
    assert (recipe.rounding, recipe.stream, recipe.correction) == ("gptq", "float", True)
    assert recipe.scale is not None and recipe.clip is not None
    bare = AwqConfig(scale=False, clip=False, correction=False, residual=False).recipe()
    assert (bare.scale, bare.clip, bare.correction, bare.residual) == (None, None, False, False)


def test_plain_rounding_searches_nothing() -> None:
    recipe = AwqConfig.plain_rounding(bits=3, samples=4).recipe()
    assert (recipe.scale, recipe.clip, recipe.correction, recipe.rounding, recipe.stream) == (None, None, False, "nearest", "float")
    assert (recipe.spec.bits, recipe.samples) == (3, 4)


def test_takes_over_transformers_own_config() -> None:
    own = transformers.AwqConfig(bits=4, group_size=64, modules_to_not_convert=["lm_head"])
    assert type(own) is not AwqConfig and own.__class__.__name__ == AwqConfig.__name__
    ours = AwqConfig.coerce(own)
    assert isinstance(ours, AwqConfig) and (ours.group_size, ours.modules_to_not_convert) == (64, ["lm_head"])
    again = AwqConfig.coerce(ours)  # a copy: what a run adds to it does not reach the user's object
    assert again is not ours and again.to_dict() == ours.to_dict()


def test_a_dictionary_gives_the_options_of_a_run(caplog: pytest.LogCaptureFixture) -> None:
    """transformers takes one in place of a config, and makes it one by `from_dict`."""
    given = {"quant_method": "awq", "bits": 3, "group_size": 32, "samples": 4, "seq_len": 16, "rounding": "nearest"}
    config = AwqConfig.from_dict(given).to_quantize()
    assert (config.bits, config.group_size, config.samples, config.seq_len, config.rounding, config.extra) == (3, 32, 4, 16, "nearest", {})
    assert config.version == "awq_hf" and not caplog.records
    own = AwqConfig.from_dict(transformers.AwqConfig(bits=4, group_size=64).to_dict()).to_quantize()
    assert (own.group_size, own.batch_size, own.extra) == (64, AwqConfig().batch_size, {}) and not caplog.records
    AwqConfig.from_dict({"w_bit": 4, "group_sze": 32}).to_quantize()
    assert [record.message for record in caplog.records] == [
        "quantization_config: AwqConfig has no option of the name group_sze; it is ignored"
    ]


def test_copies_share_the_calibration_and_nothing_that_is_written() -> None:
    calibration = [torch.arange(5)]
    config = AwqConfig(calibration=calibration, tokenizer=object(), modules_to_not_convert=["a"])
    copied = copy.deepcopy(config)
    assert copied.calibration is calibration and copied.tokenizer is config.tokenizer
    copied.modules_to_not_convert.append("b")
    copied.extra["c"] = 1
    assert (config.modules_to_not_convert, config.extra) == (["a"], {})


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_config_can_be_used_again(in_memory: bool, llama_dir: Path, tiny_llama: Callable[..., Any], tokens: list[torch.Tensor]) -> None:
    config = AwqConfig(group_size=32, calibration=tokens, samples=2, seq_len=48)
    before = dict(vars(config))
    for _ in range(2):
        if in_memory:
            awq_hf.quantize(tiny_llama(), config, tokenizer=object())
        else:
            AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=config)
        assert vars(config) == before


def test_config_json_lists_what_stayed_float(quantized_dir: Path) -> None:
    written = json.loads((quantized_dir / "config.json").read_text())["quantization_config"]
    assert written == {**STORED, "group_size": 32, "modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"down_proj": 8}, r"overrides\['down_proj'\] is 8; give \{"),
        ([("down_proj", 8)], r"overrides=\[\('down_proj', 8\)\] is not a dictionary"),
    ],
)
def test_overrides_of_another_form(overrides: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AwqConfig(overrides=overrides)


def test_a_dictionary_is_no_config_for_quantize(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"\{'bits': 4\} is not an AwqConfig; give AwqConfig\("):
        awq_hf.quantize(tiny_llama(), {"bits": 4})  # type: ignore[arg-type]
