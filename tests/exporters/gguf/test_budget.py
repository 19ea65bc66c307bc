"""Types for a size: against every combination where there are few."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_hf.exporters.gguf import budget
from awq_hf.exporters.gguf.budget import choose
from awq_hf.exporters.gguf.encode import n_bytes

KINDS = [Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0]
Table = dict[str, dict[Type, Any]]


def total(table: Table, chosen: dict[str, Type]) -> Any:
    return sum(table[name][kind] for name, kind in chosen.items())


def every(costs: Table, sizes: Table, limit: int) -> list[tuple[float, int]]:
    """Cost and size of all that fits."""
    found = [dict(zip(costs, kinds, strict=True)) for kinds in itertools.product(*costs.values())]
    return sorted((total(costs, c), total(sizes, c)) for c in found if total(sizes, c) <= limit)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, Table, int]:
    costs: Table = {}
    sizes: Table = {}
    for i in range(draw(st.integers(1, 4))):
        kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))
        costs[f"t{i}"] = {kind: draw(st.integers(0, 20)) for kind in kinds}
        sizes[f"t{i}"] = {kind: draw(st.integers(1, 60)) for kind in kinds}
    least = sum(min(of.values()) for of in sizes.values())
    return costs, sizes, draw(st.integers(least, least + 150))


@given(problems())
@settings(max_examples=300, deadline=None)
def test_the_optimum_of_small_problems(problem: tuple[Table, Table, int]) -> None:
    costs, sizes, limit = problem
    chosen = choose(costs, sizes, limit)
    assert (total(costs, chosen), total(sizes, chosen)) == every(costs, sizes, limit)[0]  # and the smallest of the best
    assert chosen == choose(dict(reversed(costs.items())), {name: dict(reversed(of.items())) for name, of in sizes.items()}, limit)


@given(problems(), st.integers(2, 12))
@settings(max_examples=300, deadline=None)
def test_a_coarse_grid_keeps_the_budget_and_spends_what_is_left(problem: tuple[Table, Table, int], grid: int) -> None:
    costs, sizes, limit = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "GRID", grid)
        chosen = choose(costs, sizes, limit)
    assert total(sizes, chosen) <= limit
    for name, kind in itertools.product(costs, KINDS):  # no single change that fits is better
        if kind in costs[name] and total(sizes, {**chosen, name: kind}) <= limit and sizes[name][kind] > sizes[name][chosen[name]]:
            assert costs[name][kind] >= costs[name][chosen[name]]


def large(tensors: int) -> tuple[Table, Table, int]:
    rng = np.random.default_rng(0)
    costs: Table = {}
    sizes: Table = {}
    weights = 0
    for i in range(tensors):
        shape = (256 * int(rng.integers(1, 60)), 4096)
        weights += shape[0] * shape[1]
        sizes[f"t{i}"] = {kind: n_bytes(shape, kind) for kind in KINDS}
        costs[f"t{i}"] = {kind: float(rng.lognormal(0, 2) * 4.0 ** -(8 * size / shape[0] / 4096)) for kind, size in sizes[f"t{i}"].items()}
    return costs, sizes, weights * 4 // 8


def test_a_large_model_within_a_second_and_next_to_the_optimum() -> None:
    costs, sizes, limit = large(300)
    began = time.process_time()
    chosen = choose(costs, sizes, limit)
    assert time.process_time() - began < 1.5
    assert 0.999 * limit < total(sizes, chosen) <= limit
    # Weak duality: for every price of a byte, the sum of what is best at that price is a lower bound.
    prices = np.geomspace(1e-14, 1e-4, 2000)
    bounds = sum(np.min([costs[n][k] + prices * sizes[n][k] for k in costs[n]], axis=0) for n in costs) - prices * limit
    assert total(costs, chosen) < 1.001 * bounds.max()


def test_ties_do_not_depend_on_the_order() -> None:
    of, size = {Type.Q2_K: 2.0, Type.Q4_K: 1.0}, {Type.Q2_K: 5, Type.Q4_K: 6}
    assert choose({"a": of, "b": of}, {"a": size, "b": size}, 11) == choose({"b": of, "a": of}, {"b": size, "a": size}, 11)


def test_budgets_at_the_ends() -> None:
    costs, sizes, _ = large(5)
    least, most = (sum(pick(of.values()) for of in sizes.values()) for pick in (min, max))
    assert set(choose(costs, sizes, least).values()) == {Type.Q2_K}
    best = {name: min(of, key=lambda kind: of[kind]) for name, of in costs.items()}
    assert choose(costs, sizes, most) == choose(costs, sizes, 100 * most) == best


def test_refusals() -> None:
    sizes: Table = {"a": {kind: n_bytes((256, 256), kind) for kind in KINDS}}
    costs: Table = {"a": dict.fromkeys(KINDS, 1.0)}
    with pytest.raises(
        ValueError, match=r"16384 bytes are 2 bits per weight; .* takes? is 21504 bytes, 2.625 bits per weight: give at least"
    ):
        choose(costs, sizes, 16384)
    with pytest.raises(ValueError, match=r"a has costs for \['Q2_K'\] and sizes for \['Q2_K', 'Q3_K'"):
        choose({"a": {Type.Q2_K: 1.0}}, sizes, 10**6)
    with pytest.raises(ValueError, match=r"a has costs for \[\] and sizes for \[\]"):
        choose({"a": {}}, {}, 10**6)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a has a cost that is not finite for Q6_K"):
            choose({"a": costs["a"] | {Type.Q6_K: bad}}, sizes, 10**6)
    assert choose({}, {}, 0) == {}
