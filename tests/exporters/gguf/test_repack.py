"""Codes that move into blocks as they are."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from awq_hf.affine import choose_grid, dequantize_weight, quantize, to_quantized_weight
from awq_hf.exporters.gguf.repack import TARGETS, default_type, is_exact, misfit, repack, share_unit, types_for
from awq_hf.spec import GROUP_SIZES, QuantizedWeight, QuantSpec

SPECS = [QuantSpec(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in GROUP_SIZES for symmetric in (False, True)]


def quantized(spec: QuantSpec, out: int = 24, width: int = 512, tail: float = 4.0) -> QuantizedWeight:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(tail).sample((out, width)) * 0.02
    weight[0, :256] = 0
    weight[1] = weight[1].abs()
    grid = choose_grid(weight, spec)
    return to_quantized_weight(quantize(weight, grid), grid)


def codes_of(blocks: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], kind: Type) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Codes of Q4_K blocks [n, 144], in the order of the weights."""
    assert kind is Type.Q4_K
    packed = blocks.reshape(-1, 144)[:, 16:].reshape(-1, 4, 1, 32)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(blocks), -1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_type_that_fits_is_exact_or_near(spec: QuantSpec) -> None:
    weight = quantized(spec)
    expected = dequantize_weight(weight).numpy()
    for kind in types_for(spec, 512):
        blocks = repack(weight, kind)
        decoded = gguf.dequantize(blocks, kind)
        relative = np.sqrt(((decoded - expected) ** 2).mean() / (expected**2).mean())
        if is_exact(spec, 512, kind):
            assert np.array_equal(decoded, expected), kind
        else:
            many = 256 // min(spec.group_width(512), 256) if TARGETS[kind].top_scale else 1  # groups in a superblock
            assert relative < {Type.Q2_K: 0.025, Type.Q3_K: 0.003, Type.Q4_1: 0.002}.get(kind, 0.003) * many, kind


def test_what_goes_where() -> None:
    def names(bits: int, group: int, symmetric: bool, width: int = 512) -> list[str]:
        return [kind.name for kind in types_for(QuantSpec(bits, group, symmetric), width)]

    assert names(4, 128, False) == ["Q4_K", "Q4_1", "Q5_0", "Q6_K", "Q8_0"]
    assert names(4, 128, True) == ["Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q6_K", "Q8_0"]
    assert names(4, 32, False, 96) == ["Q4_1", "Q5_0", "Q8_0"]
    assert names(4, 16, False) == ["Q6_K"]
    assert names(3, 128, False) == ["Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q6_K", "Q8_0"]
    assert names(3, 128, True)[0] == "Q3_K"
    assert names(2, 128, False)[:3] == ["Q2_K", "Q3_K", "Q4_0"]
    assert names(8, 128, True) == ["Q8_0"] and names(8, 128, False) == [] and names(4, 16, True, 48) == []
    assert default_type(QuantSpec(4, 128), 512) is Type.Q4_K and default_type(QuantSpec(4, 128), 128) is Type.Q4_1
    assert default_type(QuantSpec(2, 128), 512) is Type.Q2_K and default_type(QuantSpec(2, 32), 512) is Type.Q3_K
    assert default_type(QuantSpec(8, 128), 512) is None
    assert is_exact(QuantSpec(4, 128, True), 512, Type.Q4_1) and not is_exact(QuantSpec(4, 128), 512, Type.Q4_1)


def test_refusals_say_why_and_what_would_do() -> None:
    for spec, width, kind, words in (
        (QuantSpec(4, 128), 128, Type.Q4_K, "rows of 128 do not divide into blocks of 256; types that do: Q4_1, Q5_0, Q8_0"),
        (QuantSpec(4, 16), 512, Type.Q4_1, "32 weights share a scale, and groups are of 16; types that do: Q6_K"),
        (QuantSpec(4, 128), 128, Type.Q4_0, "codes less zero points run from -15 to 15, and it has -8 to 7; types that do: Q4_1"),
        (QuantSpec(8, 128), 128, Type.Q8_0, "-255 to 255, and it has -128 to 127; no type does; store it as F16"),
        (QuantSpec(4, 128), 512, Type.Q2_K, "codes run from 0 to 15, and it has 0 to 3"),
        (QuantSpec(4, 128), 512, Type.IQ4_XS, "IQ4_XS cannot hold these codes: its values are not evenly spaced"),
    ):
        assert words in str(misfit(spec, width, kind))
        with pytest.raises(ValueError, match=kind.name):
            repack(quantized(spec, width=width), kind)
    weight = quantized(QuantSpec(4, 128, True))
    with pytest.raises(ValueError, match="scales are -1 to"):
        repack(replace(weight, scales=weight.scales.index_fill(1, torch.tensor(0), -1)), Type.Q4_0)
    with pytest.raises(ValueError, match="zero points of a symmetric weight differ from 8"):
        repack(replace(weight, zero_points=weight.zero_points + 1), Type.Q4_0)


def test_q4_k_keeps_the_codes() -> None:
    weight = quantized(QuantSpec(4, 64))
    assert np.array_equal(codes_of(repack(weight, Type.Q4_K), Type.Q4_K), weight.q.numpy())


def test_scales_of_bfloat16_models_are_kept() -> None:
    weight = quantized(QuantSpec(4, 128))
    weight = replace(weight, scales=weight.scales.to(torch.bfloat16))
    assert np.array_equal(gguf.dequantize(repack(weight, Type.Q5_0), Type.Q5_0), dequantize_weight(weight).numpy())


def test_fitted_scales_are_better_than_those_that_the_largest_gives() -> None:
    weight = quantized(QuantSpec(4, 32))
    s = weight.scales[2:].float().numpy().reshape(-1, 8)
    unit, integers = share_unit(s, np.ones_like(s), 63)
    plain = (s.max(axis=1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    assert integers.max() <= 63 and np.array_equal(unit, unit.astype(np.float16))
    assert ((unit[:, None] * integers - s) ** 2).sum() < 0.6 * ((plain * np.rint(s / plain) - s) ** 2).sum()


def test_importance_decides_whose_scale_is_hit() -> None:
    weight, importance = quantized(QuantSpec(4, 32)), np.where(np.arange(512) < 32, 1e6, 1).astype(np.float32)
    plain, weighted = (
        np.abs(gguf.dequantize(repack(weight, Type.Q4_K, i), Type.Q4_K) - dequantize_weight(weight).numpy())[:, :32].mean()
        for i in (None, importance)
    )
    assert weighted < 0.5 * plain
    zero = repack(weight, Type.Q4_K, np.zeros(512, np.float32))
    assert np.array_equal(zero, repack(weight, Type.Q4_K))
