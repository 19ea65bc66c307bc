"""Packing against an independent reading: one big integer for each row's bit stream, and a table for AutoAWQ's order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awq_hf.kernels.layout import GEMM, WIDE, column_multiple, layout_for, pack, unpack, words_per_row

NIBBLE_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # which of a word's 8 columns each nibble holds, from AutoAWQ's format


def stream(words: Tensor) -> list[int]:
    """Every row of int32 words as one little-endian integer."""
    return [int.from_bytes(row.numpy().tobytes(), "little") for row in words]


def expected_stream(codes: list[int], bits: int) -> int:
    if bits == 4:
        codes = [codes[start + column] for start in range(0, len(codes), 8) for column in NIBBLE_COLUMNS]
    return sum(code << (bits * i) for i, code in enumerate(codes))


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 12)) * 8 if bits == 4 else draw(st.integers(1, 70))
    codes = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(codes, dtype=torch.uint8).view(rows, columns), bits


@given(code_matrices())
def test_packed_words_are_the_bit_stream_and_unpack_is_the_inverse(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape == (len(codes), -(-codes.shape[1] * bits // 32)) == (len(codes), words_per_row(codes.shape[1], bits))
    assert stream(words) == [expected_stream(row, bits) for row in codes.tolist()]  # the bits after the last code are zero
    unpacked = unpack(words, bits, codes.shape[1])
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked, codes)


@given(st.data(), st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4))
def test_any_words_are_restored_by_packing_what_was_unpacked(data: st.DataObject, bits: int, rows: int, periods: int) -> None:
    size = rows * periods * bits  # 32 codes fill `bits` whole words at every width
    words = torch.tensor(data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=size, max_size=size)), dtype=torch.int32)
    words = words.view(rows, periods * bits)
    assert torch.equal(pack(unpack(words, bits, 32 * periods), bits), words)


def test_autoawq_word_by_hand() -> None:
    columns = torch.arange(8, dtype=torch.uint8)[None]
    assert pack(columns, 4).item() == 0x75316420


def test_three_bit_codes_straddle_words_by_hand() -> None:
    codes = torch.zeros(1, 11, dtype=torch.uint8)
    codes[0, 10] = 0b101  # bits 30, 31 and 32 of the stream
    low, high = pack(codes, 3)[0].tolist()
    assert (low & 0xFFFFFFFF, high) == (0b01 << 30, 0b1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_ones_fill_the_sign_bit(bits: int) -> None:
    codes = torch.full((2, 32), 2**bits - 1, dtype=torch.uint8)
    assert bool((pack(codes, bits) == -1).all())
    assert torch.equal(unpack(pack(codes, bits), bits, 32), codes)


def test_packing_does_not_depend_on_memory_layout_and_leaves_its_input() -> None:
    codes = torch.randint(0, 8, (16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = codes.clone()
    for bits in (3, 4, 8):
        assert torch.equal(pack(codes.T.contiguous().T, bits), pack(codes, bits))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("columns", [1, 7, 12, 4095])
def test_columns_that_autoawq_has_no_words_for_are_refused(columns: int) -> None:
    with pytest.raises(ValueError, match=rf"{columns} columns cannot be packed .*multiple of 8 is needed"):
        pack(torch.zeros(1, columns, dtype=torch.uint8), 4)


@pytest.mark.parametrize(("bits", "layout", "multiple"), [(2, WIDE, 1), (3, WIDE, 1), (4, GEMM, 8), (8, WIDE, 1)])
def test_each_width_has_its_layout(bits: int, layout: str, multiple: int) -> None:
    assert layout_for(bits) == layout and column_multiple(bits) == multiple
