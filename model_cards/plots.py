"""The plots of a card, as PNG on a white ground: the loss of every layer, and the files' sizes against their KL divergence."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from awq_hf.evaluation_table import PLAIN
from awq_hf.model_cards.facts import Facts
from awq_hf.model_cards.markdown import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_PLOT, KL_PLOT = "images/loss-per-layer.png", "images/size-and-kl.png"
WIDTH, HEIGHT, DPI = 7.2, 4.8, 150  # inches: letters of 13 points are as large as the card's text on a phone
STYLE = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white", "savefig.facecolor": "white"}
COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#000000",
)  # told apart by everybody (Okabe and Ito)
MARKERS = "osD^vP<>X"
_SIDES = ((0, "center"), (6, "left"), (-6, "right"))
PLACES = [(11, 0, "left"), (-11, 0, "right"), *((dx, dy, side) for dy in (17, -17, 34, -34, 51, -51) for dx, side in _SIDES)]
GGUF = "GGUF "  # how labels of such files begin
LOG_FROM = 10  # ratio of the largest to the smallest value


def draw(facts: Facts) -> dict[str, bytes]:
    """Path in the repository -> PNG. The same facts give the same bytes. A plot without data is absent."""
    series = losses(facts.layers)
    points = sizes(facts)
    found = {}
    if max((len(blocks) for blocks in series.values()), default=0) > 1:
        found[LOSS_PLOT] = _png(lambda figure: _draw_losses(figure, series))
    if len([point for point in points if point[0] != PLAIN]) > 1:
        found[KL_PLOT] = _png(lambda figure: _draw_sizes(figure, points))
    return found


def losses(layers: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Kind of Linear -> block -> loss as a share of plain rounding's, the mean of several in a block (experts)."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        *parents, kind = layer["name"].split(".")
        block = next((int(part) for part in parents if part.isdigit()), None)
        if block is not None and layer["loss_plain"] > 0:
            found.setdefault(kind, {}).setdefault(block, []).append(layer["loss"] / layer["loss_plain"])
    return {kind: {block: fmean(values) for block, values in sorted(some.items())} for kind, some in found.items()}


def sizes(facts: Facts) -> list[tuple[str, int, float]]:
    """(label, bytes, KL) of the files that were measured on the text of the first of them, and of plain rounding."""
    measured = [(artifact, row) for artifact in facts.artifacts if (row := facts.row(artifact)) and row.kl]
    if not measured:
        return []
    sample = measured[0][1].sample
    found = [(artifact.label, artifact.size, row.kl or 0.0) for artifact, row in measured if row.sample == sample]
    plain = [(PLAIN, row.weights_bytes, row.kl) for row in facts.rows if row.name == PLAIN and row.sample == sample]
    return [*found, *((name, size, kl) for name, size, kl in plain if size and kl)]


def _plain(name: str) -> str:
    """Without formulas, which matplotlib finds between dollars."""
    return one_line(name).replace("$", r"\$")


def _png(paint: Any) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _draw_losses(figure: Figure, series: dict[str, dict[int, float]]) -> None:
    axes = figure.add_subplot()
    longest = max(len(blocks) for blocks in series.values())
    for index, (kind, blocks) in enumerate(series.items()):
        style: dict[str, Any] = dict(color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)], linewidth=1.3)
        axes.plot(list(blocks), list(blocks.values()), label=_plain(kind), markersize=6 if longest <= 16 else 4.5, alpha=0.85, **style)
    axes.axhline(1, color="#444444", linestyle="--", linewidth=1.2)
    axes.annotate("plain rounding", (1, 1), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points", ha="right")
    values = [value for blocks in series.values() for value in blocks.values()]
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylim(top=max(*values, 1) * 1.4)
    else:
        axes.set_ylim(0, max(*values, 1) * 1.12)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="Block", ylabel="Loss, share of plain rounding's")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=min(4, len(series)), frameon=False, fontsize=12, columnspacing=1.2, handletextpad=0.4)


def _draw_sizes(figure: Figure, points: list[tuple[str, int, float]]) -> None:
    axes = figure.add_subplot()
    largest, values = max(size for _, size, _ in points), [kl for _, _, kl in points]
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    for name, size, kl in points:
        color = "white" if name == PLAIN else COLORS[1] if name.startswith(GGUF) else COLORS[0]
        axes.scatter(size / scale, kl, s=75, zorder=3, color=color, edgecolors="#444444" if name == PLAIN else "white")
    if max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.margins(y=0.2)
    else:
        axes.set_ylim(0, max(values) * 1.2)
    axes.margins(x=0.3)
    axes.set(xlabel=f"Size of the weights, {unit}", ylabel="KL to the original, nats")
    axes.grid(alpha=0.3)
    _label(figure, axes, [(name.removeprefix(GGUF).partition(",")[0], size / scale, kl) for name, size, kl in points])


def _label(figure: Figure, axes: Axes, points: list[tuple[str, float, float]]) -> None:
    """Names beside their points, one for points that cover each other: the first place that is free and inside."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # decides where the axes are
    inside, dot, pixel = axes.get_window_extent(), 6 * DPI / 72, DPI / 72
    groups: list[tuple[list[str], tuple[float, float], Any]] = []  # names, the place of the first, and in pixels
    for name, x, y in points:
        place = axes.transData.transform((x, y))
        near = next((names for names, _, other in groups if max(abs(place - other)) < 2 * dot), None)
        if near is None:
            groups.append(([name], (x, y), place))
        elif name not in near:
            near.append(name)
    taken = [Bbox([place - dot, place + dot]) for *_, place in groups]
    for names, xy, (px, py) in groups:
        text = axes.annotate(_plain(", ".join(names)), xy, PLACES[0][:2], textcoords="offset points", va="center", fontsize=12)
        text.set_in_layout(False)
        extent = text.get_window_extent()
        for dx, dy, side in PLACES:
            left = px + dx * pixel - extent.width * {"left": 0, "center": 0.5, "right": 1}[side]
            box = Bbox.from_bounds(left, py + dy * pixel - extent.height / 2, extent.width, extent.height)
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not box.count_overlaps(taken):
                text.set(position=(dx, dy), horizontalalignment=side)
                taken.append(box)
                if abs(dy) > 20:
                    axes.annotate("", xy, (dx, dy * 0.75), textcoords="offset points", arrowprops=dict(arrowstyle="-", color="#999999"))
                break
