"""What each thread computes by itself: instructions without memory and without other threads, as the PTX ISA defines them (9.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx import floats

Array = NDArray[Any]

# bf16 has no type of numpy's: its bits
TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **dict(f16=np.float16, bf16=np.uint16, f16x2=np.uint32, bf16x2=np.uint32, f32=np.float32),
}


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else np.dtype(TYPES[kind]).itemsize * 8


class Operation(NamedTuple):
    result: str  # type
    operands: tuple[str, ...]  # types
    compute: Callable[..., Array]


OPERATIONS: dict[str, Operation] = {}


def _define(name: str, result: str, operands: str, compute: Callable[..., Array]) -> None:
    OPERATIONS[name] = Operation(result, tuple(operands.split()), compute)


# Integers. Sums and low halves of products are the same for both signs, and numpy wraps around.


def _shift(shift: Callable[[Array, Array], Array], fill: bool) -> Callable[[Array, Array], Array]:
    """Of more bits than there are, all are shifted out: zeros come in, or copies of the sign."""

    def compute(a: Array, b: Array) -> Array:
        bits = a.dtype.itemsize * 8
        shifted = shift(a, np.minimum(b, bits - 1).astype(a.dtype))
        return shifted if fill else np.where(b < bits, shifted, 0).astype(a.dtype)

    return compute


def _field(a: Array, position: Array, length: Array) -> Array:
    """bfe: what lies beyond the register is the sign, or 0."""
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    signed = a.dtype == np.int32
    inside = np.clip(32 - position, 0, np.minimum(length, 32))
    value = (a.view(np.uint32).astype(np.int64) >> position) & ((1 << inside) - 1)
    sign = (a.view(np.uint32).astype(np.int64) >> np.minimum(position + length - 1, 31)) & 1 if signed else np.zeros_like(value)
    return np.where((length > 0) & (sign == 1), value | (-1 << inside), value).astype(np.uint32)


def _permute(a: Array, b: Array, selectors: Array) -> Array:
    """prmt: bytes of b and a, b's the higher ones; a selector's fourth bit takes copies of the byte's sign."""
    source = np.stack((a, b), -1).view(np.uint8).astype(np.uint32)  # [lanes, 8]
    result = np.zeros_like(a)
    for byte in range(4):
        selector = (selectors >> (4 * byte)) & 15
        chosen = np.take_along_axis(source, (selector & 7).astype(np.int64)[:, None], 1)[:, 0]
        result |= np.where(selector & 8, (chosen >> 7) * 255, chosen).astype(np.uint32) << (8 * byte)
    return result


def _select(a: Array, b: Array, first: Array) -> Array:
    return np.where(first, a, b)


def _remainder(a: Array, b: Array) -> Array:
    if (b == 0).any():
        raise ZeroDivisionError("rem by 0, which has no defined result")
    return np.fmod(a, b)  # has the sign of a


for _type in ("b16", "b32", "b64", "pred"):
    _define(f"and.{_type}", _type, f"{_type} {_type}", np.bitwise_and)
    _define(f"or.{_type}", _type, f"{_type} {_type}", np.bitwise_or)
    _define(f"xor.{_type}", _type, f"{_type} {_type}", np.bitwise_xor)
for _type in ("b16", "b32", "b64"):
    _define(f"shl.{_type}", _type, f"{_type} u32", _shift(np.left_shift, False))
    _define(f"selp.{_type}", _type, f"{_type} {_type} pred", _select)
for _bits in ("16", "32", "64"):
    _define(f"shr.u{_bits}", f"u{_bits}", f"u{_bits} u32", _shift(np.right_shift, False))
    _define(f"shr.s{_bits}", f"s{_bits}", f"s{_bits} u32", _shift(np.right_shift, True))
