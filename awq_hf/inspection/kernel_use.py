"""Which kernels would run an AWQ checkpoint's modules here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from awq_hf.kernels.dispatch import by_tokens, choose_layout
from awq_hf.linear import PackedModule
from awq_hf.wording import starred


@dataclass(frozen=True)
class KernelUse:
    """modules: how many run so, under these names (* for numbers); dtype: of their inputs; by_tokens: tokens of a call -> kernel from
    there on; reason: why it is the reference, or None.
    """

    modules: int
    names: list[str]
    dtype: str
    by_tokens: dict[int, str]
    reason: str | None


def kernel_uses(linears: Mapping[str, PackedModule], dtype: torch.dtype, device: str) -> list[KernelUse]:
    alike: dict[tuple[object, ...], tuple[dict[int, str], str | None, list[str]]] = {}
    for name, module in linears.items():
        problem = replace(module.problem(1, dtype), device=torch.device(device).type)
        layout, reason = choose_layout(problem)
        kernels = by_tokens(problem, layout)
        alike.setdefault((tuple(kernels.items()), reason), (kernels, reason, []))[2].append(name)
    return [
        KernelUse(len(names), sorted({*map(starred, names)}), str(dtype).removeprefix("torch."), kernels, reason)
        for kernels, reason, names in alike.values()
    ]
