"""Layers that make up for errors of the residual stream, in a whole run: what is reported is what the block puts out, and it is nearer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import awq_hf
from awq_hf.calibration.stream import model_inputs
from awq_hf.hf_quantizer import calibration_windows

TOKENS = list(torch.randint(3, 90, (64, 64), generator=torch.Generator().manual_seed(5)))  # enough for a regression on 96 inputs
MODULES = ("model.layers.1.mlp.down_proj", "model.layers.1")


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What MODULES put out, [windows, tokens, hidden]."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _args, output, name=name: found.__setitem__(name, output))
        for name in MODULES
    ]
    yield found
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def original(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


def config(**options: Any) -> awq_hf.AwqConfig:
    return awq_hf.AwqConfig(bits=3, group_size=32, calibration=TOKENS, samples=len(TOKENS), seq_len=len(TOKENS[0]), **options)


@pytest.fixture(scope="module")
def runs(original: Any) -> dict[bool, Any]:
    """Whether the residual stream is mended -> the quantized model."""
    return {mends: awq_hf.quantize(copy.deepcopy(original), config(residual=mends)) for mends in (True, False)}


@torch.no_grad()
def held_out_error(original: Any, quantized: Any) -> tuple[float, float]:
    """Mean squared error of what the last block puts out, over tokens of the held-out slice; the mean square of what its MLP adds."""
    plain, recipe = copy.deepcopy(quantized).dequantize(), config().recipe()
    error = energy = tokens = 0.0
    for batch in calibration_windows(original, config(), recipe).batches(recipe.batch_size):
        if batch.held_out:
            with recorded(original) as expected, recorded(plain) as found:
                for model in (original, plain):
                    model(**model_inputs(model, batch))
            width = expected[MODULES[1]].shape[-1]
            difference, added = (found[MODULES[1]] - expected[MODULES[1]]), found[MODULES[0]]
            bias = original.get_submodule(MODULES[0]).bias
            error += float(batch.real_tokens(difference.view(-1, width)).square().sum())
            energy += float(batch.real_tokens((added - bias).view(-1, width)).square().sum())
            tokens += len(batch.real_tokens(difference.view(-1, width)))
    return error / tokens, energy / tokens


def test_the_loss_is_that_of_the_sum(original: Any, runs: dict[bool, Any]) -> None:
    """The last Linear of a block: what it adds to the residual stream makes the block's output."""
    layer = next(layer for layer in runs[True].awq_report.layers if layer.name == MODULES[0])
    error, energy = held_out_error(original, runs[True])
    assert layer.residual is not None and 0 < layer.residual <= 1
    assert layer.loss == pytest.approx(error / energy, rel=0.1)  # the energy is that of the float weight


def test_what_the_blocks_put_out_is_nearer(original: Any, runs: dict[bool, Any]) -> None:
    with_it, without = (held_out_error(original, runs[mends])[0] for mends in (True, False))
    assert with_it < 0.98 * without  # 0.956 here


def test_it_is_reported_where_it_is_done(original: Any, runs: dict[bool, Any], small_config: Callable[..., Any]) -> None:
    mended = {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert {layer.name for layer in runs[True].awq_report.layers if layer.residual is not None} == mended
    others: list[dict[str, Any]] = [dict(correction=False), dict(stream="float")]
    for quantized in (runs[False], *(awq_hf.quantize(copy.deepcopy(original), small_config(**options)) for options in others)):
        assert all(layer.residual is None for layer in quantized.awq_report.layers)
