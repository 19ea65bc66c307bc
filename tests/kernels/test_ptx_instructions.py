"""Single instructions of the executor of PTX against the words of the PTX ISA, in integers and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kernels.ptx import warps
from tests.kernels.ptx.arithmetic import OPERATIONS, TYPES

Array = NDArray[Any]

RANDOM = np.random.default_rng(0)


def words(count: int, *more: int) -> Array:
    """Random, and all pairs of the ends of the range and `more`."""
    some = RANDOM.integers(0, 2**32, count, dtype=np.uint32)
    return np.concatenate((some, np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, *more], np.uint32)))


def compute(name: str, *operands: Array) -> Array:
    operation = OPERATIONS[name]
    typed = [operand.view(TYPES[kind]) for operand, kind in zip(operands, operation.operands, strict=True)]
    with np.errstate(all="ignore"):
        return operation.compute(*typed).view(TYPES[operation.result])


# Integers


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def field(word: int, position: int, length: int, is_signed: bool) -> int:
    """The ISA's definition of bfe, bit by bit."""
    position, length = position & 255, length & 255
    sign = 0 if not is_signed or length == 0 else word >> min(position + length - 1, 31) & 1
    bits = [(word >> (position + i) & 1) if i < length and position + i <= 31 else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def permuted(a: int, b: int, selectors: int) -> int:
    source, result = a | b << 32, 0
    for byte in range(4):
        selector = selectors >> 4 * byte & 15
        value = source >> 8 * (selector & 7) & 255
        result |= ((255 if value & 128 else 0) if selector & 8 else value) << 8 * byte
    return result


BINARY = {
    "add.s32": lambda a, b: (a + b) % 2**32,
    "sub.s32": lambda a, b: (a - b) % 2**32,
    "mul.lo.s32": lambda a, b: a * b % 2**32,
    "mul.wide.s32": lambda a, b: signed(a) * signed(b),
    "mul.wide.u32": lambda a, b: a * b,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "setp.lt.s32": lambda a, b: signed(a) < signed(b),
    "setp.lt.u32": lambda a, b: a < b,
    "setp.ge.s32": lambda a, b: signed(a) >= signed(b),
    "shl.b32": lambda a, b: a << b & 2**32 - 1 if b < 32 else 0,
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a) >> min(b, 32),
}


@pytest.mark.parametrize("name", BINARY)
def test_integers(name: str) -> None:
    left, right = words(40), words(20, *range(30, 35)) if not name.startswith("sh") else np.r_[0:40, 2**31, 2**32 - 1].astype(np.uint32)
    a, b = (part.ravel() for part in np.meshgrid(left, right))
    assert [*map(int, compute(name, a, b))] == [BINARY[name](int(x), int(y)) for x, y in zip(a, b, strict=True)]


def test_remainders_have_the_sign_of_what_is_divided() -> None:
    a, b = np.array([7, -7, 7, -7], np.int32), np.array([3, 3, -3, -3], np.int32)
    assert [*compute("rem.s32", a, b)] == [1, -1, 1, -1]


@pytest.mark.parametrize("is_signed", [False, True])
def test_bit_fields(is_signed: bool) -> None:
    values = np.array([0x89ABCDEF, 0x12345678, 0xFFFFFFFF], np.uint32)
    a, position, length = (part.ravel().astype(np.uint32) for part in np.meshgrid(values, np.r_[0:40, 255], np.r_[0:40, 255]))
    found = compute(f"bfe.{'s' if is_signed else 'u'}32", a, position, length)
    assert [*map(int, found)] == [field(int(x), int(p), int(n), is_signed) for x, p, n in zip(a, position, length, strict=True)]


def test_bytes_are_permuted() -> None:
    a, b, selectors = words(100), words(100), words(99, 0x7701)
    assert [*map(int, compute("prmt.b32", a, b, selectors))] == [
        permuted(int(x), int(y), int(s)) for x, y, s in zip(a, b, selectors, strict=True)
    ]


# Floats: bits of the fraction, least exponent of a normal number, largest finite value
FORMATS = {"f32": (23, -126, 2**128 - 2**104), "f16": (10, -14, 65504), "bf16": (7, -126, 2**128 - 2**120)}
ONE = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def rounded(value: Fraction, kind: str) -> float:
    """To nearest, ties to even, as IEEE 754 has it."""
    fraction, least, largest = FORMATS[kind]
    exponent = max(least, math.frexp(value)[1] - 1 if value else least)
    unit = Fraction(2) ** (exponent - fraction)
    nearest = round(value / unit) * unit  # Python's round is to even
    return float(nearest) if abs(nearest) <= largest else float("inf") * (1 if value > 0 else -1)


