"""Quantized weights to blocks that hold the same integer codes: nothing is quantized a second time.

A weight is (q - z) s. Types with a minimum store q, a scale and z s; types without store q - z and a scale. Blocks of 32 have a float16
scale of their own, which is s. The sub-blocks of a superblock of 256 have integers times a float16 that they share: these are fitted to the
groups' scales, and hit them where one group fills the superblock, or where scales were chosen for that (see awq_hf.representable).
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from awq_hf.exporters.gguf.blocks import k_affine, k_symmetric, legacy
from awq_hf.exporters.gguf.blocks.legacy import Bytes
from awq_hf.exporters.gguf.blocks.search import F, Floats
from awq_hf.exporters.gguf.ggml import LARGEST, by_rows, row_bytes
from awq_hf.spec import QuantizedWeight, QuantSpec


@dataclass(frozen=True)
class Target:
    """A block type as a place for codes: of q from 0, or of q - z from below 0.

    width: weights that share a scale. top_scale: the highest integer scale of a sub-block; 0 where each block has a float16 of its own.
    """

    width: int
    lowest: int
    highest: int
    top_scale: int = 0

    @property
    def signed(self) -> bool:
        return self.lowest < 0


TARGETS = {  # by size, and of one size those with scales of their own first
    Type.Q2_K: Target(16, 0, 3, 15),
    Type.Q3_K: Target(16, -4, 3, 31),
    Type.Q4_0: Target(32, -8, 7),
    Type.Q4_K: Target(32, 0, 15, 63),
    Type.Q4_1: Target(32, 0, 15),
    Type.Q5_0: Target(32, -16, 15),
    Type.Q6_K: Target(16, -32, 31, 127),
    Type.Q8_0: Target(32, -128, 127),
}


def types_for(spec: QuantSpec, in_features: int) -> list[Type]:
    """Types that hold the codes of rows quantized by `spec`, the smallest first."""
    return [kind for kind in TARGETS if _obstacle(spec, in_features, kind) is None]


def default_type(spec: QuantSpec, in_features: int) -> Type | None:
    """The smallest type that adds at most 2 % to the squared error of quantization itself; None where codes fit no type.

    That is the smallest that fits, but for Q2_K: its scales of 4 bits are too coarse for small groups, many of which share a superblock.
    """
    coarse = {Type.Q2_K} if spec.group_width(in_features) < 64 else set()
    return next((kind for kind in types_for(spec, in_features) if kind not in coarse), None)


def is_exact(spec: QuantSpec, in_features: int, kind: Type) -> bool:
    """Whether blocks of `kind`, which hold the codes, stand for the same weights bit for bit, whatever the scales (float16) are."""
    target = TARGETS[kind]
    return spec.group_width(in_features) % 256 == 0 if target.top_scale else target.signed or spec.symmetric


def misfit(spec: QuantSpec, in_features: int, kind: Type) -> str | None:
    """Why blocks of `kind` cannot hold the codes of rows quantized by `spec`, and what can; or None."""
    obstacle = _obstacle(spec, in_features, kind)
    if obstacle is None:
        return None
    names = [other.name for other in types_for(spec, in_features)]
    advice = f"types that do: {', '.join(names)}" if names else "no type does; store it as F16, or quantize the original weights again"
    return f"{kind.name} cannot hold these codes: {obstacle}; {advice}"


def _obstacle(spec: QuantSpec, in_features: int, kind: Type) -> str | None:
    if (target := TARGETS.get(kind)) is None:
        return "its values are not evenly spaced, or another type of its size is better"
    block, group = gguf.GGML_QUANT_SIZES[kind][0], spec.group_width(in_features)
    if in_features % block:
        return f"rows of {in_features} do not divide into blocks of {block}"
    if group % target.width:
        return f"{target.width} weights share a scale, and groups are of {group}"
    lowest, highest = 0, spec.max_code
    if target.signed:
        lowest, highest = (-spec.middle_code, spec.middle_code - 1) if spec.symmetric else (-spec.max_code, spec.max_code)
    if lowest < target.lowest or highest > target.highest:
        what = "codes less zero points" if target.signed else "codes"
        return f"{what} run from {lowest} to {highest}, and it has {target.lowest} to {target.highest}"
    return None


def repack(weight: QuantizedWeight, kind: Type, importance: Floats | None = None) -> Bytes:
    """Blocks of `kind` with the codes of `weight`, on as many threads as torch uses: uint8 [out, bytes].

    importance: float32 [in], not negative: how much errors in each column matter where scales are fitted. Raises ValueError, with the
    types that would do, where codes do not fit; and for scales and zero points that no file should hold.
    """
    out_features, in_features = weight.shape
    if (reason := misfit(weight.spec, in_features, kind)) is not None:
        raise ValueError(reason)
    scales = weight.scales.float().numpy()  # [out, groups]
    if not ((scales >= 0) & (scales <= LARGEST)).all():
        raise ValueError(
            f"scales are {scales.min():.6g} to {scales.max():.6g}: negative, not finite or beyond float16; the weight is damaged"
        )
    zeros = weight.zero_points.numpy().astype(np.int16)
    if weight.spec.symmetric and (zeros != weight.spec.middle_code).any():
        raise ValueError(f"zero points of a symmetric weight differ from {weight.spec.middle_code}; the weight is damaged")
    columns = np.ones(in_features, F) if importance is None else importance / max(importance.mean(), 1e-30) + F(1e-3)

    def encode(rows: slice) -> Bytes:
        codes = weight.q[rows].numpy().astype(np.int16)
        if TARGETS[kind].signed:
            codes -= np.repeat(zeros[rows], in_features // scales.shape[1], axis=1)
        return _encode(kind, codes, scales[rows], (scales[rows] * zeros[rows]).astype(F), columns).reshape(len(codes), -1)

    return by_rows(encode, out_features, in_features, row_bytes(kind, in_features))


def _encode(kind: Type, codes: NDArray[np.int16], scales: Floats, minimums: Floats, columns: Floats) -> Bytes:
    """codes: [rows, in], as they are stored, from the type's lowest; scales, minimums (z s): [rows, groups]; columns: importance [in]."""
    target, block = TARGETS[kind], gguf.GGML_QUANT_SIZES[kind][0]
    parts = codes.shape[1] // scales.shape[1] // target.width  # blocks or sub-blocks in a group
    s, zs = np.repeat(scales, parts, axis=1).reshape(-1), np.repeat(minimums, parts, axis=1).reshape(-1)
    blocks = codes.reshape(-1, block)
    if target.top_scale == 0:
        return _with_own_scales(kind, blocks, s, zs)
    shape = -1, block // target.width, target.width
    weights = np.broadcast_to(columns, codes.shape).reshape(shape)
    return _with_shared_scales(kind, blocks.reshape(shape), s.reshape(shape[:2]), zs.reshape(shape[:2]), weights)


