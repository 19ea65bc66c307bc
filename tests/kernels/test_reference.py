"""The reference ops against loops over single weights, with values whose sums are exact in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_hf.kernels import chunked, reference
from awq_hf.kernels.layout import pack

SHAPES = [(3, 16, 40, 2), (8, 32, 7, 1), (2, 48, 33, 3), (4, 64, 24, 4), (4, 32, 104, 2), (3, 64, 65, 4)]  # bits, in, out, groups


def packed(bits: int, n_in: int, n_out: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qweight, qzeros, scales (powers of two), and the weight [in, out] that they stand for, computed one by one."""
    generator = torch.Generator().manual_seed(bits * n_in + n_out)
    q = torch.randint(0, 2**bits, (n_in, n_out), generator=generator, dtype=torch.uint8)
    z = torch.randint(0, 2**bits, (groups, n_out), generator=generator, dtype=torch.uint8)
    scales = torch.exp2(torch.randint(-6, 1, (groups, n_out), generator=generator)).half()
    width = n_in // groups
    rows = [[(int(q[i, o]) - int(z[i // width, o])) * float(scales[i // width, o]) for o in range(n_out)] for i in range(n_in)]
    return pack(q, bits), pack(z, bits), scales, torch.tensor(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_the_definition(shape: tuple[int, int, int, int]) -> None:
    qweight, qzeros, scales, weight = packed(*shape)
    result = reference.dequantize(qweight, qzeros, scales, shape[0])
    assert result.dtype == torch.float32 and torch.equal(result, weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_of_some_columns_is_that_part_of_the_weight(shape: tuple[int, int, int, int]) -> None:
    qweight, qzeros, scales, weight = packed(*shape)
    for start in range(0, shape[2], 32):
        for stop in {min(start + 32, shape[2]), shape[2], shape[2] + 9}:
            columns = slice(start, stop)
            assert torch.equal(reference.dequantize(qweight, qzeros, scales, shape[0], columns), weight[:, columns])


def test_dequantize_is_exact_for_every_code_and_scale_of_eight_bits() -> None:
    q = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 3)
    z = torch.tensor([[0, 255, 101]], dtype=torch.uint8)
    scales = torch.tensor([[65504.0, 2.0**-24, 1 + 2.0**-10]]).half()
    result = reference.dequantize(pack(q, 8), pack(z, 8), scales, 8)
    assert torch.equal(result.double(), (q.double() - z.double()) * scales.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_exact_on_integers(shape: tuple[int, int, int, int], leading: tuple[int, ...], with_bias: bool) -> None:
    bits, n_in, n_out, _ = shape
    qweight, qzeros, scales, weight = packed(*shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (*leading, n_in), generator=generator).float()
    bias = torch.randint(-9, 10, (n_out,), generator=generator).float() if with_bias else None
    expected = x.double() @ weight.double() + (0 if bias is None else bias.double())
    y = reference.linear(x, qweight, qzeros, scales, bias, bits)
    assert y.dtype == torch.float32 and y.shape == (*leading, n_out)
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_linear_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    qweight, qzeros, scales, weight = packed(3, 16, 40, 2)
    torch.manual_seed(0)
    x, bias = torch.randn(5, 16).to(dtype), torch.randn(40)
    y = reference.linear(x, qweight, qzeros, scales, bias, 3)
    assert y.dtype == dtype
    expected = x.double() @ weight.double() + bias.to(dtype).double()
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]  # sums of up to 16 * 7 * 3
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=tolerance)


@pytest.mark.parametrize("chunk_weights", [1, 16 * 32, 16 * 64 + 5, 1 << 22])
def test_chunks_do_not_change_the_result(chunk_weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qweight, qzeros, scales, weight = packed(3, 16, 137, 2)
    x = torch.randint(-3, 4, (4, 16), generator=torch.Generator().manual_seed(0)).float()
    monkeypatch.setattr(chunked, "CHUNK_WEIGHTS", chunk_weights)
    assert torch.equal(reference.linear(x, qweight, qzeros, scales, None, 3), x @ weight)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 5, 0], [0, 0, 0]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_experts_are_linear_layers_for_their_own_tokens(counts: list[int], with_bias: bool) -> None:
    qweight, qzeros, scales, _ = zip(*(packed(3, 32, 40, 2) for _ in range(3)), strict=True)
    experts = (qweight[0], qweight[1].flip(0), qweight[2].roll(1, 0))  # no two alike
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (sum(counts), 32), generator=generator).float()
    bias = torch.randint(-9, 10, (3, 40), generator=generator).float() if with_bias else None
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    y = reference.experts_linear(x, offsets, torch.stack(experts), torch.stack(qzeros), torch.stack(scales), bias, 3)
    expert = torch.arange(3).repeat_interleave(torch.tensor(counts))
    assert y.shape == (sum(counts), 40)
    for t, e in enumerate(expert.tolist()):
        w = reference.dequantize(experts[e], qzeros[e], scales[e], 3)
        assert torch.equal(y[t], x[t] @ w + (0 if bias is None else bias[e]))
