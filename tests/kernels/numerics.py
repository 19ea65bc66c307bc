"""The Triton kernels' numerics: in Triton's interpreter, run by test_triton.py in a process of its own, and on a GPU, by tests/gpu.

Everything is exact: scales are powers of two, inputs small integers, so every product and sum is a float32, and results that the
output dtype holds come out bit for bit whatever the order of the sums.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from awq_hf.kernels import dequantize, dispatch, experts, gemm, gemv, jit, layout, ops, reference, tuning
from awq_hf.kernels.kernel_layout import KernelWeight, to_kernel
from awq_hf.kernels.problem import Problem

DEVICE = "cpu" if jit.INTERPRETED else "cuda"
DTYPES = [torch.float16, torch.bfloat16]
BITS = [4, 8]
# out_features, in_features, group width: whole and partial tiles and blocks
SHAPES = [
    (8, 32, 32),
    (72, 160, 32),
    (16, 512, 32),
    (40, 192, 64),
    (136, 128, 128),
    (24, 384, 128),
    (8, 512, 256),
    (40, 200, 200),
    (8, 512, 512),
]
TOKENS = [1, 8, 9, 17, 33, 65, 129]  # whole and partial tiles of every bucket


def covering(values: Sequence[Any], *pairs: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Two cases for each of `values`, which meet both of every pair: one the other's opposite, and which two, in turn. Any two values of
    different arguments meet in some case. The interpreter takes seconds for what a GPU does in no time: there, all combinations."""
    if not jit.INTERPRETED:
        return [*itertools.product(values, *pairs)]
    choices = itertools.cycle(itertools.product((0, 1), repeat=len(pairs) - 1))
    cases = []
    for value, choice in zip(values, choices, strict=False):
        cases += [(value, *(pair[at ^ opposite] for pair, at in zip(pairs, (0, *choice), strict=True))) for opposite in (0, 1)]
    return cases


