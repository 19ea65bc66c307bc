"""Products of half-precision matrices on a CPU without instructions for them, whatever this one has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_hf.kernels import chunked, products
from awq_hf.kernels.products import computed_in, matmul

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bfloat16", lambda: False)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_what_a_dtype_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [computed_in(dtype, CPU) for dtype in HALF] == [torch.float32] * 2
    for dtype in (torch.float32, torch.float64, torch.int32, torch.uint8):
        assert computed_in(dtype, CPU) == dtype
    assert [computed_in(dtype, GPU) for dtype in HALF] == HALF
    monkeypatch.setattr(products, "_has_bfloat16", lambda: True)
    assert [computed_in(dtype, CPU) for dtype in HALF] == [torch.bfloat16, torch.float32]


def test_the_question_is_one_that_torch_knows() -> None:
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(3, 5, 7), (70, 130, 200), (300, 8, 1), (0, 4, 4), (4, 0, 4)])
@pytest.mark.parametrize("piece", [1, 64 * 130, 1 << 22])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_in_pieces(
    dtype: torch.dtype, shape: tuple[int, int, int], piece: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, k, n = shape
    monkeypatch.setattr(products, "PIECE", piece)
    a, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1).T if transposed else random(k, n, dtype=dtype, seed=1)
    y = matmul(a, b)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_what_every_layout_can_do_rounds_its_weights_and_nothing_else(dtype: torch.dtype) -> None:
    weight, x, dy = random(72, 40, dtype=torch.float32), random(5, 40, dtype=dtype), random(5, 72, dtype=dtype)
    rounded = weight.to(dtype).float()
    y = chunked.linear(x, lambda rows: weight[rows], 72, None)
    dx = chunked.input_grad(dy, lambda rows: weight[rows], 40)
    torch.testing.assert_close(y, (x.float() @ rounded.T).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(dx, (dy.float() @ rounded).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
