"""The canonical data types: what a quantized weight is, whatever file or kernel it ends up in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from awq_hf.wording import option

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is stored.

    bits: width of one integer code: 2, 3, 4 or 8.
    group_size: input channels that share one scale and zero point; -1 means the whole row.
    symmetric: zero points are fixed at the middle code, 2^(bits - 1).
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"{option('bits', self.bits)} is not supported; choose one of {list(BITS)}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"{option('group_size', self.group_size)} is not supported; choose one of {list(GROUP_SIZES)} (-1: whole rows)"
            )

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def middle_code(self) -> int:
        return 2 ** (self.bits - 1)

    def divides(self, in_features: int) -> bool:
        return self.group_size == -1 or in_features % self.group_size == 0

    def group_width(self, in_features: int) -> int:
        """Input channels in one group of a row of `in_features`. Raises ValueError when they do not divide."""
        if not self.divides(in_features):
            raise ValueError(
                f"in_features {in_features} is not divisible by group_size {self.group_size}; "
                f"group sizes that divide it: {group_sizes_for(in_features)}"
            )
        return in_features if self.group_size == -1 else self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits for each weight, with the group's fp16 scale and packed zero point."""
        return self.bits + (16 + self.bits) / self.group_width(in_features)


def group_sizes_for(in_features: int) -> list[int]:
    return [g for g in GROUP_SIZES if g == -1 or in_features % g == 0]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix, unpacked and row-major: W[o, i] ~ (q[o, i] - zero_points[o, g]) * scales[o, g], g = i // group width.

    q: uint8 [out, in]; scales: float16 or bfloat16 [out, groups]; zero_points: uint8 [out, groups].
    """

    q: Tensor
    scales: Tensor
    zero_points: Tensor
    spec: QuantSpec

    def __post_init__(self) -> None:
        out_features, in_features = self.q.shape
        expected = (out_features, in_features // self.spec.group_width(in_features))
        for name, tensor in (("scales", self.scales), ("zero_points", self.zero_points)):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected} for q {tuple(self.q.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]


@dataclass(frozen=True)
class EncodedWeight:
    """A weight in the blocks of a GGUF file. data: uint8 [out, bytes of a row]; kind: the type's name; shape: (out, in)."""

    data: Tensor
    kind: str
    shape: tuple[int, int]
