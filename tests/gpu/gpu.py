"""What the tests that need a GPU share. `python -m pytest tests/gpu` where there is one; elsewhere each file is one skip."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from awq_hf import AwqLinear, QuantizedWeight, QuantSpec
from awq_hf.experts import ExpertWeights
from awq_hf.kernels import jit

DEVICE = torch.device("cuda", 0)
DEVICES = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]  # 0 is the current one


def require() -> None:
    """Called by every file, before its tests."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
    assert not jit.INTERPRETED, "unset TRITON_INTERPRET: these are tests of compiled kernels"


def weight(n: int, k: int, bits: int = 4, group: int = 128, seed: int = 0, symmetric: bool = False) -> QuantizedWeight:
    """Random codes, and scales that keep results near 1."""
    generator = torch.Generator().manual_seed(seed + n + k)
    spec = QuantSpec(bits, group, symmetric)
    groups = k // spec.group_width(k)
    codes = lambda columns: torch.randint(0, 2**bits, (n, columns), generator=generator, dtype=torch.uint8)  # noqa: E731
    zeros = torch.full((n, groups), 2 ** (bits - 1), dtype=torch.uint8) if symmetric else codes(groups)
    scales = ((torch.rand(n, groups, generator=generator) + 0.5) / (2 ** (bits - 1) * k**0.5)).half()
    return QuantizedWeight(codes(k), scales, zeros, spec)


def linear(stored: QuantizedWeight, dtype: torch.dtype, bias: Tensor | None = None, device: torch.device = DEVICE) -> AwqLinear:
    """On the GPU, in the layout that its kernels read."""
    module = AwqLinear.from_quantized(stored, bias).to(device)
    assert module.prepare(dtype) is None and module.layout == "triton"
    return module


def experts(count: int, n: int, k: int, dtype: torch.dtype, bits: int = 4) -> ExpertWeights:
    module = ExpertWeights.from_quantized([weight(n, k, bits, 32, seed) for seed in range(count)]).to(DEVICE)
    assert module.prepare(dtype) is None and module.layout == "triton"
    return module


def noise(*shape: int, dtype: torch.dtype, seed: int = 0, device: torch.device = DEVICE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square, relative."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`call` in a CUDA graph, after a warm-up on another stream; and the tensor that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y
