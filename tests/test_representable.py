"""Scales with which a GGUF file and a checkpoint hold the same weights, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf.affine import Grid, choose_grid, dequantize_weight, fake_quantize, quantize, to_quantized_weight
from awq_hf.exporters.gguf.repack import repack
from awq_hf.representable import for_q4_1, for_q4_k
from awq_hf.spec import QuantSpec


def weights(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    w = torch.distributions.StudentT(3.0).sample((64, 512)) * 0.02
    w[0] = 0
    w[1, :128] = 0
    w[2] = w[2].abs()
    w[3, 128:256] *= 1e-3
    w[4] *= 1e-4
    w[5] *= 1e4
    return w


def exact(w: Tensor, grid: Grid, kind: Type) -> bool:
    weight = to_quantized_weight(quantize(w, grid), grid)
    return torch.equal(torch.from_numpy(gguf.dequantize(repack(weight, kind), kind)), dequantize_weight(weight))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_q4_1_is_exact_and_scales_hardly_move(bits: int, group: int) -> None:
    w = weights()
    grid = choose_grid(w, QuantSpec(bits, group))
    rounded = replace(grid, scales=for_q4_1(grid.scales, bits))
    assert exact(w, rounded, Type.Q4_1)
    assert bits == 2 or not exact(w, grid, Type.Q4_1)  # 2-bit zero points are powers of two nearly always
    normal = grid.scales > 1e-4  # below, float16 has fewer bits
    assert (rounded.scales / grid.scales - 1)[normal].abs().max() <= 2.0 ** -(11 - bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_q4_k_is_exact_and_scales_hardly_move(bits: int) -> None:
    for seed in range(8):
        w = weights(seed)
        grid = choose_grid(w, QuantSpec(bits, 128))
        adjusted = replace(grid, scales=for_q4_k(grid.scales, grid.zero_points))
        assert exact(w, adjusted, Type.Q4_K) and not exact(w, grid, Type.Q4_K)
        assert torch.equal(adjusted.scales, adjusted.scales.half().float())
        usual = adjusted.scales[6:] / grid.scales[6:] - 1
        assert usual.abs().mean() < 0.00385 and usual.abs().max() < 0.1
        loss, before = ((fake_quantize(w, g) - w).square().mean(dim=1) for g in (adjusted, grid))  # [rows]
        assert (loss <= 1.03 * before + 1e-12).all() and loss[6:].mean() < 1.002 * before[6:].mean()


def test_q4_k_takes_any_zero_points() -> None:
    """All 256 pairs, with scales near each other and far apart."""
    z = torch.cartesian_prod(torch.arange(16), torch.arange(16)).repeat(4, 1)
    torch.manual_seed(0)
    scales = (torch.rand(z.shape) + 0.05) * 0.01
    spec, codes = QuantSpec(4, 128), torch.randint(0, 16, (len(z), 256))
    grid = Grid(for_q4_k(scales, z), z.float(), spec)
    weight = to_quantized_weight(codes.float(), grid)
    assert torch.equal(torch.from_numpy(gguf.dequantize(repack(weight, Type.Q4_K), Type.Q4_K)), dequantize_weight(weight))
    assert torch.equal(for_q4_k(grid.scales, z), grid.scales)  # what is exact stays


def test_refused() -> None:
    with pytest.raises(ValueError, match="3 groups of 128 do not pair up"):
        for_q4_k(torch.ones(2, 3), torch.ones(2, 3))