MARGIN = 1 << 16  # values


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a launcher allocates is NaN until a kernel writes it, and so is a margin after it, which no kernel may write."""
    empty, new_empty, margins = torch.empty, Tensor.new_empty, []

    def poison(*shape: int, dtype: torch.dtype, device: Any = None) -> Tensor:
        if not dtype.is_floating_point:
            return empty(*shape, dtype=dtype, device=device)
        size = math.prod(shape)
        memory = torch.full((size + MARGIN,), float("nan"), dtype=dtype, device=DEVICE)
        margins.append(memory[size:])
        return memory[:size].view(shape)

    monkeypatch.setattr(torch, "empty", poison)
    # The interpreter passes a device, the launchers do not.
    launcher = lambda self, *shape, **kw: new_empty(self, *shape, **kw) if kw else poison(*shape, dtype=self.dtype)  # noqa: E731
    monkeypatch.setattr(Tensor, "new_empty", launcher)
    yield
    assert all(bool(margin.isnan().all()) for margin in margins), "a kernel wrote outside its output"


@pytest.fixture(autouse=True)
def sums_in_float32() -> Iterator[None]:
    """cuBLAS may add up parts of a product in half precision otherwise, which is its own affair."""
    settings, names = torch.backends.cuda.matmul, [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in before.items():
        setattr(settings, name, value)


class Case:
    """Random integers; x holds few nonzero ones per token, so that results fit the output dtype, 11 bits or bfloat16's 8, or it has one
    rounding to do. The first row has the codes at the ends of their range and the farthest zero points."""

    def __init__(
        self,
        n: int,
        k: int,
        width: int,
        m: int,
        dtype: torch.dtype,
        bits: int = 4,
        symmetric: bool = False,
        nonzero: int = 3,
        seed: int = 0,
    ) -> None:
        generator, top = torch.Generator().manual_seed(n + k + m + seed), 2**bits - 1
        draw: Any = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: E731
        q, zeros = draw(0, top + 1, n, k).to(torch.uint8), draw(0, top + 1, n, k // width).to(torch.uint8)
        q[0], zeros[0] = draw(0, 2, k) * top, draw(0, 2, k // width) * top
        if symmetric:
            zeros.fill_(top // 2 + 1)
        scales = torch.exp2(draw(3 - bits, 6 - bits, n, k // width).float()).half()
        self.x = torch.zeros(m, k).scatter_(1, draw(0, k, m, nonzero), draw(1, 3, m, nonzero).float()).to(dtype)
        self.bias = draw(-4, 5, n).to(dtype)
        self.weight: KernelWeight = to_kernel(q, scales, zeros, bits)
        packed = layout.pack(q.T.contiguous(), bits), layout.pack(zeros.T.contiguous(), bits), scales.T.contiguous()
        self.dense = reference.dequantize(*packed, bits).double()  # [in, out]
        self.exact = self.x.double() @ self.dense
        self.expected = self.rounded(self.exact + self.bias.double())
        for name in ("x", "bias", "dense", "exact", "expected"):
            setattr(self, name, getattr(self, name).to(DEVICE))
        self.weight = KernelWeight(*(part.to(DEVICE) for part in self.weight))
        self.problem = Problem(m=m, n=n, k=k, groups=k // width, dtype=dtype, device=DEVICE, bits=bits)

    def rounded(self, y: Tensor) -> Tensor:
        """In x's dtype. The interpreter cuts float32 off to bfloat16; a GPU rounds."""
        if self.x.dtype == torch.bfloat16 and jit.INTERPRETED:
            return (y.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
        return y.to(self.x.dtype)


@pytest.mark.parametrize("shape, dtype, bits", covering(SHAPES, DTYPES, BITS), ids=str)
def test_gemv(shape: tuple[int, int, int], dtype: torch.dtype, bits: int) -> None:
    case = Case(*shape, 1, dtype, bits, nonzero=shape[1])
    assert gemv.supports(case.problem) is None
    assert torch.equal(gemv.gemv(case.x, *case.weight, case.bias, bits), case.expected)
    assert torch.equal(gemv.gemv(case.x, *case.weight, bits=bits), case.rounded(case.exact))


def test_gemv_of_an_unaligned_view() -> None:
    case = Case(8, 512, 512, 1, torch.float16)
    view = torch.cat((case.x[:, :1], case.x), 1)[:, 1:]
    assert view.data_ptr() % 4 == 2
    assert torch.equal(gemv.gemv(view, *case.weight, case.bias), case.expected)


@pytest.mark.parametrize("bits", BITS)
def test_gemv_reads_a_row_in_several_steps(bits: int) -> None:
    for n, rows, quads in ((8, 1, 8), (24, 16, 4)):
        case = Case(n, 512, 64, 1, torch.float16, bits, nonzero=512)
        config = tuning.GemvConfig(warps=1, stages=1, rows=rows, quads=quads)
        assert torch.equal(gemv.gemv(case.x, *case.weight, case.bias, bits, config), case.expected)


@pytest.mark.parametrize("shape, dtype, bits, splits", covering(SHAPES, DTYPES, BITS, (1, 3)), ids=str)
def test_gemm(shape: tuple[int, int, int], dtype: torch.dtype, bits: int, splits: int) -> None:
    case = Case(*shape, 5, dtype, bits, symmetric=shape[1] == 384)
    assert gemm.supports(case.problem) is None
    assert torch.equal(gemm.gemm(case.x, *case.weight, case.bias, bits, splits=splits), case.expected)
    assert torch.equal(gemm.gemm(case.x, *case.weight, bits=bits, splits=splits), case.rounded(case.exact))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", TOKENS)
def test_every_bucket_of_tokens(m: int, dtype: torch.dtype, bits: int) -> None:
    case = Case(136, 256, 128, m, dtype, bits)
    assert torch.equal(gemm.gemm(case.x, *case.weight, case.bias, bits), case.expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_whole_and_in_part(shape: tuple[int, int, int], dtype: torch.dtype, bits: int) -> None:
    case, (n, k, _) = Case(*shape, 1, torch.float32, bits), shape
    expected = case.dense.T.to(dtype)
    assert torch.equal(dequantize.dequantize(*case.weight, case.dense.new_empty(n, k).to(dtype), bits), expected)
    for start in range(128, k, 128):
        columns = min(256, k - start)
        part = dequantize.dequantize(*case.weight, case.dense.new_empty(n, columns).to(dtype), bits, start)
        assert torch.equal(part, expected[:, start : start + columns])


CHUNKS = (1, 1 << 20)  # bytes: the least rows and columns, and all


@pytest.mark.parametrize(
    "shape, dtype, bits, chunk", covering([(72, 160, 32), (136, 384, 128), (40, 200, 200)], DTYPES, BITS, CHUNKS), ids=str
)
def test_products_with_the_dense_matrix(
    shape: tuple[int, int, int], dtype: torch.dtype, bits: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantize, "CHUNK", chunk)
    case, (n, k, _) = Case(*shape, 5, dtype, bits), shape
    assert torch.equal(dequantize.matmul_dequantized(case.x, *case.weight, case.bias, bits), (case.exact + case.bias.double()).to(dtype))
    assert torch.equal(dequantize.matmul_dequantized(case.x, *case.weight, bits=bits), case.exact.to(dtype))
    generator = torch.Generator().manual_seed(1)
    dy = torch.zeros(5, n).scatter_(1, torch.randint(0, n, (5, 3), generator=generator), 1.0).to(DEVICE, dtype)
    assert torch.equal(dequantize.input_grad(dy, *case.weight, k, bits), (dy.double() @ case.dense.T).to(dtype))


COUNTS = [[0, 5, 0, 1, 17], [0, 0, 23, 0, 0], [16, 8, 24, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("counts, dtype, kind", covering(COUNTS, DTYPES, [((72, 160, 32), 8), ((40, 256, 128), 4)]), ids=str)
def test_experts(counts: list[int], dtype: torch.dtype, kind: tuple[tuple[int, int, int], int]) -> None:
    shape, bits = kind
    cases = [Case(*shape, max(1, count), dtype, bits, seed=expert) for expert, count in enumerate(counts)]
    assert experts.supports(cases[0].problem) is None
    weight = KernelWeight(*(torch.stack(part) for part in zip(*(case.weight for case in cases), strict=True)))
    gather = lambda name: torch.cat([getattr(case, name)[:count] for case, count in zip(cases, counts, strict=True)])  # noqa: E731
    offsets = torch.tensor([0, *counts], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    bias = torch.stack([case.bias for case in cases])
    y = experts.experts_linear(gather("x"), offsets, *weight, bias, bits, tuning.GemmConfig(warps=4, stages=1, bn=64, bm=4))
    assert torch.equal(y, gather("expected"))
    assert torch.equal(experts.experts_linear(gather("x"), offsets, *weight, bits=bits), cases[0].rounded(gather("exact")))


def test_dense_inputs_and_splits_by_the_table() -> None:
    case = Case(64, 512, 32, 4, torch.float16, nonzero=512)
    assert tuning.splits(4, 64, 4096, tuning.gemm_config(4)) == 8  # 32 blocks, at least 4 for each
    assert torch.equal(gemm.gemm(case.x, *case.weight, case.bias), case.expected)


def test_rounded_results_repeat_and_are_near() -> None:
    generator = torch.Generator().manual_seed(0)
    case = Case(64, 512, 128, 3, torch.float16)
    x = torch.randn(3, 512, generator=generator).to(DEVICE, torch.float16)
    for splits in (1, 4):
        y = gemm.gemm(x, *case.weight, splits=splits)
        assert torch.equal(y, gemm.gemm(x, *case.weight, splits=splits))
        torch.testing.assert_close(y.double(), x.double() @ case.dense, rtol=2**-10, atol=1e-3)


def test_unread_padding_of_the_last_block_may_be_anything() -> None:
    case = Case(16, 160, 32, 3, torch.float16)
    case.weight.words[:, 16:] |= ~0x000F000F  # all but fields 0 of both halves, which are the row's last 32 columns
    assert torch.equal(gemm.gemm(case.x, *case.weight, case.bias), case.expected)
    assert torch.equal(gemv.gemv(case.x[:1], *case.weight, case.bias), case.expected[:1])


@pytest.mark.parametrize("count, pairs", [(9, 2), (9, 3), (5, 2), (3, 3)])
def test_any_two_values_of_different_arguments_meet(count: int, pairs: int) -> None:
    cases = covering(range(count), *[("a", "b")] * pairs)
    for one, other in itertools.combinations(range(1 + pairs), 2):
        assert len({(case[one], case[other]) for case in cases}) == (2 * count if one == 0 else 4)


def test_what_runs_the_kernels() -> None:
    assert (os.environ.get("TRITON_INTERPRET") == "1") == jit.INTERPRETED


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "kernel"), [(1, "triton-gemv"), (3, "triton-gemm"), (dispatch.GEMM_TOKENS + 1, "triton-dequantize")])
def test_the_op_comes_to_the_kernel_for_so_many_tokens(bits: int, m: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    case = Case(16, 128, 64, m, torch.float16, bits)
    found, reason = dispatch.choose_layout(case.problem)
    assert (found.name, reason) == ("triton", None)
    chosen = dispatch.choose(case.problem, found)
    assert chosen is not None and chosen.name == kernel
    y = ops.linear(case.x, list(case.weight), case.bias, 16, 2, bits, "triton")
    torch.testing.assert_close(y.double(), case.exact + case.bias.double(), rtol=2e-3, atol=0)
    dy = torch.ones(2, 16, dtype=torch.float16, device=DEVICE)
    dx = ops.input_grad(dy, list(case.weight), 128, 2, bits, "triton")
    torch.testing.assert_close(dx.double(), dy.double() @ case.dense.T, rtol=2e-3, atol=1e-2)
