"""Plots: what is drawn, that every name is legible, and that nothing but the facts decides the bytes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from awq_hf.evaluation_table import PLAIN
from awq_hf.model_cards import plots
from awq_hf.model_cards.facts import gather

from .conftest import LINEARS, evaluation, row, write_json

POINTS = [
    ("AWQ, 4 bits", 5_730_000_000, 0.0212), ("compressed-tensors, 4 bits", 5_740_000_000, 0.0212), ("GGUF Q8_0", 8_540_000_000, 0.0012),
    ("GGUF Q6_K", 6_600_000_000, 0.0031), ("GGUF Q5_K_M", 5_730_000_000, 0.0085), ("GGUF Q4_K_M", 4_920_000_000, 0.0178),
    ("GGUF IQ4_XS", 4_450_000_000, 0.022), ("GGUF Q3_K_M", 4_020_000_000, 0.061), ("GGUF Q2_K", 3_180_000_000, 0.21),
    (PLAIN, 5_730_000_000, 0.045),
]  # fmt: skip


def layers(blocks: int, loss: float = 0.5) -> list[dict[str, Any]]:
    return [{"name": f"model.layers.{i}.{linear}", "loss": loss, "loss_plain": 1.0} for i in range(blocks) for linear in LINEARS]


def figure_of(paint: Any) -> Figure:
    figure = Figure(figsize=(plots.WIDTH, plots.HEIGHT), dpi=plots.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(plots.STYLE):
        paint(figure)
        figure.draw_without_rendering()
    return figure


def test_losses_are_shares_of_plain_roundings_by_kind_and_block() -> None:
    experts = [{"name": f"model.layers.3.mlp.experts.{i}.up", "loss": 0.2 * i, "loss_plain": 1.0} for i in (1, 2)]
    zero = [{"name": "model.layers.4.mlp.up", "loss": 0.0, "loss_plain": 0.0}, {"name": "head", "loss": 1.0, "loss_plain": 1.0}]
    assert plots.losses([*experts, *zero]) == {"up": {3: pytest.approx(0.3)}}


def test_no_plot_without_data(full: Path, awq_only: Path, foreign: Path) -> None:
    assert [*plots.draw(gather(foreign))] == []
    assert [*plots.draw(gather(awq_only))] == [plots.LOSS_PLOT]
    assert [*plots.draw(gather(full))] == [plots.LOSS_PLOT, plots.KL_PLOT]
    write_json(full / "evaluation.json", evaluation(row("awq-hf", ["."], 0.01, 23.0, 0.9)))  # and plain rounding: one file is no choice
    assert [*plots.draw(gather(full))] == [plots.LOSS_PLOT]
    assert plots.losses(layers(1)).keys() == {linear.split(".")[1] for linear in LINEARS}


def test_names_cover_neither_each_other_nor_points() -> None:
    figure = figure_of(lambda figure: plots._draw_sizes(figure, POINTS))
    (axes,) = figure.axes
    texts = [text for text in axes.texts if text.get_text()]
    assert {name for text in texts for name in text.get_text().split(", ")} == {
        "AWQ", "compressed-tensors", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", PLAIN,
    }  # fmt: skip
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    dots = [axes.transData.transform((size / 1e9, kl)) for _, size, kl in POINTS]
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert axes.get_yscale() == "log" and axes.get_xlabel().endswith("GB")


@pytest.mark.parametrize(("low", "scale"), [(0.3, "linear"), (0.01, "log")])
def test_many_layers(low: float, scale: str) -> None:
    figure = figure_of(lambda figure: plots._draw_losses(figure, plots.losses([*layers(31), *layers(32, low)[-7:]])))
    (axes,) = figure.axes
    assert axes.get_yscale() == scale and len(axes.lines) == 7 + 1
    ticks = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert not any(one.overlaps(other) for one, other in combinations(ticks, 2))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [linear.split(".")[1] for linear in LINEARS]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_users_settings_change_nothing(full: Path) -> None:
    facts = gather(full)
    expected = plots.draw(facts)
    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "black", "savefig.dpi": 30}):
        assert plots.draw(facts) == expected
    assert not any(b"Software" in png or b"matplotlib" in png.lower() for png in expected.values())
