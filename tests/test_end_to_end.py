"""Quality on the demonstration model: against plain rounding, on a text that neither training nor calibration saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq_hf import AwqConfig, evaluate

SEQ_LEN = 256
TOKENS = 2048  # of the evaluation where many settings are compared
# (bits, group size, zero points): every width with every group size, and each of them with zero points and without
SETTINGS = [(bits, group_size, (i + j) % 2 == 0) for i, bits in enumerate((2, 3, 4, 8)) for j, group_size in enumerate((-1, 32, 128))]
INNER_BLOCKS = ["layers.1.", "layers.2."]  # left in float where many settings are compared: half the time

Measure = Callable[[Any, int], float]


@pytest.fixture(scope="module")
def divergence(demo_dir: Path) -> Measure:
    """divergence(config, tokens): KL to the original of the model quantized so."""
    original = AutoModelForCausalLM.from_pretrained(demo_dir / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")

    def measure(model: Any, tokens: int) -> float:
        found = evaluate(model, original, demo_dir / "evaluation.txt", tokenizer, SEQ_LEN, tokens)
        assert found.kl is not None
        return found.kl

    return measure


@pytest.fixture(scope="module")
def quantize(demo_dir: Path) -> Callable[..., Any]:
    """quantize(make_config, **options): the demonstration model, quantized in float32: bfloat16 adds noise that hides 8 bits."""

    def run(make_config: Callable[..., Any] = AwqConfig, **options: Any) -> Any:
        config = make_config(calibration=demo_dir / "calibration.txt", **{"seq_len": SEQ_LEN, **options})
        return AutoModelForCausalLM.from_pretrained(demo_dir / "model", quantization_config=config, dtype=torch.float32)

    return run


def losses_above_plain_rounding(model: Any) -> dict[str, tuple[float, float]]:
    return {layer.name: (layer.loss, layer.loss_plain) for layer in model.awq_report.layers if layer.loss > layer.loss_plain}


@pytest.mark.parametrize("bits, share", [(4, 0.55), (3, 0.5)])
def test_share_of_plain_roundings_divergence(bits: int, share: float, quantize: Callable[..., Any], divergence: Measure) -> None:
    model, plain = quantize(bits=bits, samples=32), quantize(AwqConfig.plain_rounding, bits=bits, samples=2)
    assert divergence(model, 5120) <= share * divergence(plain, 5120)
    assert losses_above_plain_rounding(model) == {}
    assert model.awq_report.loss_ratio() < 0.75


@pytest.mark.parametrize("bits, group_size, zero_point", SETTINGS)
def test_never_above_plain_rounding(
    bits: int, group_size: int, zero_point: bool, quantize: Callable[..., Any], divergence: Measure
) -> None:
    options = dict(bits=bits, group_size=group_size, zero_point=zero_point, modules_to_not_convert=INNER_BLOCKS)
    model, plain = quantize(**options, samples=16), quantize(AwqConfig.plain_rounding, **options, samples=1, seq_len=32)
    assert divergence(model, TOKENS) <= divergence(plain, TOKENS)
    assert losses_above_plain_rounding(model) == {}


@pytest.fixture(scope="module")
def plain_divergence(quantize: Callable[..., Any], divergence: Measure) -> float:
    """Of 3 bits, with the inner blocks in float."""
    return divergence(quantize(AwqConfig.plain_rounding, bits=3, modules_to_not_convert=INNER_BLOCKS, samples=1, seq_len=32), TOKENS)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_parts_of_the_method_are_no_worse_than_plain_rounding(
    rounding: str, stream: str, quantize: Callable[..., Any], divergence: Measure, plain_divergence: float
) -> None:
    model = quantize(bits=3, modules_to_not_convert=INNER_BLOCKS, samples=16, rounding=rounding, stream=stream)
    assert divergence(model, TOKENS) <= plain_divergence
    assert losses_above_plain_rounding(model) == {}


def test_few_and_short_samples_do_no_harm(quantize: Callable[..., Any]) -> None:
    for samples, seq_len in ((1, 16), (2, 8), (3, 40)):
        model = quantize(bits=4, samples=samples, seq_len=seq_len, modules_to_not_convert=INNER_BLOCKS)
        assert losses_above_plain_rounding(model) == {}
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.is_floating_point())


def test_same_seed_same_bytes(quantize: Callable[..., Any], tmp_path: Path) -> None:
    files: list[bytes] = []
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        torch.manual_seed(len(files))  # the global generator has no say
        quantize(samples=4, seq_len=64, seed=seed, modules_to_not_convert=INNER_BLOCKS).save_pretrained(tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
