"""What rows of an evaluation are called, how figures are shown in the table of `awq-hf eval`, and when a perplexity says nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from rich.table import Table
from rich.text import Text

ORIGINAL, PLAIN, OURS = "original", "plain rounding", "awq-hf"  # rows of evaluation.json that no GGUF file is

LABEL_WIDTH, FIGURE_WIDTH = 10, 18  # the widest label; the widest figure, "+0.01234 ± 0.00012"
CAPTION = (
    "loss diff.: log of the perplexity less the reference's. KL: divergence of the next token's probabilities from the reference's, "
    "in nats. ±: standard error, windows being independent."
)

# From here on a perplexity tells that the text is strange to a model, and not how good the model is: those of language models on text of
# the kind that they were trained on are far below.
STRANGE = 100.0
STRANGE_TEXT = (
    f"Every perplexity is above {STRANGE:g}: the text is unlike what the model was trained on, and its perplexity there says little. "
    "KL and top-1 compare with the original all the same."
)


def is_strange(perplexities: Iterable[float | None]) -> bool:
    """Whether a text is strange to the models with these perplexities, None where one is not known: to the best of them."""
    known = [value for value in perplexities if value is not None]
    return bool(known) and min(known) > STRANGE


def tables(rows: list[dict[str, Any]], width: int) -> list[Table | Text]:
    """Models are columns, for they are few and their figures many; more of them than `width` characters hold go to further tables.
    With a reference, what the figures mean comes last; and where that says little, that.

    rows: for every model the fields of Evaluation, "model", "reference" (a name or None), and the sizes of the weights in bytes or
    None: "weights_bytes", "reference_weights_bytes".
    """
    first = rows[0]
    original = first["reference"]
    *names, base = _short([*(row["model"] for row in rows), original or ""])
    columns = list(zip(names, map(_figures, rows), strict=True))
    if original is not None:
        known = {"perplexity": perplexity(first["reference_perplexity"]), "MB on disk": _megabytes(first["reference_weights_bytes"])}
        columns.insert(0, (f"{base} (reference)", known))
    labels = [label for label in columns[-1][1] if any(figures.get(label) for _, figures in columns)]
    room = width - LABEL_WIDTH - 4  # a column of n characters takes n + 3 with its padding and border
    count = max(1, room // (FIGURE_WIDTH + 3))
    parts = [columns[start : start + count] for start in range(0, len(columns), count)]
    found = [_table(part, labels, room // len(part) - 3) for part in parts]
    found[0].title = Text(f"{first['tokens']:,} tokens of {first['text']}", style="table.title")
    strange = is_strange(value for row in rows for value in (row["perplexity"], row.get("reference_perplexity")))
    below = [CAPTION] * (original is not None) + [STRANGE_TEXT] * strange
    return [*found, *map(Text, below)]  # a caption of the table's would be as narrow as the last one


def rows_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """What `tables` takes, of the content of an evaluation.json."""
    original, *rows = evaluation["rows"]
    about = {"reference": evaluation["reference"]["name"], "reference_weights_bytes": original["weights_bytes"]}
    return [{**row, **about, "model": row["name"]} for row in rows]


def _table(columns: list[tuple[str, dict[str, str]]], labels: list[str], width: int) -> Table:
    table = Table("")
    for name, _ in columns:
        table.add_column(Text(name), justify="right", overflow="fold", max_width=max(FIGURE_WIDTH, width))
    for label in labels:
        table.add_row(label, *(figures.get(label, "") for _, figures in columns))
    return table


def _short(names: list[str]) -> list[str]:
    """The last parts of paths, where they tell the models apart."""
    last = [PurePath(name).name or name for name in names]
    return last if len(set(last)) == len(set(names)) else names


def _figures(row: dict[str, Any]) -> dict[str, str]:
    figures = {"perplexity": perplexity(row["perplexity"])}
    if row["reference"] is not None:
        figures["loss diff."] = with_error(row["loss_difference"], row["loss_difference_se"], "+")
        figures["KL mean"] = with_error(row["kl"], row["kl_se"])
        figures |= {label: f"{row[key]:.3g}" for label, key in (("KL median", "kl_median"), ("KL 99 %", "kl_99"), ("KL 99.9 %", "kl_999"))}
        figures["same top-1"] = f"{row['top1']:.2%}"
    return figures | {"MB on disk": _megabytes(row["weights_bytes"])}


def perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e6 else f"{value:.3e}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.2f}"


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """Both with the decimals that show two digits of the error, one where those are many, or in powers of ten."""
    if not error:
        return f"{value:{sign}.3g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals == 6:
        decimals = 5
    if decimals > 5:
        return f"{value:{sign}.2e} ± {error:.0e}"
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"
