"""What the headers of a checkpoint say of its quantized matrices: in which layout they are, or why in none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from awq_hf.headers import Headers
from awq_hf.kernels.foreign import GEMV, GEMV_FAST, VERSIONS, shape_in, tensor_shapes
from awq_hf.kernels.layout import GEMM, WIDE, layout_for
from awq_hf.spec import BITS, GROUP_SIZES, QuantSpec

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 24  # elements looked at together
ZEROS = ("qzeros", "scaled_zeros")  # AutoAWQ's name; llm-awq's


def declared_layout(version: str | None) -> str | None:
    """The layout that a config's `version` stands for, None where it leaves it open. Raises ValueError for those that cannot be read."""
    if version is None:
        return None
    if version in VERSIONS:
        return VERSIONS[version]
    readable = f"versions that can be read: {', '.join(VERSIONS)}"
    if version in ("marlin", "bitblas"):
        raise ValueError(
            f"checkpoint version {version!r} is ordered for one kernel on one kind of GPU and cannot be read; take the gemm version "
            f"of this checkpoint, or write it again with version gemm. {readable}"
        )
    raise ValueError(f"checkpoint version {version!r} is not known; {readable}")


def _choices(declared: str | None, bits: int) -> list[str]:
    """Layouts that a module of `bits` may be in, where the config declares `declared`."""
    own = layout_for(bits)
    return {None: [own, GEMV, GEMV_FAST] if bits == 4 else [own], WIDE: [own]}.get(declared, [declared or own])


@dataclass(frozen=True)
class Stored:
    """A quantized module as the headers describe it. owner: its name in the file; shape: (out, in); bias: whether one has to be there."""

    owner: str
    shape: tuple[int, int]
    headers: Headers
    spec: QuantSpec
    bias: bool = False

    def layout(self, declared: str | None, version: str | None) -> str:
        """The layout of the tensors. Raises ValueError when they are of none, or not of the declared one."""
        bits, group_size = self.spec.bits, self.spec.group_size
        if declared == GEMM and bits != 4:
            raise ValueError(f"checkpoint version {version!r} with {bits} bits cannot be read: it holds 4 bits, {WIDE!r} the others")
        choices = _choices(declared, bits)
        misfits = [self._misfit(layout, self.spec) for layout in choices]
        if None not in misfits:
            said = "" if version is None else f" and version {version!r}"
            raise ValueError(f"{misfits[0]} for {bits} bits, group_size {group_size}{said}{self._looks_like()}")
        return choices[misfits.index(None)]

    def zeros_name(self, layout: str) -> str:
        return ZEROS[layout == GEMV_FAST and f"{self.owner}.{ZEROS[1]}" in self.headers]

    def _misfit(self, layout: str, spec: QuantSpec) -> str | None:
        """Why the tensors are not a matrix of `spec` in `layout`, or None."""
        n_out, n_in = self.shape
        try:
            expected = tensor_shapes(layout, n_in, n_out, spec.group_width(n_in), spec.bits)
        except ValueError as error:
            return f"{self.owner}: {error}; the config asks"
        if self.bias or f"{self.owner}.bias" in self.headers:
            expected["bias"] = ((n_out,), (torch.float16, torch.bfloat16, torch.float32))
        for part, (shape, dtypes) in expected.items():
            name = f"{self.owner}.{self.zeros_name(layout) if part == 'zeros' else part}"
            info = self.headers.get(name)
            if info is None:
                return f"{name} is missing from the checkpoint, expected"
            if info.shape != shape or info.dtype not in map(NAMES.get, dtypes):
                return f"{name} is {info}, expected {' or '.join(map(NAMES.__getitem__, dtypes))} {list(shape)}"
        return None

    def _looks_like(self) -> str:
        qweight = self.headers.get(f"{self.owner}.qweight")
        for bits in BITS:
            for group_size in GROUP_SIZES:
                for layout in (GEMM, GEMV, GEMV_FAST) if bits == 4 else (WIDE,):
                    if self._misfit(layout, QuantSpec(bits, group_size)) is None:
                        return f"; the tensors look like bits={bits}, group_size={group_size}, version {layout!r}"
        n_out, n_in = self.shape
        if qweight and qweight.shape == (n_in // 16, n_out * 2):
            return "; the tensors look like version 'marlin', which cannot be read"
        if f"{self.owner}.g_idx" in self.headers:
            return "; the tensors look like GPTQ's, not AWQ's"
        return ""


class Packed(NamedTuple):
    """A quantized matrix of a checkpoint, found without a model: shape (out, in), spec, layout, and the name of its zeros."""

    shape: tuple[int, int]
    spec: QuantSpec
    layout: str
    zeros: str


def find_packed(owner: str, headers: Headers, specs: Iterable[QuantSpec], version: str | None) -> Packed:
    """What the tensors of `owner` are, by their shapes alone. specs: what the config knows, the likeliest first.

    Raises ValueError naming the tensor when they fit none of them.
    """
    declared, specs = declared_layout(version), list(specs)
    parts = [headers.get(f"{owner}.{part}") for part in ("qweight", "scales")]
    for part, info in zip(("qweight", "scales"), parts, strict=True):
        if info is None or len(info.shape) != 2:
            raise ValueError(f"{owner}.{part} is {info or 'missing from the checkpoint'}, expected a matrix")
    shapes = [info.shape for info in parts if info is not None]
    for spec in specs:
        for layout in _choices(declared, spec.bits):
            stored = Stored(owner, shape_in(layout, *shapes), headers, spec)
            if stored._misfit(layout, spec) is None:
                return Packed(stored.shape, spec, layout, stored.zeros_name(layout))
    first = specs[0]
    layout = _choices(declared, first.bits)[0]
    Stored(owner, shape_in(layout, *shapes), headers, first).layout(declared, version)  # says why
    raise AssertionError(owner)


def is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in tensor.detach().reshape(-1).split(CHUNK))