def floats(kind: str, count: int) -> Array:
    """Bits of finite numbers: small and large, near each other, near ties, subnormal."""
    width = 32 if kind == "f32" else 16
    bits = RANDOM.integers(0, 2**width, count, dtype=np.uint64).astype(f"u{width // 8}")
    bits[: count // 2] = ONE[kind] + RANDOM.integers(0, 40, count // 2).astype(bits.dtype)
    bits[count // 2 : count // 2 + count // 4] = RANDOM.integers(0, 2**10, count // 4)  # subnormal, or nearly
    numbers = torch.from_numpy(bits.view(f"i{width // 8}")).view(DTYPES[kind]).float()
    return bits[numbers.isfinite().numpy()]


def numbers(bits: Array, kind: str) -> list[float]:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(DTYPES[kind]).double().tolist()


def pairs(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


@pytest.mark.parametrize("kind", FORMATS)
def test_fma_rounds_once(kind: str) -> None:
    count = 600
    a, b, c = (RANDOM.permutation(np.tile(floats(kind, count), 2))[:count] for _ in range(3))
    c[::3] ^= c.dtype.type(1 << (8 * c.itemsize - 1))  # of the other sign: what is left of a difference
    if kind == "f32":
        found = numbers(compute("fma.rn.f32", a, b, c), kind)
    else:  # two at a time: the high halves have the same in another order
        both = compute(f"fma.rn.{kind}x2", *(pairs(part, part[::-1]) for part in (a, b, c)))
        found = numbers((both & 0xFFFF).astype(np.uint16), kind)
        assert np.array_equal(both >> 16, (both & 0xFFFF)[::-1])
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*(numbers(part, kind) for part in (a, b, c)), strict=True)]
    assert found == [rounded(value, kind) for value in exact]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions_to_16_bits(kind: str) -> None:
    a = floats("f32", 2000)
    expected = [rounded(Fraction(x), kind) for x in numbers(a, "f32")]
    assert numbers(compute(f"cvt.rn.{kind}.f32", a).view(np.uint16), kind) == expected
    both = compute(f"cvt.rn.{kind}x2.f32", a, np.roll(a, 1))
    assert numbers((both >> 16).astype(np.uint16), kind) == expected  # the first comes to the upper half
    assert numbers((both & 0xFFFF).astype(np.uint16), kind) == expected[-1:] + expected[:-1]
    assert np.isnan(numbers(compute(f"cvt.rn.{kind}.f32", np.array([0x7FFFFFFF, 0xFFC00001], np.uint32)).view(np.uint16), kind)).all()


def test_conversions_of_integers() -> None:
    integers = np.array([0, -255, 2**24 + 1, 2**24 + 3, -(2**31)], np.int32)
    assert [*compute("cvt.rn.f32.s32", integers)] == [rounded(Fraction(int(value)), "f32") for value in integers]
    assert [*compute("cvt.rn.f16.s32", np.array([-255, 2049, 2051, 65520], np.int32))] == [-255, 2048, 2052, np.inf]
    five = np.array([-5], np.int32)
    assert (int(compute("cvt.s64.s32", five)[0]), int(compute("cvt.u64.u32", five)[0])) == (-5, 2**32 - 5)


# Warps


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_tensor_core_has_the_fragments_of_the_isa(kind: str) -> None:
    """9.7.15.5.8, matrix fragments for mma.m16n8k16: small integers, two warps."""
    a, b, c = (RANDOM.integers(-8, 9, (2, *shape)).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    half = lambda value: int(np.float16(value).view(np.uint16)) if kind == "f16" else int(np.float32(value).view(np.uint32)) >> 16  # noqa: E731
    lanes = [(warp, lane >> 2, lane % 4) for warp in range(2) for lane in range(32)]  # warp, groupID, threadID_in_group
    row_a = lambda group, i: group if 0 <= i < 2 or 4 <= i < 6 else group + 8  # noqa: E731
    column_a = lambda member, i: member * 2 + (i & 1) + (8 if i >= 4 else 0)  # noqa: E731
    row_b = lambda member, i: member * 2 + (i & 1) + (8 if i >= 2 else 0)  # noqa: E731
    row_c = lambda group, i: group if i < 2 else group + 8  # noqa: E731
    word = lambda low, high: half(low) | half(high) << 16  # noqa: E731
    a_registers = [
        np.array([word(*(a[w, row_a(g, i), column_a(m, i)] for i in (2 * r, 2 * r + 1))) for w, g, m in lanes], np.uint32) for r in range(4)
    ]
    b_registers = [np.array([word(*(b[w, row_b(m, i), g] for i in (2 * r, 2 * r + 1))) for w, g, m in lanes], np.uint32) for r in range(2)]
    c_registers = [np.array([c[w, row_c(g, i), m * 2 + (i & 1)] for w, g, m in lanes], np.float32) for i in range(4)]
    d = a @ b + c
    expected = [[d[w, row_c(g, i), m * 2 + (i & 1)] for w, g, m in lanes] for i in range(4)]
    assert np.array_equal(np.stack(warps.multiply(a_registers, b_registers, c_registers, kind)), np.array(expected))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_matrices_are_loaded_and_stored_by_rows(matrices: int, transposed: bool) -> None:
    values = np.arange(2 * matrices * 64, dtype=np.uint16).reshape(2, matrices, 8, 8)  # of two warps
    found = warps.load_matrices(values.view(np.uint8).reshape(-1, 16), matrices, transposed)
    for register in range(matrices):
        for thread in range(64):
            row, column = thread % 32 // 4, thread % 4 * 2
            one = values[thread // 32, register].T if transposed else values[thread // 32, register]
            assert int(found[register][thread]) == int(one[row, column]) | int(one[row, column + 1]) << 16
    assert np.array_equal(warps.store_matrices(found, transposed), values.view(np.uint8).reshape(-1, 16))
    assert [*warps.row_threads(64, matrices)[1].ravel()] == [*range(32, 32 + 8 * matrices)]
