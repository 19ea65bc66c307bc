"""Costs: memory adds up what is held, time what is computed, and both end up in a forecast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from awq_hf.inspection import Forecast, costs, inspect
from awq_hf.recipe import Recipe
from awq_hf.spec import QuantSpec


def forecast_of(*arguments: Any, **options: Any) -> Forecast:
    found = inspect(*arguments, **options)
    assert isinstance(found, Forecast)
    return found


GROUPS = (costs.Group(64, (64, 32, 32), 128, True), costs.Group(64, (64,), 64, False), costs.Group(96, (64,), 64, True))
BLOCK = costs.BlockCost(2, 20_000, 20_000, GROUPS, 1.0)
RECIPE = Recipe(spec=QuantSpec(group_size=32), samples=16, seq_len=64)
UNIT = costs.Speed(1, 1, 1, 1)


def memory(block: costs.BlockCost = BLOCK, recipe: Recipe = RECIPE, device: str = "cpu") -> dict[str, int]:
    return costs.peak_memory([BLOCK, block], recipe, device, result_bytes=123_456, hidden=64, itemsize=2)


def test_peak_memory_adds_up_what_is_held() -> None:
    found, tokens = memory(), 16 * 64
    assert (found.pop("quantized model"), found.pop("float weights of one block")) == (123_456, 2 * 20_000)
    unused = found.pop("freed, but not given back")
    assert found == {
        "hidden states": 4 * tokens * 64 * 2,
        "inputs of a block's Linears": tokens * (64 + 64 + 96) * 2,
        "forwards under way": tokens * (2 * 64 + 64 + 128) * 2,  # while the second group waits for the first one's outputs
        "statistics and rounding": 4 * (7 * 96**2 + 18 * 64 * 96),
    }
    without = memory(recipe=replace(RECIPE, residual=False))
    assert without["hidden states"] == 3 * tokens * 64 * 2 and without["statistics and rounding"] == 4 * (7 * 96**2 + 15 * 64 * 96)
    assert unused == pytest.approx(0.4 * sum(found.values()) + 200_000_000, abs=1)
    assert memory(replace(BLOCK, parameters=10**6))["statistics and rounding"] == 4 * 10**6  # the probe's copy


def test_peak_memory_of_the_float_stream_has_no_paused_forwards() -> None:
    less = memory(recipe=replace(RECIPE, stream="float"))
    assert less["forwards under way"] == 0 and less["hidden states"] == 2 * 16 * 64 * 64 * 2
    assert less["statistics and rounding"] == 4 * (4 * 64**2 + 15 * 128 * 64)  # now the first group's


def test_peak_memory_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU works on so many rows at a time as it has threads for; a GPU on all."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tall = replace(BLOCK, groups=(costs.Group(64, (5000,), 5000, True),))
    assert memory(tall)["statistics and rounding"] == 4 * 64 * (7 * 64 + 8 * 5000 + 10 * 3 * 512)
    on_gpu = memory(tall, device="cuda")
    assert on_gpu["statistics and rounding"] == 4 * 64 * (7 * 64 + 18 * 5000)
    assert on_gpu["freed, but not given back"] < 200_000_000


def test_work_is_linear_in_tokens_and_blocks() -> None:
    one = costs.block_work(BLOCK, RECIPE, 1)
    twice = costs.block_work(BLOCK, replace(RECIPE, samples=32), 1)
    assert one.model_flops == 2 * 20_000 * 16 * 64 * 2 * 2 and twice.model_flops == 2 * one.model_flops
    moments = sum(2 * 2 * g.in_features**2 * (2 + 1 / 8) * 16 * 64 for g in GROUPS)
    moments += sum(2 * 2 * 64 * g.in_features * (1 + 1 / 8) * 16 * 64 for g in GROUPS[1:])  # may be added to the residual stream
    assert twice.flops - one.flops == moments  # what does not depend on tokens stays
    more = costs.block_work(replace(BLOCK, count=4), RECIPE, 1)
    assert more.seconds == one.seconds == 1.0 and more.flops == 2 * one.flops
    assert costs.block_work(replace(BLOCK, active=5_000), RECIPE, 1).model_flops == one.model_flops / 4


def test_every_part_of_the_recipe_has_its_price() -> None:
    price = lambda **changes: UNIT.seconds(costs.block_work(BLOCK, replace(RECIPE, **changes), 1))  # noqa: E731
    whole = price()
    for part in (
        dict(scale=None),
        dict(clip=None),
        dict(correction=False),
        dict(residual=False),
        dict(stream="float"),
        dict(rounding="gptq"),
    ):
        assert price(**part) < whole, part
    assert price(rounding="nearest") < price(rounding="gptq")
    assert price(spec=QuantSpec(group_size=32, symmetric=True)) < whole
    unprobed = UNIT.seconds(costs.block_work(replace(BLOCK, probed=None), RECIPE, 1))
    assert unprobed - (whole - 1.0) == pytest.approx(60 * (2 * 20_000 * 96 + 2 * 20_000))
    nothing = replace(BLOCK, groups=tuple(replace(g, rows=()) for g in GROUPS))
    assert costs.block_work(nothing, RECIPE, 1).calls == 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[costs.BlockCost]:
    """The blocks whose time was estimated last."""
    found: list[costs.BlockCost] = []

    def count(blocks: list[costs.BlockCost], *_: Any) -> tuple[float, float]:
        found[:] = blocks
        return 1.0, 2.0

    monkeypatch.setattr(costs, "estimated_seconds", count)
    return found


def test_a_probe_is_counted_once(counted: list[costs.BlockCost], llama_dir: Path, small_config: Callable[..., Any]) -> None:
    forecast_of(str(llama_dir), small_config(modules_to_not_convert=["layers.1.mlp"]))
    first, second = counted
    assert first.count == second.count == 1 and first.probed and second.probed == 0
    assert [len(group.rows) for group in first.groups] == [3, 1, 2, 1] and [len(group.rows) for group in second.groups] == [3, 1, 0, 0]


def test_a_token_is_multiplied_with_few_experts(
    counted: list[costs.BlockCost], random_model: Callable[..., Any], small_config: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=96, mlp_only_layers=[0])
    random_model(transformers.Qwen3MoeConfig(**sizes, **experts)).save_pretrained(tmp_path)
    forecast_of(str(tmp_path), small_config())
    dense, sparse = counted
    assert dense.active == dense.parameters and sparse.parameters - sparse.active == 4 * 3 * 32 * 64 / 2  # 2 of 4 experts


def test_speed_is_measured() -> None:
    speed = costs.measure_speed("cpu", torch.bfloat16)
    assert 1e8 < speed.flops < 1e15 and 1e8 < speed.model_flops < 1e15 and 1e7 < speed.passes < 1e14 and 1e3 < speed.calls < 1e8
    low, high = costs.estimated_seconds([BLOCK], RECIPE, "cpu", torch.float32)
    counted = low / costs.LOW
    assert counted > 1 and high > 2 * counted  # a second of probing is in it; and a run that takes twice as long is within the range


def test_speed_is_that_of_a_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows of its weight, which is the second factor's columns: a CPU without bfloat16 is several times slower by its rows."""
    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                seen.append(args[1].t().is_contiguous() and not args[1].is_contiguous())
            return func(*args, **(kwargs or {}))

    def once(_device: str, amount: float, operation: Callable[[], object]) -> float:
        with Watch():
            operation()
        return amount

    monkeypatch.setattr(costs, "_speed", once)
    costs.measure_speed("cpu", torch.bfloat16)
    assert seen and all(seen)


def test_a_model_that_does_not_fit(llama_dir: Path, small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said = forecast_of(str(llama_dir), small_config())
    assert said.fits is True and said.memory_free is not None and said.memory["this program"] > 10**8
    short = replace(said, memory_free=sum(said.memory.values()) - 1)
    assert short.fits is False and short.to_dict()["fits"] is False
    monkeypatch.setattr(costs, "free_memory", lambda _device: 5)
    monkeypatch.setattr(costs, "this_program", lambda _device: {"this program": 8})
    said = forecast_of(str(llama_dir), small_config())
    assert (said.fits, said.memory_free, said.memory["this program"]) == (False, 13, 8)
