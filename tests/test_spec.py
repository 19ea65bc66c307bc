"""QuantSpec and QuantizedWeight: what they accept, what they refuse and how they say so."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from awq_hf.spec import BITS, GROUP_SIZES, QuantizedWeight, QuantSpec


def weight_of(q: tuple[int, int], scales: tuple[int, int], zero_points: tuple[int, int], spec: QuantSpec) -> QuantizedWeight:
    return QuantizedWeight(
        torch.zeros(q, dtype=torch.uint8), torch.ones(scales, dtype=torch.float16), torch.zeros(zero_points, dtype=torch.uint8), spec
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_listed_combination_is_accepted(bits: int, group_size: int) -> None:
    spec = QuantSpec(bits, group_size)
    assert spec.max_code + 1 == 2 * spec.middle_code == 1 << bits


@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4, "4", None])
def test_unsupported_bits_are_refused_with_value_and_choices(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits=.* is not supported; choose one of \[2, 3, 4, 8\]") as error:
        QuantSpec(bits=bits)
    assert repr(bits) in str(error.value)


@pytest.mark.parametrize("group_size", [0, 1, 100, -2, 512, "128", None])
def test_unsupported_group_size_is_refused_with_value_and_choices(group_size: int) -> None:
    with pytest.raises(ValueError, match=r"group_size=.* is not supported; choose one of \[-1, 16,") as error:
        QuantSpec(group_size=group_size)
    assert repr(group_size) in str(error.value)


def test_spec_is_an_immutable_value() -> None:
    assert QuantSpec(4, 128) == QuantSpec() and hash(QuantSpec(4, 128)) == hash(QuantSpec())
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 3  # type: ignore[misc]


def test_group_width_is_the_group_size_or_the_whole_row() -> None:
    assert QuantSpec(group_size=32).group_width(96) == 32
    assert QuantSpec(group_size=-1).group_width(97) == 97
    assert QuantSpec(group_size=-1).divides(97) and not QuantSpec(group_size=16).divides(97)


def test_group_width_that_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(ValueError, match="in_features 96 is not divisible by group_size 64") as error:
        QuantSpec(group_size=64).group_width(96)
    assert str(error.value).endswith("[-1, 16, 32]")


@pytest.mark.parametrize(
    ("spec", "in_features", "expected"),
    [(QuantSpec(4, 128), 256, 4.15625), (QuantSpec(2, 16), 64, 3.125), (QuantSpec(8, -1), 96, 8.25), (QuantSpec(3, 32, True), 32, 3.59375)],
)
def test_bits_per_weight_counts_scale_and_zero_point(spec: QuantSpec, in_features: int, expected: float) -> None:
    assert spec.bits_per_weight(in_features) == expected


def test_quantized_weight_knows_its_shape() -> None:
    assert weight_of((6, 32), (6, 2), (6, 2), QuantSpec(4, 16)).shape == (6, 32)


@pytest.mark.parametrize(("scales", "zero_points", "named"), [((6, 1), (6, 2), "scales"), ((6, 2), (2, 6), "zero_points")])
def test_quantized_weight_of_inconsistent_shapes_is_refused(scales: tuple[int, int], zero_points: tuple[int, int], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named} has shape .*, expected \(6, 2\) for q \(6, 32\)"):
        weight_of((6, 32), scales, zero_points, QuantSpec(4, 16))


def test_quantized_weight_whose_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features 40 is not divisible by group_size 16"):
        weight_of((6, 40), (6, 2), (6, 2), QuantSpec(4, 16))