for _bits in ("32", "64"):
    _unsigned = f"u{_bits}"
    _define(f"add.s{_bits}", _unsigned, f"{_unsigned} {_unsigned}", np.add)
    _define(f"sub.s{_bits}", _unsigned, f"{_unsigned} {_unsigned}", np.subtract)
    _define(f"neg.s{_bits}", _unsigned, _unsigned, np.negative)
    _define(f"mul.lo.s{_bits}", _unsigned, f"{_unsigned} {_unsigned}", np.multiply)
    for _type in (f"s{_bits}", f"u{_bits}", f"b{_bits}"):
        _define(f"setp.eq.{_type}", "pred", f"{_type} {_type}", np.equal)
        _define(f"setp.ne.{_type}", "pred", f"{_type} {_type}", np.not_equal)
    for _type in (f"s{_bits}", f"u{_bits}"):
        _define(f"setp.lt.{_type}", "pred", f"{_type} {_type}", np.less)
        _define(f"setp.le.{_type}", "pred", f"{_type} {_type}", np.less_equal)
        _define(f"setp.gt.{_type}", "pred", f"{_type} {_type}", np.greater)
        _define(f"setp.ge.{_type}", "pred", f"{_type} {_type}", np.greater_equal)
        _define(f"min.{_type}", _type, f"{_type} {_type}", np.minimum)
        _define(f"max.{_type}", _type, f"{_type} {_type}", np.maximum)
for _kind in "su":
    _narrow, _wide = f"{_kind}32", f"{_kind}64"
    _define(f"mul.wide.{_narrow}", _wide, f"{_narrow} {_narrow}", lambda a, b: a.astype(f"{a.dtype.kind}8") * b)
    _define(f"mad.wide.{_narrow}", _wide, f"{_narrow} {_narrow} {_wide}", lambda a, b, c: a.astype(f"{a.dtype.kind}8") * b + c)
    _define(f"bfe.{_narrow}", "u32", f"{_narrow} u32 u32", _field)
_define("not.pred", "pred", "pred", np.logical_not)
_define("mad.lo.s32", "u32", "u32 u32 u32", lambda a, b, c: a * b + c)
_define("rem.s32", "s32", "s32 s32", _remainder)
_define("prmt.b32", "b32", "b32 b32 b32", _permute)

# Floats: without a suffix, add, sub and mul round to nearest, and subnormal numbers are kept

for _suffix in ("f32", "rn.f32"):
    _define(f"add.{_suffix}", "f32", "f32 f32", np.add)
    _define(f"sub.{_suffix}", "f32", "f32 f32", np.subtract)
    _define(f"mul.{_suffix}", "f32", "f32 f32", np.multiply)
_define("mul.f16", "f16", "f16 f16", np.multiply)  # the product is exact in numpy's float32, and rounded once
_define("fma.rn.f32", "f32", "f32 f32 f32", floats.fma_f32)
_define("fma.rn.f16x2", "f16x2", "f16x2 f16x2 f16x2", floats.fma_f16x2)
_define("fma.rn.bf16x2", "bf16x2", "bf16x2 bf16x2 bf16x2", floats.fma_bf16x2)

# Conversions. Of two floats, the first comes to the upper half.

for _to, _from in (("s16", "s8"), ("s64", "s32"), ("u32", "u16"), ("u64", "u32"), ("u16", "u32"), ("u32", "u64")):
    _define(f"cvt.{_to}.{_from}", _to, _from, lambda a, dtype=TYPES[_to]: a.astype(dtype))
for _from in ("u16", "s32", "u32"):
    _define(f"cvt.rn.f32.{_from}", "f32", _from, lambda a: a.astype(np.float32))
_define("cvt.rn.f16.s32", "f16", "s32", lambda a: a.astype(np.float64).astype(np.float16))
_define("cvt.f32.f16", "f32", "f16", lambda a: a.astype(np.float32))
_define("cvt.f32.bf16", "f32", "bf16", floats.widen_bf16)
_define("cvt.rn.f16.f32", "f16", "f32", lambda a: a.astype(np.float16))
_define("cvt.rn.bf16.f32", "bf16", "f32", floats.to_bf16)
_define("cvt.rn.f16x2.f32", "f16x2", "f32 f32", lambda a, b: floats.word(b.astype(np.float16), a.astype(np.float16)))
_define("cvt.rn.bf16x2.f32", "bf16x2", "f32 f32", lambda a, b: floats.word(floats.to_bf16(b), floats.to_bf16(a)))
