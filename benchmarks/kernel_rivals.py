"""What benchmarks.kernels compares: our kernels and those of others, all given the same 4-bit weight, and whether they are right."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from awq_hf.kernels import dispatch, ops, reference
from awq_hf.kernels.problem import Problem
from awq_hf.spec import QuantSpec
from benchmarks import gpu

SPEC = QuantSpec(4, 128)
OURS, CUBLAS = "ours", "cuBLAS"
TOLERANCE = 0.02  # root mean square error, relative; a misread weight is off by 1, fp16 sums and scales times zeros in bf16 by some 0.01
SAMPLE = 64  # rows of W whose products are compared
AUTOAWQ_TOKENS = 1024  # from which AutoAWQ dequantizes and multiplies (awq/modules/linear/gemm.py: WQLinearMMFunction)


@dataclass(frozen=True)
class Weight:
    """Canonical codes on a device. Scales have 8 mantissa bits, so that they are the same in float16 and bfloat16."""

    q: Tensor  # uint8 [out, in]
    scales: Tensor  # float16 [out, groups]
    zero_points: Tensor  # uint8 [out, groups]

    @classmethod
    def random(cls, n: int, k: int, device: str = "cuda") -> Weight:
        codes = lambda columns: torch.randint(16, (n, columns), dtype=torch.uint8, device=device)  # noqa: E731
        scales = (torch.rand(n, k // SPEC.group_size, device=device) + 0.5) / (8 * k**0.5)
        return cls(codes(k), scales.bfloat16().half(), codes(k // SPEC.group_size))

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    def dense(self) -> Tensor:
        """float32 [out, in], exact."""
        return reference.scaled(self.q, self.scales, self.zero_points)

    def problem(self, m: int, dtype: torch.dtype) -> Problem:
        n, k = self.shape
        return Problem(m, n, k, self.scales.shape[1], dtype, self.q.device.type, SPEC.bits, self.scales.dtype)


@dataclass
class Contender:
    """run(x [m, in], state) -> [m, out]; copies: states that take turns; takes(m): whether it is meant for so many tokens."""

    name: str
    state: Any
    run: Callable[[Tensor, Any], Tensor]
    bytes: int  # of one state, roughly
    takes: Callable[[int], bool] = lambda m: True

    def __post_init__(self) -> None:
        count = max(2, -(-gpu.cold_bytes() // self.bytes))
        self.copies = [self.state, *(copy.deepcopy(self.state) for _ in range(count - 1))]

    def check(self, x: Tensor, weight: Weight) -> bool:
        """Whether the same input gives the same bits. Raises ArithmeticError when the result is wrong."""
        call = lambda: self.run(x, self.state)  # noqa: E731
        call()  # may be one of a search for the fastest configuration
        y = call()
        error = relative_error(y, x, weight)
        if not error <= TOLERANCE:  # nor if it is not a number
            raise ArithmeticError(f"wrong result: relative error {error:.3g}, where {TOLERANCE} is allowed")
        return torch.equal(y, call())

    def seconds(self, x: Tensor) -> float:
        return gpu.seconds([partial(self.run, x, state) for state in self.copies])


def relative_error(y: Tensor, x: Tensor, weight: Weight) -> float:
    """Root mean square of y - x W^T over that of x W^T in float64, for a sample of W's rows. y: [m, out]; x: [m, in]."""
    n = weight.shape[0]
    if y.shape != (x.shape[0], n):
        raise ArithmeticError(f"wrong result: shape {tuple(y.shape)}, expected {(x.shape[0], n)}")
    rows = torch.linspace(0, n - 1, min(SAMPLE, n), device=y.device).long()
    some = Weight(weight.q[rows], weight.scales[rows], weight.zero_points[rows])
    expected = x.double() @ some.dense().double().T
    return float((y[:, rows].double() - expected).norm() / expected.norm())


def packed_bytes(weight: Weight) -> int:
    return int(weight.q.numel() * SPEC.bits_per_weight(weight.shape[1]) / 8)


# Ours


def ours(weight: Weight, dtype: torch.dtype) -> Contender:
    """The public op, in the layout that a model's weight is brought into."""
    layout, parts = our_layout(weight, dtype)
    how = weight.shape[0], weight.scales.shape[1], SPEC.bits, layout.name
    return Contender(OURS, parts, lambda x, parts: ops.linear(x, parts, None, *how), packed_bytes(weight))


