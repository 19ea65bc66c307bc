"""Bytes of float rows, of quantized ones and of those that are blocks already; and rows in another order."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from awq_hf.affine import choose_grid, dequantize_weight, quantize, to_quantized_weight
from awq_hf.exporters.gguf.encode import Rows, encode, n_bytes, n_rows, rotary_order, select
from awq_hf.spec import EncodedWeight, QuantSpec

ROWS = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
GRID = choose_grid(ROWS, QuantSpec(4, 128))
QUANTIZED = to_quantized_weight(quantize(ROWS, GRID), GRID)
ENCODED = EncodedWeight(torch.from_numpy(encode(ROWS, Type.Q5_K)), "Q5_K", (8, 512))


def test_blocks_that_are_there_are_written_as_they_are() -> None:
    assert encode(ENCODED, Type.Q5_K).tobytes() == ENCODED.data.numpy().tobytes()
    assert encode(ENCODED, Type.Q5_K).nbytes == n_bytes((8, 512), Type.Q5_K)
    with pytest.raises(ValueError, match="it was encoded as Q5_K, and is to be written as Q4_K"):
        encode(ENCODED, Type.Q4_K)


@pytest.mark.parametrize("value", [ROWS, QUANTIZED, ENCODED], ids=["float", "quantized", "encoded"])
@pytest.mark.parametrize("rows", [slice(2, 5), rotary_order(8, 2)], ids=["slice", "order"])
def test_rows_are_those_of_the_whole(value: Rows, rows: torch.Tensor | slice) -> None:
    part = select(value, rows)
    assert (n_rows(value), n_rows(part)) == (8, len(torch.arange(8)[rows]))
    kind = Type.Q5_K if value is ENCODED else Type.Q4_K
    assert (encode(part, kind) == encode(value, kind)[rows]).all()


def test_rotary_order_puts_the_halves_of_a_head_side_by_side() -> None:
    assert rotary_order(8, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert rotary_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_quantized_rows_become_floats_only_where_floats_are_wanted() -> None:
    exact = dequantize_weight(QUANTIZED)
    assert encode(QUANTIZED, Type.F32).tobytes() == exact.numpy().tobytes()
    assert encode(QUANTIZED, Type.F16).tobytes() == exact.half().numpy().tobytes()
    assert torch.equal(torch.from_numpy(gguf.dequantize(encode(QUANTIZED, Type.Q5_0), Type.Q5_0)), exact)


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q3_K, Type.Q4_0, Type.IQ4_NL])
def test_importance_says_where_errors_matter(kind: Type) -> None:
    columns = torch.ones(512)
    columns[::4] = 100
    errors = [(torch.from_numpy(gguf.dequantize(encode(ROWS, kind, by), kind)) - ROWS)[:, ::4].square().mean() for by in (columns, None)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q4_K, Type.Q6_K, Type.Q4_0, Type.IQ4_XS])
def test_columns_without_importance_are_not_made_zero(kind: Type) -> None:
    """The quantizers by themselves do that to blocks that have none: channels, or a whole expert, that calibration text never used."""
    columns = torch.ones(512)
    columns[:300] = 0
    plain = (torch.from_numpy(gguf.dequantize(encode(ROWS, kind), kind)) - ROWS)[:, :256].square().mean()
    for importance in (columns, torch.zeros(512)):
        found = torch.from_numpy(gguf.dequantize(encode(ROWS, kind, importance), kind))
        assert (found - ROWS)[:, :256].square().mean() < 1.1 * plain
