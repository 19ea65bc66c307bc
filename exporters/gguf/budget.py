"""Which type each tensor is stored in, so that the sum of costs is the least that a size allows: the multiple-choice knapsack problem.

Dynamic programming over bytes beyond each tensor's smallest type (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, section 11.5):

    best[i, b] = min over types t of cost[i, t] + best[i - 1, b - extra[i, t]]

on a grid of bytes. Where that is coarser than the sizes' common divisor, sizes are rounded up to it, so that the budget holds, and what
is left over goes to the types that save most for a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

GRID = 2**15  # steps that the bytes to distribute are counted in, at most


def choose(costs: Mapping[str, Mapping[Type, float]], sizes: Mapping[str, Mapping[Type, int]], budget_bytes: int) -> dict[str, Type]:
    """The type of every tensor: together at most budget_bytes, at the least sum of costs.

    costs: tensor -> type -> cost, any unit, finite; sizes: the same tensors and types -> bytes. The optimum where GRID steps resolve the
    sizes; next to it otherwise. Of equal costs the smaller size is taken, so the order of mappings does not matter. Raises ValueError
    for a budget below the smallest size that there is, and for costs and sizes that do not belong together.
    """
    options = {name: _options(name, costs[name], sizes.get(name, {})) for name in sorted(costs)}
    least = sum(found[0][0] for found in options.values())
    slack = budget_bytes - least
    if slack < 0:
        weights = sum(_weights(*found[0][::2]) for found in options.values())
        raise ValueError(
            f"{budget_bytes} bytes are {8 * budget_bytes / weights:.4g} bits per weight; the least that these take is {least} bytes, "
            f"{math.ceil(8000 * least / weights) / 1000:g} bits per weight: give at least that"
        )
    tables = list(options.values())
    chosen = _spend(tables, _solve(tables, slack), slack)
    return {name: found[number][2] for (name, found), number in zip(options.items(), chosen, strict=True)}


Option = tuple[int, float, Type]  # bytes, cost, type


def _options(name: str, costs: Mapping[Type, float], sizes: Mapping[Type, int]) -> list[Option]:
    """What may be worth its bytes: by size, each cheaper than all that are smaller."""
    if not costs or costs.keys() != sizes.keys():
        raise ValueError(
            f"{name} has costs for {[t.name for t in costs]} and sizes for {[t.name for t in sizes]}; give both for the same types"
        )
    if bad := [kind.name for kind, cost in costs.items() if not math.isfinite(cost)]:
        raise ValueError(f"{name} has a cost that is not finite for {', '.join(bad)}")
    found: list[Option] = []
    for option in sorted((sizes[kind], costs[kind], kind) for kind in costs):
        if not found or option[1] < found[-1][1]:
            found.append(option)
    return found


def _weights(size: int, kind: Type) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return size // block_bytes * block


def _solve(options: list[list[Option]], slack: int) -> list[int]:
    """The number of the option for every tensor. slack: bytes beyond the smallest options."""
    extras = [[size - found[0][0] for size, _, _ in found] for found in options]
    slack = min(slack, sum(extra[-1] for extra in extras))
    step = max(math.gcd(*(e for extra in extras for e in extra)), -(-slack // GRID), 1)
    width = slack // step + 1
    best, choice = np.zeros(width), np.zeros((len(options), width), np.int8)
    for i, (found, extra) in enumerate(zip(options, extras, strict=True)):
        before, best = best, best + found[0][1]
        for option in range(1, len(found)):
            steps = -(-extra[option] // step)
            if steps >= width:
                break
            cost = before[: width - steps] + found[option][1]
            better = cost < best[steps:]
            best[steps:][better] = cost[better]
            choice[i, steps:][better] = option
    at, chosen = int(best.argmin()), [0] * len(options)  # the first minimum: what nothing is gained by is not spent
    for i in reversed(range(len(options))):
        chosen[i] = int(choice[i, at])
        at -= -(-extras[i][chosen[i]] // step)
    return chosen


def _spend(options: list[list[Option]], chosen: list[int], slack: int) -> list[int]:
    """Better options for what rounding up to the grid has left over, most saved for a byte first."""
    left = slack - sum(found[option][0] - found[0][0] for found, option in zip(options, chosen, strict=True))
    while True:
        upgrades = [
            ((found[now][1] - found[new][1]) / (found[new][0] - found[now][0]), -i, new)
            for i, (found, now) in enumerate(zip(options, chosen, strict=True))
            for new in range(now + 1, len(found))
            if found[new][0] - found[now][0] <= left
        ]
        if not upgrades:
            return chosen
        _, i, new = max(upgrades)
        left -= options[-i][new][0] - options[-i][chosen[-i]][0]
        chosen[-i] = new
