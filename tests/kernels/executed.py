"""The numbers that the compiled kernels compute, without a GPU: launchers run on tensors of the CPU, and what Triton compiles for them to
PTX for sm_80 (mma.sync) and sm_90 (wgmma) is executed by tests/kernels/ptx. Run by test_triton.py, in a process of its own.

Unlike Triton's interpreter this runs the compiler's work: layouts, pipelining, barriers, what it makes of the assembly and of bfloat16.
It is not a GPU: what the assembler makes of the PTX is not seen, nor the order and rounding of a tensor core's sums. Cases are those of
numerics.py, exact whatever that order; a few of each kind, since every one is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from awq_hf.kernels import dequantize, experts, gemm, gemv, jit, tuning
from awq_hf.kernels.kernel_layout import KernelWeight
from tests.kernels import numerics
from tests.kernels.numerics import Case
from tests.kernels.ptx.launch import Device, device
from tests.kernels.ptx.memory import Violation

__all__ = ["device"]  # a fixture

HALF, BRAIN = torch.float16, torch.bfloat16
NO_BIAS = False
FEW = 3  # of a token's values are not 0: its results have few bits, which the output holds, and all weigh. With more, all codes do.


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "DEVICE", "cpu")


# Compute capability; shapes: out_features, in_features, group width. in_features up to 1024, 2048 and beyond have 1, 2 and 4 warps
GEMV = [
    (80, (24, 384, 128), HALF, 4, True),
    (80, (24, 384, 128), BRAIN, 4, True),
    (80, (24, 384, 128), HALF, 8, True),
    (80, (24, 384, 128), BRAIN, 8, True),
    (80, (72, 160, 32), BRAIN, 4, NO_BIAS),
    (80, (72, 160, 32), HALF, 8, NO_BIAS),
    (80, (40, 200, 200), BRAIN, 4, True),
    (80, (16, 1280, 256), BRAIN, 4, True),
    (80, (8, 2304, 64), HALF, 4, True),
    (90, (8, 2304, 2304), BRAIN, 8, True),
    (90, (72, 160, 32), HALF, 4, True),
]


@pytest.mark.parametrize("sm, shape, dtype, bits, has_bias", GEMV)
def test_gemv(sm: int, shape: tuple[int, int, int], dtype: torch.dtype, bits: int, has_bias: bool, device: Device) -> None:
    device.sm = sm
    for case in (Case(*shape, 1, dtype, bits, nonzero=nonzero) for nonzero in (FEW, shape[1])):
        y = gemv.gemv(case.x, *case.weight, case.bias if has_bias else None, bits)
        assert torch.equal(y, case.expected if has_bias else case.rounded(case.exact))
    assert device.launched == ["gemv_kernel"] * 2


def test_gemv_of_a_view_that_is_not_aligned(device: Device) -> None:
    case = Case(8, 512, 512, 1, HALF)
    view = torch.cat((case.x[:, :2], case.x), 1)[:, 2:]
    assert view.data_ptr() % 16 == 4
    assert torch.equal(gemv.gemv(view, *case.weight, case.bias), case.expected)


# Tokens: of every bucket of tiles
GEMM = [
    (80, (136, 640, 128), 8, HALF, 4, 1, True),
    (80, (136, 640, 128), 8, BRAIN, 4, 1, True),
    (80, (136, 640, 128), 8, BRAIN, 8, 1, True),
    (80, (136, 640, 128), 9, HALF, 4, 1, True),
    (80, (136, 640, 128), 17, BRAIN, 4, 1, True),
    (80, (136, 640, 128), 33, HALF, 4, 1, True),
    (80, (136, 640, 128), 70, BRAIN, 4, 1, True),
    (80, (136, 640, 128), 70, HALF, 8, 1, True),
    (80, (72, 160, 32), 5, BRAIN, 4, 1, True),
    (80, (72, 160, 32), 5, HALF, 8, 1, NO_BIAS),
    (80, (40, 192, 64), 5, HALF, 4, 1, NO_BIAS),
    (80, (40, 200, 200), 5, HALF, 4, 1, True),
    (80, (40, 200, 200), 5, BRAIN, 8, 1, True),
    (80, (24, 1152, 128), 5, HALF, 4, 3, True),
    (80, (24, 1152, 128), 5, BRAIN, 4, 3, NO_BIAS),
    (90, (136, 640, 128), 8, HALF, 4, 1, True),
    (90, (136, 640, 128), 17, BRAIN, 4, 1, True),
    (90, (136, 640, 128), 70, HALF, 4, 1, True),
    (90, (136, 640, 128), 70, BRAIN, 8, 1, True),
    (90, (72, 160, 32), 9, HALF, 8, 1, NO_BIAS),
    (90, (40, 200, 200), 5, BRAIN, 4, 1, True),
    (90, (40, 1152, 64), 33, BRAIN, 4, 2, True),
]


@pytest.mark.parametrize("sm, shape, m, dtype, bits, splits, has_bias", GEMM)
def test_gemm(
    sm: int, shape: tuple[int, int, int], m: int, dtype: torch.dtype, bits: int, splits: int, has_bias: bool, device: Device
) -> None:
    device.sm = sm
    for case in (Case(*shape, m, dtype, bits, symmetric=m == 9, nonzero=nonzero) for nonzero in (FEW, shape[1])):
        y = gemm.gemm(case.x, *case.weight, case.bias if has_bias else None, bits, splits=splits)
        assert torch.equal(y, case.expected if has_bias else case.rounded(case.exact))
    assert device.launched == ["gemm_kernel", "reduce_kernel"][: 1 + (splits > 1)] * 2


@pytest.mark.parametrize("sm, dtype", [(80, BRAIN), (80, HALF), (90, HALF)])
def test_sums_that_are_not_exact_are_near(sm: int, dtype: torch.dtype, device: Device) -> None:
    device.sm, case = sm, Case(136, 640, 128, 8, dtype)
    x = torch.randn(8, 640, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = gemm.gemm(x, *case.weight, case.bias, splits=1)
    exact = x.double() @ case.dense + case.bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("sm, dtype, bits, m", [(80, HALF, 4, 5), (80, BRAIN, 8, 5), (80, HALF, 8, 70), (90, BRAIN, 4, 5)])
def test_experts(sm: int, dtype: torch.dtype, bits: int, m: int, device: Device) -> None:
    device.sm, counts = sm, [0, m, 0, 1, 17]
    cases = [Case(72, 672, 32, max(1, count), dtype, bits, seed=expert, nonzero=672) for expert, count in enumerate(counts)]
    weight = KernelWeight(*(torch.stack(part) for part in zip(*(case.weight for case in cases), strict=True)))
    gather = lambda name: torch.cat([getattr(case, name)[:count] for case, count in zip(cases, counts, strict=True)])  # noqa: E731
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bias = torch.stack([case.bias for case in cases])
    y = experts.experts_linear(gather("x"), offsets, *weight, bias, bits, tuning.gemm_config(m))
    assert torch.equal(y, gather("expected")) and device.launched == ["experts_kernel"]


@pytest.mark.parametrize(
    "sm, shape, dtype, bits, start",
    [
        (80, (72, 160, 32), HALF, 4, 0),
        (80, (72, 160, 32), BRAIN, 8, 0),
        (80, (24, 384, 128), HALF, 8, 128),
        (80, (40, 200, 200), BRAIN, 4, 0),
        (80, (16, 512, 256), torch.float32, 4, 256),
        (90, (40, 192, 64), BRAIN, 4, 128),
    ],
)
def test_dequantize(sm: int, shape: tuple[int, int, int], dtype: torch.dtype, bits: int, start: int, device: Device) -> None:
    device.sm, case, (n, k, _) = sm, Case(*shape, 1, torch.float32, bits), shape
    out = device.allocate(n, k - start, dtype=dtype)
    assert torch.equal(dequantize.dequantize(*case.weight, out, bits, start), case.dense.T[:, start:].to(dtype))
    assert device.launched == ["dequantize_kernel"]


def test_the_products_with_the_dense_matrix(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By chunks of it: rows for Y, columns for dX."""
    monkeypatch.setattr(dequantize, "CHUNK", 1)
    case = Case(136, 384, 128, 5, HALF)
    y = dequantize.matmul_dequantized(case.x, *case.weight, case.bias)
    assert torch.equal(y, case.expected) and device.launched == ["dequantize_kernel"] * 3
    dy = torch.eye(5, 136, dtype=HALF)
    dx = dequantize.input_grad(dy, *case.weight, 384)
    assert torch.equal(dx, (dy.double() @ case.dense.T).to(HALF)) and device.launched == ["dequantize_kernel"] * 6


