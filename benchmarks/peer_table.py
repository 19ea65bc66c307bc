"""benchmarks.peers: which programs there are, their rows, and the tables of the READMEs that are made from them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[1]
PLAIN, OURS = "plain rounding", "awq-hf"
Row = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """name: of the row; driver: in peer_drivers, whose method is run; bits: that it writes; patch: what was changed to make it run.

    faithful: what it writes is what it computes.
    """

    name: str
    driver: str
    method: str
    bits: tuple[int, ...] = (4, 3)
    patch: str = ""
    faithful: bool = True


PIN = "pinning of memory, which needs an accelerator, is left out"
NO_DEPS = "installed with --no-deps, beside an older torch than it asks for"
PROGRAMS = (
    Program(PLAIN, "awq_hf", "plain"),
    Program(OURS, "awq_hf", "awq"),
    Program("AutoAWQ", "autoawq", "shipped", (4,)),
    Program("AutoAWQ, bug fixed", "autoawq", "copied", (4,), "its search restores the weights after each candidate, as it does on a GPU"),
    Program("llm-compressor AWQ", "llmcompressor", "awq", patch=PIN),
    Program("llm-compressor GPTQ", "llmcompressor", "gptq"),
    Program("llm-compressor AWQ + GPTQ", "llmcompressor", "awq+gptq", patch=PIN),
    Program("GPTQModel AWQ", "gptqmodel", "awq", (4,), NO_DEPS),
    Program("GPTQModel GPTQ", "gptqmodel", "gptq", patch=NO_DEPS),
    Program("GPTQModel GPTAQ", "gptqmodel", "gptaq", patch=NO_DEPS),
    Program("auto-round", "autoround", "signround"),
    Program("auto-round best", "autoround", "signround-best"),
    Program("auto-round AWQ", "autoround", "awq", faithful=False),
    Program("HQQ", "hqq", "hqq"),
)
PACKAGES = {
    "awq_hf": OURS,
    "autoround": "auto-round",
    "gptqmodel": "GPTQModel",
    "llmcompressor": "llm-compressor",
    "autoawq": "AutoAWQ",
    "hqq": "HQQ",
}


def merged(rows: list[Row], row: Row) -> list[Row]:
    """`row` in place of the one of the same program and shape."""
    key = lambda r: (r["program"], r["bits"], r["group size"])  # noqa: E731
    return [r for r in rows if key(r) != key(row)] + [row]


def in_order(rows: list[Row]) -> list[Row]:
    names = [program.name for program in PROGRAMS]
    return sorted(rows, key=lambda r: (-r["bits"], r["group size"], names.index(r["program"])))


def with_shares(rows: list[Row]) -> list[Row]:
    """KL as a share of plain rounding's at the same width; none while that is not there."""
    plain = {(r["bits"], r["group size"]): r["KL"] for r in rows if r["program"] == PLAIN and "KL" in r}
    shared = []
    for row in rows:
        base = plain.get((row["bits"], row["group size"]))
        rest = {k: v for k, v in row.items() if k != "share"}
        shared.append(rest | {"share": row["KL"] / base} if base and "KL" in row else rest)
    return shared


def brief(row: Row) -> Row:
    """The columns that fit a screen, blank where nothing came out."""
    columns = (
        "program",
        "share",
        "KL",
        "KL error",
        "top-1",
        "perplexity",
        "bits per weight",
        "CPU s",
        "wall s",
        "MB",
        "logits apart",
        "failed",
    )
    return {column: row.get(column, "") for column in columns}


def table(rows: list[Row], first: int = 4, second: int = 3) -> str:
    """Markdown: a program a line, everything at the first width and what matters at the second."""
    heads = ["program", f"{first} bits: share", "KL", "same top-1, %", "perplexity", "bits per weight", "CPU s", "peak MB"]
    heads += [f"{second} bits: share", "KL", "same top-1, %"]
    lines = [heads, ["---"] * len(heads)]
    by_width = {bits: {row["program"]: row for row in rows if row["bits"] == bits} for bits in (first, second)}
    for program in PROGRAMS:
        one, two = (by_width[bits].get(program.name) for bits in (first, second))
        if one or two:
            lines.append([program.name, *_quality(one), *_effort(one), *_quality(two)[:3]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summary(models: dict[str, list[Row]], widths: tuple[int, ...] = (4, 3)) -> str:
    """Markdown: the share of plain rounding's KL, a package a line and a model and width a column; the best of a package's methods."""
    lines = [["program", *(f"{model}, {bits} bits" for model in models for bits in widths)]]
    lines.append(["---"] * len(lines[0]))
    for driver, package in PACKAGES.items():
        names = {program.name for program in PROGRAMS if program.driver == driver} - {PLAIN}
        best = [
            min((row["share"] for row in rows if row["program"] in names and row["bits"] == bits and "share" in row), default=None)
            for rows in models.values()
            for bits in widths
        ]
        if any(best):
            lines.append([package, *("" if share is None else f"{share:.2f}" for share in best)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _quality(row: Row | None) -> list[str]:
    if row is None or "KL" not in row:
        return ["failed" if row else "", *[""] * 3]
    return [f"{row['share']:.2f}" if "share" in row else "", f"{row['KL']:.3g}", f"{100 * row['top-1']:.1f}", f"{row['perplexity']:#.4g}"]


def _effort(row: Row | None) -> list[str]:
    if row is None or "KL" not in row:
        return [""] * 3
    return [f"{row['bits per weight']:.2f}", f"{row['CPU s']:.2g}" if row["CPU s"] < 10 else f"{row['CPU s']:.0f}", f"{row['MB']:.0f}"]


def update_tables(folder: Path = ROOT) -> None:
    """Put the tables of results/ between their marks in the READMEs."""
    models = {file.stem.removeprefix("peers_"): json.loads(file.read_text())["rows"] for file in sorted(RESULTS.glob("peers_*.json"))}
    for name, rows in models.items():
        replace(folder / "benchmarks" / "README.md", f"peers {name}", table(rows))
    replace(folder / "README.md", "peers", summary({name: models[name] for name in sorted(models, reverse=True)}))


def replace(file: Path, mark: str, content: str) -> None:
    """What is between `<!-- mark -->` and `<!-- end -->` of a file becomes `content`."""
    text, count = re.subn(
        rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{content}\n{m[2]}", file.read_text(encoding="utf-8"), flags=re.S
    )
    if count != 1:
        raise ValueError(f"{file} has {count} tables marked <!-- {mark} --> ... <!-- end -->; one is needed")
    file.write_text(text, encoding="utf-8")
