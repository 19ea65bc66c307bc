"""The kernels' layout against a loop over its description, and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awq_hf.kernels.kernel_layout import from_kernel, kernel_group, pack_words, to_kernel, unpack_words, unsupported


def codes(rows: int, columns: int, bits: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(st.integers(1, 4), st.integers(1, 300), st.sampled_from((4, 8)), st.integers(0, 99))
def test_field_i_of_a_half_of_word_j_is_column_32i_plus_2j_and_the_next_one_of_its_unit(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    q = codes(rows, columns, bits, seed)
    words = pack_words(q, bits)
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (rows, 4 * bits * -(-columns // 128))) and words.is_contiguous()
    for row, stored in zip(q.tolist(), words.tolist(), strict=True):
        for c, word in enumerate(stored):
            unit, j = divmod(c, 16)
            for half in range(2):
                at = [512 // bits * unit + 32 * i + 2 * j + half for i in range(16 // bits)]
                fields = [(word >> 16 * half + bits * i) & (2**bits - 1) for i in range(16 // bits)]
                assert fields == [row[k] if k < columns else 0 for k in at]
    assert torch.equal(unpack_words(words, columns, bits), q)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("columns", "groups", "padded", "group"),
    [(256, 2, 2, 128), (256, 1, 1, 0), (160, 5, 8, 32), (192, 3, 4, 64), (32, 1, 1, 0), (768, 3, 3, 256), (200, 1, 1, 0)],
)
def test_groups_cover_whole_blocks(columns: int, groups: int, padded: int, group: int, bits: int) -> None:
    q, z = codes(3, columns, bits), codes(3, groups, bits, seed=1)
    scales = torch.rand(3, groups, generator=torch.Generator().manual_seed(2)).half()
    weight = to_kernel(q, scales, z, bits)
    assert weight.scales.shape == weight.zeros.shape == (3, padded)
    assert kernel_group(weight.words, weight.scales, bits) == group
    assert torch.count_nonzero(weight.scales[:, groups:]) == 0, "padding must not add to a sum"
    assert all(torch.equal(a, b) for a, b in zip(from_kernel(weight, columns, groups, bits), (q, scales, z), strict=True))


@pytest.mark.parametrize(
    ("columns", "groups", "bits", "reason"),
    [
        (96, 2, 4, "not of 48"),
        (100, 3, 4, "100 columns are not divisible by 3"),
        (576, 3, 8, "not of 192"),
        (128, 1, 3, "read 4 or 8 bits, not 3"),
    ],
)
def test_what_does_not_fit_is_refused(columns: int, groups: int, bits: int, reason: str) -> None:
    assert reason in str(unsupported(columns, groups, bits))
    with pytest.raises(ValueError, match=reason):
        to_kernel(codes(2, columns), torch.ones(2, groups), codes(2, groups), bits)