# That all this can fail: the compiled code is changed


def product() -> tuple[Tensor, Tensor]:
    case = Case(136, 640, 128, 8, HALF, nonzero=640)
    return gemm.gemm(case.x, *case.weight, case.bias, splits=1), case.expected


def changed(pattern: str, replacement: str, which: int = 0) -> Callable[[str], str]:
    """The PTX with one place that matches replaced."""

    def change(text: str) -> str:
        match = [*re.finditer(pattern, text)][which]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(r"(and\.b32\s+%r\d+, %r\d+), 983055;", r"\1, 983047;"),  # the mask of two codes of 4 bits, 000F000F
        changed(r"shr\.u32\s+(%r\d+), (%r\d+), 12;", r"shr.u32 \1, \2, 8;", -1),
        changed(r"(fma\.rn\.f16x2 d), (%r\d+), d, (%r\d+);", r"\1, \3, d, \2;"),  # the zero points less the codes
        changed(r"mov\.b32 \{(%rs\d+), (%rs\d+)\}, (d)\b", r"mov.b32 {\2, \1}, \3"),  # columns change places
        changed(r"(mma\.sync[^{]*\{[^}]*\}, \{) (%r\d+), (%r\d+),", r"\1 \3, \2,"),  # rows do
        changed(r"fma\.rn\.f32(\s+%r\d+, %r\d+, %r\d+), %r\d+;", r"mul.f32\1;"),  # a group is not added to those before it
    ],
)
def test_wrong_code_computes_something_else(change: Callable[[str], str], device: Device) -> None:
    device.change = change
    found, expected = product()
    assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    "sm, change, message",
    [
        (80, changed(r"bar\.sync\s+0;", "", 0), "a warp reads what another wrote to shared memory"),
        (80, changed(r"bar\.sync\s+0;", "", 1), "a warp writes what another read from shared memory"),
        (80, changed(r"cp\.async\.wait_group\s+\d+;", ""), "a cp.async is still on its way"),
        (80, changed(r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+);", r"setp.ge.s32\1;"), "bytes at"),  # rows that there are not
        (80, changed(r"@%p\d+ (st\.global)", r"\1"), "out is written twice"),  # by threads whose rows there are not
        (80, changed(r"shl\.b32(\s+%r\d+, %r\d+), 6;", r"shl.b32\1, 5;"), "out is written twice"),  # tiles overlap
        (90, changed(r"bar\.sync\s+0;", "", 1), "a warp writes what another read from shared memory"),
        (90, changed(r"fence\.proxy\.async\.shared::cta;", ""), "wgmma reads what was not fenced"),
        (90, changed(r"wgmma\.fence\.sync\.aligned;", ""), "was not fenced since it was written"),
        (90, changed(r"wgmma\.wait_group\.sync\.aligned 0;", ""), "a result that was not waited for"),
    ],
)
def test_code_that_does_what_it_may_not_is_refused(sm: int, change: Callable[[str], str], message: str, device: Device) -> None:
    device.sm, device.change = sm, change
    with pytest.raises(Violation, match=re.escape(message)):
        product()


def test_this_is_the_compiler() -> None:
    assert not jit.INTERPRETED
