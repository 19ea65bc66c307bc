"""Other writers' layouts, code by code against loops over the published descriptions, and their inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awq_hf.kernels.foreign import (
    GEMV,
    GEMV_FAST,
    pack_gemv,
    pack_gemv_fast,
    pad_groups,
    padded_groups,
    scale_zeros,
    tensor_shapes,
    to_gemm,
    unpack_gemv,
    unpack_gemv_fast,
    unscale_zeros,
)
from awq_hf.kernels.layout import GEMM, WIDE, pack

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def sequential_words(row: list[int]) -> list[int]:
    return [sum(row[8 * c + i] << (4 * i) for i in range(8)) for c in range(len(row) // 8)]


def interleaved_words(rows: list[list[int]]) -> list[int]:
    """Four rows of gemv_fast, step by step as AutoAWQ describes its own reordering."""
    reordered = []
    for row in rows:
        new = []
        for block in range(0, len(row), 32):
            pairs = [row[block + 8 * octet + 2 * pair + i] for pair in range(4) for octet in range(4) for i in range(2)]
            for start in range(0, 32, 8):
                new += [pairs[start + place] for place in (0, 2, 4, 6, 1, 3, 5, 7)]
        reordered.append(new)
    words = []
    for start in range(0, len(rows[0]), 64):
        flat = [code for row in reordered for code in row[start : start + 64]]
        words += [sum(flat[4 * w + i] << (4 * i) for i in range(4)) for w in range(64)]
    return words


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_gemv(rows: int, words: int, seed: int) -> None:
    original = codes(rows, 8 * words, seed)
    packed = pack_gemv(original)
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (rows, words))
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == [sequential_words(row) for row in original.tolist()]
    assert torch.equal(unpack_gemv(packed), original)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_gemv_fast(quads: int, blocks: int, seed: int) -> None:
    original = codes(4 * quads, 64 * blocks, seed)
    packed = pack_gemv_fast(original)
    assert (packed.dtype, tuple(packed.shape)) == (torch.int16, (quads, 64 * blocks))
    expected = [interleaved_words(original[4 * i : 4 * i + 4].tolist()) for i in range(quads)]
    assert [[word & 0xFFFF for word in row] for row in packed.tolist()] == expected
    assert torch.equal(unpack_gemv_fast(packed), original)


@given(st.integers(0, 99))
def test_any_words_are_restored_by_packing_what_was_unpacked(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (3, 5), generator=generator).to(torch.int32)
    assert torch.equal(pack_gemv(unpack_gemv(words)), words)
    short = torch.randint(-(2**15), 2**15, (3, 128), generator=generator).to(torch.int16)
    assert torch.equal(pack_gemv_fast(unpack_gemv_fast(short)), short)


@pytest.mark.parametrize(
    ("in_features", "width", "groups"),
    [(128, 128, 8), (4096, 128, 32), (1152, 128, 16), (4096, 64, 64), (1088, 64, 32), (4096, 32, 128), (96, 32, 32), (4096, 4096, 8)],
)
def test_groups_are_padded_to_whole_words_of_the_kernels(in_features: int, width: int, groups: int) -> None:
    assert padded_groups(in_features, width) == groups


@pytest.mark.parametrize("width", [16, 48, 96])
def test_groups_that_no_kernel_has(width: int) -> None:
    with pytest.raises(ValueError, match=f"groups of {width} channels"):
        padded_groups(192, width)


@pytest.mark.parametrize("layout", [GEMV, GEMV_FAST])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_to_gemm_keeps_every_number(layout: str, dtype: torch.dtype, width: int) -> None:
    n_in, n_out = 384, 24
    q, z = codes(n_out, n_in), codes(n_out, n_in // width, seed=1)
    scales = (torch.rand(n_out, n_in // width, generator=torch.Generator().manual_seed(2)) / 64).to(dtype)  # [out, groups]
    if layout == GEMV:
        stored = pack_gemv(q), pack_gemv(pad_groups(z, width, n_in)), pad_groups(scales, width, n_in)
    else:
        stored = pack_gemv_fast(q), pad_groups(scale_zeros(z, scales), width, n_in).T, pad_groups(scales, width, n_in).T
    shapes = tensor_shapes(layout, n_in, n_out, width, 4)
    for tensor, part in zip(stored, ("qweight", "zeros", "scales"), strict=True):
        assert tuple(tensor.shape) == shapes[part][0] and tensor.dtype in shapes[part][1]
    qweight, qzeros, kept = to_gemm(layout, *stored, width)
    assert torch.equal(qweight, pack(q.T.contiguous(), 4)) and torch.equal(qzeros, pack(z.T.contiguous(), 4))
    assert torch.equal(kept, scales.T) and kept.dtype == dtype and all(t.is_contiguous() for t in (qweight, qzeros, kept))


@pytest.mark.parametrize("layout, bits, n_in, n_out", [(GEMV_FAST, 4, 96, 8), (GEMV, 4, 64, 12), (GEMV_FAST, 4, 64, 4), (GEMV, 3, 64, 8)])
def test_matrices_that_a_layout_cannot_hold(layout: str, bits: int, n_in: int, n_out: int) -> None:
    with pytest.raises(ValueError, match=f"the layout {layout} holds 4 bits"):
        tensor_shapes(layout, n_in, n_out, 32, bits)


@pytest.mark.parametrize("layout, bits, words", [(GEMM, 4, 3), (WIDE, 3, 3), (WIDE, 8, 6), (WIDE, 4, 3)])
def test_shapes_of_our_own_layouts(layout: str, bits: int, words: int) -> None:
    shapes = {part: shape for part, (shape, _) in tensor_shapes(layout, 64, 24, 16, bits).items()}
    assert shapes == {"qweight": (64, words), "zeros": (4, words), "scales": (4, 24)}


# Zero points as floating products


@given(st.sampled_from(FLOATS), st.integers(0, 999))
def test_zero_points_come_back_from_products(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(torch.rand(4, 32, generator=generator) * 20 - 16).to(dtype)  # to the subnormals of float16
    scales = torch.where(torch.rand(4, 32, generator=generator) < 0.3, -scales, scales)  # auto-round writes negative ones
    z = codes(4, 32, seed)
    assert torch.equal(unscale_zeros(scale_zeros(z, scales), scales), z)


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_of_a_scale_that_was_rounded_later_are_integers_too(dtype: torch.dtype) -> None:
    z = torch.arange(16, dtype=torch.uint8).repeat(64, 1)
    exact = torch.rand(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 100 + 1e-3
    assert torch.equal(unscale_zeros(-(exact * z).to(dtype), exact.to(dtype)), z)


@pytest.mark.parametrize("value", [7.5, -1.0, 16.0, 3.3, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_points_that_are_no_codes(value: float, dtype: torch.dtype) -> None:
    scales = torch.full((2, 3), 0.25, dtype=dtype)
    scaled = scale_zeros(torch.tensor([[1, 2, 3], [4, 5, 6]]), scales)
    scaled[1, 1] = -value * 0.25
    with pytest.raises(ValueError, match="1 of 6 zero points are no integers from 0 to 15"):
        unscale_zeros(scaled, scales)


def test_a_scale_of_zero_needs_no_zero_point() -> None:
    scales = torch.tensor([[0.0, 0.5]])
    assert unscale_zeros(torch.tensor([[-0.0, -2.0]]), scales).tolist() == [[0, 4]]
    with pytest.raises(ValueError, match="1 of 2"):
        unscale_zeros(torch.tensor([[-3.0, -2.0]]), scales)
