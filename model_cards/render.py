"""Facts -> Markdown. What is said where is in templates/; here is how figures and names are written."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from awq_hf.evaluation_table import ORIGINAL, PLAIN, STRANGE_TEXT, perplexity, with_error
from awq_hf.model_cards.artifacts import AUTO_CLASSES, ROOT, Artifact, writes_text
from awq_hf.model_cards.facts import FAST_TARGET, Facts, Measured
from awq_hf.model_cards.made import listed, made
from awq_hf.model_cards.markdown import FILTERS, escape, one_line
from awq_hf.model_cards.metadata import card_data
from awq_hf.model_cards.plots import KL_PLOT, LOSS_PLOT

SECTIONS = ("files", "quality", "run", "chat", "made", "reproduce", "citation")
QUESTION, TEXT = "Why is the sky blue?", "The sky is blue because"  # for models that chat, and that go on from a text
AUDIENCE = {  # {}: the programs
    "awq": "GPUs and servers: {}",
    "gptq": "GPUs and servers: {}",
    "compressed-tensors": "GPUs and servers: {}",
    "gguf": "PCs, Macs and CPUs: {}",
}


def render(facts: Facts, plots: Container[str]) -> str:
    """The whole card; plots: paths of those that there are. Raises ValueError where the Hub's client cannot read its metadata."""
    environment = Environment(
        loader=PackageLoader("awq_hf.model_cards"),
        finalize=escape,  # of every value, unless it is Safe
        undefined=StrictUndefined,
        autoescape=False,  # that would be for HTML
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    context = _context(facts, plots)
    sections = [environment.get_template(f"{name}.md.jinja").render(context).strip() for name in SECTIONS]
    data = card_data(facts)
    text = "\n\n".join(section for section in sections if section)
    card = f"---\n{data.to_yaml()}\n---\n\n{text}\n\n"
    ModelCard(card)  # reads the metadata again
    return card


def _context(facts: Facts, plots: Container[str]) -> dict[str, Any]:
    samples = dict.fromkeys(row.sample for row in facts.rows)
    return {
        "facts": facts,
        "base": facts.base,
        "root": facts.root,
        "report": facts.report,
        "title": facts.title,
        "what": _what(facts),
        "programs": listed(dict.fromkeys(reader for artifact in facts.artifacts for reader in artifact.readers)),
        "instead_of": size(facts.reference_bytes) if facts.reference_bytes and len(facts.artifacts) == 1 else None,
        "files": [_file(facts, artifact) for artifact in facts.artifacts],
        "has_kl": any(row.kl is not None for row in map(facts.row, facts.artifacts) if row),
        "has_bits": any(facts.bits_per_weight(artifact) is not None for artifact in facts.artifacts),
        "samples": [_sample(facts, [row for row in facts.rows if row.sample == sample]) for sample in samples],
        "share": _share(facts),
        "loss_plot": LOSS_PLOT if LOSS_PLOT in plots else None,
        "kl_plot": KL_PLOT if KL_PLOT in plots else None,
        "snippet_gguf": _gguf_snippet(facts),
        "folders": [artifact for artifact in facts.artifacts if artifact.path != ROOT and _is_run(facts, artifact)],
        "listed": listed,
        "text": TEXT,
        "question": QUESTION,
        "as_fast": FAST_TARGET,
        "auto_class": _auto_class,
        "writes_text": writes_text,
        "checkpoints": len(facts.artifacts) > len(facts.gguf),
        **made(facts),
        "memory": {where: size(peak) for where, peak in (facts.report or {}).get("peak_memory_bytes", {}).items() if peak},
    }


def size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.{max(0, 2 - len(str(int(count / scale))) + 1)}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _what(facts: Facts) -> str:
    """quantized to 4 bits with AWQ / in AWQ / as GGUF"""
    bits = sorted({width for artifact in facts.artifacts for width in artifact.bits})
    quantized = [artifact for artifact in facts.artifacts if artifact.format != "float"] or facts.artifacts
    formats = listed(dict.fromkeys(artifact.label.split(",")[0].split(" ")[0] for artifact in quantized))
    return f"quantized to {listed(map(str, bits))} bits ({formats})" if bits else f"as {formats}"


def _is_run(facts: Facts, artifact: Artifact) -> bool:
    """Whether there is something to say on how a checkpoint in a folder is run."""
    if artifact.format == "float" or artifact.readers == ("compressed-tensors",):
        return facts.tokenizer and artifact.class_name is not None
    return writes_text(artifact.class_name) and bool(artifact.readers)


def _auto_class(class_name: str | None) -> str | None:
    return next((auto for end, auto in AUTO_CLASSES.items() if (class_name or "").endswith(end)), class_name)


def _file(facts: Facts, artifact: Artifact) -> dict[str, Any]:
    row, bits = facts.row(artifact), facts.bits_per_weight(artifact)
    first = artifact.files[0]
    several = f"{len(artifact.files)} files" if len(artifact.files) > 1 else None
    inside = f"{artifact.path}/" if artifact.format != "gguf" and artifact.path != ROOT else first
    link = f"https://huggingface.co/{facts.repo_id}/blob/main/" if facts.repo_id and artifact.format == "gguf" else None
    kl = None if row is None or row.kl is None else f"{row.kl:.3g}"
    return {
        "label": artifact.label,
        "name": inside if several is None or inside != first else first.rpartition("-00001")[0] + "-*",
        "link": link and f"{link}{first}",
        "several": several,
        "size": size(artifact.size),
        "bits": None if bits is None else f"{bits:.2f}",
        "kl": kl,
        "audience": _audience(artifact),
        "marks": _marks(facts, artifact),
        "made": artifact.made and one_line(artifact.made).rstrip("."),
    }


def _audience(artifact: Artifact) -> str:
    if artifact.readers == ("awq-hf",):
        return "awq-hf only"
    if artifact.format == "float":
        return "what reads the original"
    fast = [name for name in artifact.readers if name not in artifact.slow]
    slow = f"; slowly: {', '.join(artifact.slow)}" if artifact.slow else ""
    return AUDIENCE.get(artifact.format, "{}").format(", ".join(fast)) + slow if artifact.readers else ""


def _marks(facts: Facts, artifact: Artifact) -> list[str]:
    """What distinguishes it from all others."""
    found = []
    if len(facts.artifacts) > 1:
        rows = [(other.path, row.kl, row) for other in facts.artifacts if (row := facts.row(other)) and row.kl is not None]
        if len(rows) == len(facts.artifacts) and len({row.sample for *_, row in rows}) == 1:
            # by more than its standard error
            highest = {path: kl + (row.kl_se or 0.0 if path == artifact.path else 0.0) for path, kl, row in rows}
            if _only_least(highest, artifact.path):
                found.append("closest to the original")
        if _only_least({other.path: other.size for other in facts.artifacts}, artifact.path):
            found.append("smallest")
    return found


def _only_least(values: dict[str, Any], name: str) -> bool:
    return all(value > values[name] for other, value in values.items() if other != name)


def _sample(facts: Facts, rows: list[Measured]) -> dict[str, Any]:
    """A table of figures that can be compared."""
    first = rows[0]
    return {
        "text": first.text,
        "sha256": first.sha256,
        "tokens": f"{first.tokens:,}" if first.tokens else None,
        "seq_len": first.seq_len,
        "rows": [_quality(facts, row) for row in rows],
        "strange": STRANGE_TEXT if facts.is_strange(first.sample) else None,
    }


def _quality(facts: Facts, row: Measured) -> dict[str, Any]:
    described = [artifact.label for artifact in facts.artifacts if facts.row(artifact) is row]
    runtime = "" if row.runtime == "transformers" else f", by {row.runtime}"
    original = row.name == ORIGINAL
    return {
        "name": {ORIGINAL: "Original", PLAIN: "Plain rounding"}.get(row.name) or _together(described or [row.name]) + runtime,
        "here": bool(described),
        "perplexity": None if row.perplexity is None else perplexity(row.perplexity),
        "kl": None if row.kl is None or original else with_error(row.kl, row.kl_se),
        "kl_99": None if row.kl_99 is None or original else f"{row.kl_99:.3g}",
        "top1": None if row.top1 is None or original else f"{row.top1:.1%}",
    }


def _together(labels: list[str]) -> str:
    """AWQ and compressed-tensors, 4 bits; Dequantized, bfloat16"""
    forms: dict[str, list[str]] = {}
    for form, _, width in (label.partition(", ") for label in labels):
        forms.setdefault(width, []).append(form)
    return "; ".join(listed(some) + f", {width}" * bool(width) for width, some in forms.items())


def _share(facts: Facts) -> dict[str, str] | None:
    """How much of plain rounding's divergence is left, of the first file that was measured on the same text."""
    plain = next((row for row in facts.rows if row.name == PLAIN and row.kl), None)
    for artifact in facts.artifacts:
        row = facts.row(artifact)
        if plain and plain.kl and row and row.kl is not None and row.sample == plain.sample and artifact.format != "float":
            return {"label": artifact.label, "share": f"{row.kl / plain.kl:.0%}"}
    return None


def _gguf_snippet(facts: Facts) -> dict[str, Any] | None:
    """The file to begin with: the closest to the original, or else the largest."""
    if not facts.gguf:
        return None
    measured = {artifact.path: row.kl for artifact in facts.gguf if (row := facts.row(artifact)) and row.kl is not None}
    chosen = min(facts.gguf, key=lambda artifact: measured.get(artifact.path, math.inf))  # of several the first, which is the largest
    alone = chosen.tag is not None and [artifact.tag for artifact in facts.gguf].count(chosen.tag) == 1
    return {"file": chosen.files[0], "tag": chosen.tag if alone else None, "label": chosen.label}
