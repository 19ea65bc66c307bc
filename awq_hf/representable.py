"""Scales that GGUF blocks hold exactly, so that a GGUF file and the checkpoint it was made of stand for identical weights.

To be applied to scales once zero points are chosen and before integers are. What a group pays is a scale off by less than a percent.

Q4_1 stores d = s and m = z s, both float16 (11 significant bits): exact if s has 11 - bits of them, since z has at most `bits`.
Q4_K shares two float16 between the two groups of 128 of a superblock: s_i = d a_i and z_i s_i = dmin m_i, with integers a_i, m_i in 0..63.
With d of 5 bits s_i fits float16. m_i = z_i a_i / h and dmin = d h, for a common divisor h of the z_i a_i, its odd part of at most 6
bits. Enough pairs a_i have one for each pair of scales to find a near one.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
from torch import Tensor

from awq_hf.spec import QuantSpec
from awq_hf.wording import option

KINDS = ("Q4_K", "Q4_1")
SIGNIFICANT = 11  # bits of a float16
D_BITS = 5  # of d: a_i has up to 6
TOP = 63  # the highest a_i and m_i
MIN_SCALE = 2.0**-24  # the smallest positive float16


def for_q4_1(scales: Tensor, bits: int) -> Tensor:
    """Positive scales, rounded so that Q4_1 blocks hold weights of `bits` (2, 3 or 4) exactly: float32, representable in float16."""
    return _round(scales, SIGNIFICANT - bits)


def for_q4_k(scales: Tensor, zero_points: Tensor) -> Tensor:
    """Scales near `scales`, with which Q4_K blocks hold weights in groups of 128 exactly: float32, representable in float16.

    scales: positive, [..., groups]; zero_points: integers 0..15 of any dtype, [..., groups]. Two neighbours share a superblock, so an odd
    number of groups raises ValueError. Of all pairs that are exact, that with the least squared error is taken. Groups of 256, and rows
    that are one group, need no change.
    """
    if scales.shape[-1] % 2:
        raise ValueError(f"{scales.shape[-1]} groups of 128 do not pair up in Q4_K's superblocks of 256; Q4_1 holds such rows: for_q4_1")
    pairs = scales.to(torch.float32).reshape(-1, 2)
    order = pairs.argsort(dim=1, descending=True)  # the larger scale first
    large, small = pairs.gather(1, order).unbind(1)
    z_large, z_small = zero_points.reshape(-1, 2).long().gather(1, order).unbind(1)
    below, above = _neighbours(scales.device)
    row = (z_large * 16 + z_small) * 64  # + a_large: of the tables
    best_large, best_small, least = large, small, torch.full_like(large, torch.inf)
    for a_large in range(1, TOP + 1):
        d = _round(large / a_large, D_BITS)
        new_large, index = d * a_large, (row + a_large) * 64 + (small / d).clamp(max=TOP).long()
        for table in (below, above):
            new_small = d * table[index]
            error = (new_large - large).square() + (new_small - small).square()
            better = (new_small > 0) & (error < least)
            least = torch.where(better, error, least)
            best_large = torch.where(better, new_large, best_large)
            best_small = torch.where(better, new_small, best_small)
    return torch.empty_like(pairs).scatter_(1, order, torch.stack([best_large, best_small], 1)).view(scales.shape)


def misfit(spec: QuantSpec, in_features: int, kind: str) -> str | None:
    """Why no scales make `kind` hold rows quantized by `spec` exactly, or None."""
    width = spec.group_width(in_features)
    if kind == "Q4_1" and spec.bits <= 4 and width % 32 == 0:
        return None
    if kind == "Q4_K" and spec.bits == 4 and not spec.symmetric and in_features % 256 == 0 and width % 128 == 0:
        return None
    needs = (
        "2 to 4 bits and groups of 32 or more" if kind == "Q4_1" else "4 bits with zero points, groups of 128 and rows of a multiple of 256"
    )
    return f"{option('scales_for', kind)} needs {needs}, not {spec} in rows of {in_features}"


def representable(scales: Tensor, zero_points: Tensor, spec: QuantSpec, in_features: int, kind: str) -> Tensor:
    """Scales near `scales` [out, groups] with which blocks of `kind` hold the weight exactly, for what `misfit` accepts."""
    if kind == "Q4_1":
        return for_q4_1(scales, spec.bits)
    return for_q4_k(scales, zero_points) if spec.group_width(in_features) == 128 else scales


def _round(x: Tensor, bits: int) -> Tensor:
    """To `bits` significant bits, and to what float16 holds."""
    mantissa, exponent = torch.frexp(x.to(torch.float32))
    rounded = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
    return rounded.to(torch.float16).to(torch.float32).clamp(min=MIN_SCALE)


@cache
def _neighbours(device: torch.device) -> tuple[Tensor, Tensor]:
    """For zero points z, z' and integers a, x: the largest a' up to x, and the smallest above x, that goes with them; 0 for none.

    uint8, flat: [16, 16, 64, 64].
    """
    largest = torch.tensor([0, *(_largest_divisor(n) for n in range(1, 15 * TOP + 1))])
    products = torch.arange(16)[:, None] * torch.arange(TOP + 1)  # z a
    one, other = products[:, None, :, None], products[None, :, None, :]
    fits = torch.maximum(one, other) <= TOP * largest[torch.gcd(one, other)]
    candidates = torch.where(fits, torch.arange(TOP + 1), 0)
    below = candidates.cummax(dim=-1).values
    upper = torch.where(candidates > 0, candidates, 2 * TOP).flip(-1).cummin(dim=-1).values.flip(-1)
    above = torch.where(upper > TOP, 0, upper).roll(-1, dims=-1)
    above[..., -1] = 0
    return below.flatten().to(device, torch.uint8), above.flatten().to(device, torch.uint8)


def _largest_divisor(n: int) -> int:
    """The largest whose odd part has at most SIGNIFICANT - D_BITS bits."""
    limit = 2 ** (SIGNIFICANT - D_BITS)
    return max(h for h in range(1, n + 1) if n % h == 0 and h // gcd(h, 2**10) < limit)