def our_layout(weight: Weight, dtype: torch.dtype) -> tuple[dispatch.Layout, list[Tensor]]:
    """Raises RuntimeError where no kernel runs."""
    layout, reason = dispatch.choose_layout(weight.problem(1, dtype))
    if layout is dispatch.CANONICAL:
        raise RuntimeError(reason or f"{dispatch.VARIABLE} asks for the reference")
    return layout, list(layout.pack(weight.q, weight.scales, weight.zero_points, SPEC.bits))


def our_kernels(weight: Weight, dtype: torch.dtype) -> list[Contender]:
    """Every kernel of the layout by itself, whatever the number of tokens it is used for."""
    layout, parts = our_layout(weight, dtype)

    def contender(kernel: dispatch.Kernel) -> Contender:
        run = lambda x, parts: kernel.run(x, parts, None, weight.problem(x.shape[0], dtype))  # noqa: E731
        takes = lambda m: kernel.supports(weight.problem(m, dtype)) is None  # noqa: E731
        return Contender(kernel.name, parts, run, packed_bytes(weight), takes)

    return [contender(kernel) for kernel in layout.kernels]


# Those of others


def cublas(weight: Weight, dtype: torch.dtype) -> Contender:
    return Contender(CUBLAS, weight.dense().to(dtype), torch.nn.functional.linear, 2 * weight.q.numel())


def tinygemm(weight: Weight, dtype: torch.dtype) -> Contender:
    """torch's own: w = (q - 8) s + (8 - z) s, both terms in bfloat16; two codes a byte, the even column's in the high half."""
    if dtype != torch.bfloat16:
        raise TypeError("takes bfloat16 only")
    octets = weight.q[:, ::2] << 4 | weight.q[:, 1::2]
    words = torch.ops.aten._convert_weight_to_int4pack(octets.contiguous(), 8)
    offsets = (8 - weight.zero_points.float()) * weight.scales.float()
    meta = torch.stack((weight.scales.float(), offsets), -1).to(dtype).transpose(0, 1).contiguous()  # [groups, out, 2]
    run = lambda x, state: torch.ops.aten._weight_int4pack_mm(x, state[0], SPEC.group_size, state[1])  # noqa: E731
    return Contender("tinygemm", (words, meta), run, packed_bytes(weight))


def gemlite(weight: Weight, dtype: torch.dtype) -> Contender:
    _require("gemlite")
    from gemlite.core import DType, GemLiteLinearTriton

    kind, (n, k) = DType.FP16 if dtype == torch.float16 else DType.BF16, weight.shape
    layer = GemLiteLinearTriton(SPEC.bits, SPEC.group_size, k, n, input_dtype=kind, output_dtype=kind)
    layer.pack(weight.q.clone(), weight.scales.to(dtype), weight.zero_points.to(dtype), None)
    return Contender("gemlite", layer, lambda x, layer: layer(x), packed_bytes(weight))


def autoawq(weight: Weight, dtype: torch.dtype) -> Contender:
    if dtype != torch.float16:
        raise TypeError("takes float16 only")
    kernels = _autoawq_kernels()
    qweight, qzeros, scales = dispatch.pack_canonical(weight.q, weight.scales, weight.zero_points, SPEC.bits)

    def run(x: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        qweight, qzeros, scales = state
        if x.shape[0] >= AUTOAWQ_TOKENS:
            return torch.matmul(x, kernels.awq_dequantize_triton(qweight, scales, qzeros))
        return kernels.awq_gemm_triton(x, qweight, scales, qzeros, split_k_iters=8)

    return Contender("AutoAWQ", (qweight, qzeros, scales), run, packed_bytes(weight))


def _autoawq_kernels() -> ModuleType:
    """Its Triton file alone: the package, no longer maintained, does not import beside today's transformers."""
    origin = _require("awq", "autoawq")
    name = "awq_modules_triton_gemm"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, origin.parent / "modules" / "triton" / "gemm.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _require(module: str, package: str | None = None) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"not installed (pip install --no-deps {package or module})")
    return Path(spec.origin)


RIVALS: dict[str, Callable[[Weight, torch.dtype], Contender]] = {
    CUBLAS: cublas,
    "tinygemm": tinygemm,
    "gemlite": gemlite,
    "AutoAWQ": autoawq,
}
