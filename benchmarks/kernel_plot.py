"""The plots of benchmarks.kernels: speed over cuBLAS and share of the device's limit against the number of tokens, for every shape."""

from __future__ import annotations

from typing import Any

from benchmarks.common import RESULTS
from benchmarks.kernel_rivals import CUBLAS, OURS, RIVALS

STYLES: dict[str, dict[str, Any]] = {  # colours that stay apart for colour-blind readers (Okabe and Ito)
    OURS: dict(color="#0072B2", linewidth=2.5, marker="o", zorder=3),
    CUBLAS: dict(color="#555555", marker="s"),
    "tinygemm": dict(color="#E69F00", marker="^"),
    "gemlite": dict(color="#009E73", marker="v"),
    "AutoAWQ": dict(color="#CC79A7", marker="D"),
}


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """results/<name>_<dtype>.png for the rows of every dtype, as `benchmarks.kernels.row` makes them."""
    import matplotlib

    matplotlib.use("Agg")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        _figure([row for row in rows if row["dtype"] == dtype], f"{name}_{dtype}")


def _figure(rows: list[dict[str, Any]], name: str) -> None:
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["out x in"] for row in rows))
    figure, axes = pyplot.subplots(
        *(2, len(shapes)), figsize=(3.4 * len(shapes) + 0.8, 6.4), squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for column, shape in enumerate(shapes):
        _panels(axes[0, column], axes[1, column], [row for row in rows if row["out x in"] == shape])
        axes[0, column].set_title(shape)
        axes[1, column].set_xlabel("tokens")
    axes[0, 0].set_ylabel("speed, of cuBLAS's")
    axes[1, 0].set_ylabel("share of the limit of 4-bit weights")
    lines = {line.get_label(): line for panel in axes.flat for line in panel.lines if not line.get_label().startswith("_")}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=max(1, len(lines)), frameon=False)
    figure.suptitle(name.replace("_", " "), fontsize="medium")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    pyplot.close(figure)


def _panels(speed: Any, share: Any, rows: list[dict[str, Any]]) -> None:
    for contender in (OURS, *RIVALS):
        column = f"{contender} us"
        timed = [row for row in rows if row[column] != ""]
        against = [row for row in timed if row[f"{CUBLAS} us"] != ""]
        style = {"markersize": 4, "linewidth": 1.3, **STYLES[contender]}
        if timed:
            share.plot([row["M"] for row in timed], [row["limit us"] / row[column] for row in timed], label=contender, **style)
        if against:
            speed.plot([row["M"] for row in against], [row[f"{CUBLAS} us"] / row[column] for row in against], **style)
    for panel in (speed, share):
        panel.set_xscale("log", base=2)
        panel.set_xticks([row["M"] for row in rows], [str(row["M"]) for row in rows], rotation=60, fontsize="small")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    speed.set_yscale("log", base=2)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    share.axhline(1, color="black", linewidth=0.8)
    share.set_ylim(bottom=0)