def _with_own_scales(kind: Type, codes: NDArray[np.int16], s: Floats, zs: Floats) -> Bytes:
    if kind is Type.Q4_1:
        return legacy.pack_q4_1(s, -zs, codes.astype(np.uint8))
    if kind is Type.Q8_0:
        return legacy.pack_q8_0(s, codes.astype(np.int8))
    pack = legacy.pack_q4_0 if kind is Type.Q4_0 else legacy.pack_q5_0
    return pack(s, (codes - TARGETS[kind].lowest).astype(np.uint8))


def _with_shared_scales(kind: Type, codes: NDArray[np.int16], s: Floats, zs: Floats, weights: Floats) -> Bytes:
    """codes, weights of squared errors: [superblocks, sub-blocks, width]; s, zs: [superblocks, sub-blocks].

    With a minimum, the error of a weight is c (s' - s) - (m' - z s) for its code c. For given s' the best m' is z s + mean(c) (s' - s),
    and what is left is the variance of the codes times (s' - s)^2.
    """
    target, c = TARGETS[kind], codes.astype(F)
    total, first, second = weights.sum(axis=2), (weights * c).sum(axis=2), (weights * c * c).sum(axis=2)
    stored = (codes - target.lowest).astype(np.uint8).reshape(len(codes), -1)
    if target.signed:
        d, scales = share_unit(s, second + F(1e-3) * total, target.top_scale)
        pack = k_symmetric.pack_q3_k if kind is Type.Q3_K else k_symmetric.pack_q6_k
        return pack(d, scales.astype(np.int8), stored)
    mean = first / total
    d, scales = share_unit(s, second - first * mean + F(1e-3) * total, target.top_scale)
    dmin, minimums = share_unit(np.maximum(zs + mean * (d[:, None] * scales - s), 0), total, target.top_scale)
    pack_affine = k_affine.pack_q2_k if kind is Type.Q2_K else k_affine.pack_q4_k
    return pack_affine(d, dmin, scales.astype(np.uint8), minimums.astype(np.uint8), stored)


def share_unit(targets: Floats, weights: Floats, top: int) -> tuple[Floats, Floats]:
    """A float16 unit u and integers c in 0..top for each row, so that u c is near targets >= 0: least sum of weights (u c - targets)^2.

    targets, weights: [rows, n]. Tries every integer for the largest target; of equals the smallest wins. Returns u float32 [rows],
    representable in float16, and c [rows, n].
    """
    largest = targets.max(axis=1, keepdims=True)
    relative = targets / np.where(largest > 0, largest, F(1))
    weighted = weights * targets
    best_unit, best_integers = np.zeros(len(targets), F), np.zeros_like(targets)
    best_error = np.full(len(targets), np.inf, F)
    for integer in range(1, top + 1):
        integers = np.rint(relative * F(integer))
        squares = (weights * integers * integers).sum(axis=1)
        unit = ((weighted * integers).sum(axis=1) / np.maximum(squares, F(1e-30))).astype(np.float16).astype(F)
        error = (weights * (unit[:, None] * integers - targets) ** 2).sum(axis=1)
        better = error < best_error
        best_unit[better], best_integers[better], best_error[better] = unit[better], integers[better], error[better]
    return best_unit, best_integers
