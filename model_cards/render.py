"""Facts -> Markdown. What is said where is in templates/; here is how figures and names are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from awq_hf.evaluation_table import STRANGE_TEXT, perplexity, with_error
from awq_hf.model_cards.artifacts import AUTO_CLASSES, ROOT, Artifact, writes_text
from awq_hf.model_cards.facts import FAST_TARGET, ORIGINAL, PLAIN, Facts, Measured
from awq_hf.model_cards.markdown import FILTERS, escape, one_line
from awq_hf.model_cards.metadata import card_data
from awq_hf.model_cards.plots import KL_PLOT, LOSS_PLOT
from awq_hf.model_cards.summary import loss_ratio, remarks

SECTIONS = ("files", "quality", "run", "made", "reproduce", "citation")
AUDIENCE = {  # {}: the programs
    "awq": "GPUs and servers: {}",
    "gptq": "GPUs and servers: {}",
    "compressed-tensors": "GPUs and servers: {}",
    "gguf": "PCs, Macs and CPUs: {}",
}
ROUNDING = {
    "nearest": "rounding to nearest",
    "gptq": "rounding with GPTQ",
    "descent": "rounding with GPTQ, then coordinate descent on integers and scales",
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
        "recipe": (facts.report or {}).get("recipe", {}),
        "title": facts.title,
        "what": _what(facts),
        "programs": _listed(dict.fromkeys(reader for artifact in facts.artifacts for reader in artifact.readers)),
        "instead_of": size(facts.reference_bytes) if facts.reference_bytes and len(facts.artifacts) == 1 else None,
        "files": [_file(facts, artifact) for artifact in facts.artifacts],
        "has_kl": any(row.kl is not None for row in map(facts.row, facts.artifacts) if row),
        "has_bits": any(facts.bits_per_weight(artifact) is not None for artifact in facts.artifacts),
        "samples": [_sample(facts, [row for row in facts.rows if row.sample == sample]) for sample in samples],
        "share": _share(facts),
        "loss_plot": LOSS_PLOT if LOSS_PLOT in plots else None,
        "kl_plot": KL_PLOT if KL_PLOT in plots else None,
        "snippet_gguf": _gguf_snippet(facts),
        "folders": facts.served_folders,
        "as_fast": FAST_TARGET,
        "auto_class": _auto_class(facts.class_name),
        "causal": writes_text(facts.class_name),
        "checkpoints": len(facts.artifacts) > len(facts.gguf),
        "method": _method(facts),
        "stored": _stored(facts),
        "kinds": _kinds(facts.layers),
        "baseline": "the type's plain quantizer" if _searched(facts) else "plain rounding",
        "loss": f"{loss_ratio(facts.layers):.0%}" if facts.layers else None,
        "fallbacks": [layer for layer in facts.layers if layer.get("fallback")],
        "remarks": remarks(facts.report) if facts.report else [],
        "notes": list(dict.fromkeys([*(facts.report or {}).get("notes", []), *(text for a in facts.artifacts for text in a.obstacles)])),
        "left": _left(facts),
        "machine": _machine((facts.report or {}).get("machine", {})),
        "seconds": _time((facts.report or {}).get("seconds", {}).get("total")),
        "memory": {where: size(peak) for where, peak in (facts.report or {}).get("peak_memory_bytes", {}).items() if peak},
        "versions": _listed(f"{name} {version}" for name, version in (facts.report or {}).get("versions", {}).items()),
    }


def size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.{max(0, 2 - len(str(int(count / scale))) + 1)}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _listed(names: Iterable[str]) -> str:
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _what(facts: Facts) -> str:
    """quantized to 4 bits with AWQ / in AWQ / as GGUF"""
    bits = sorted({width for artifact in facts.artifacts for width in artifact.bits})
    formats = _listed(dict.fromkeys(artifact.label.split(",")[0].split(" ")[0] for artifact in facts.artifacts))
    return f"quantized to {_listed(map(str, bits))} bits ({formats})" if bits else f"as {formats}"


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
    """AWQ and compressed-tensors, 4 bits"""
    parts = [label.partition(", ") for label in labels]
    if len({width for *_, width in parts}) > 1:
        return _listed(labels)
    return _listed(form for form, *_ in parts) + "".join(parts[0][1:])


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


def _method(facts: Facts) -> str | None:
    recipe = (facts.report or {}).get("recipe") or {}
    if not recipe:
        return None
    if _searched(facts):
        return "smoothing scales judged by each type's own quantizer; codes chosen together, on the steps that it found"
    steps = [
        *(["AWQ's smoothing scales"] if recipe.get("scale") else []),
        *(["clipping of group ranges"] if recipe.get("clip") else []),
        ROUNDING.get(recipe.get("rounding", ""), one_line(recipe.get("rounding"))),
    ]
    fitted = "; each layer is fitted to the inputs that it gets from the layers quantized before it"
    return _listed(steps) + (fitted if recipe.get("stream") == "quantized" else "")


def _searched(facts: Facts) -> bool:
    """Whether the report is of a search for GGUF's types."""
    return any("kind" in layer for layer in facts.layers)


def _stored(facts: Facts) -> list[str]:
    """How Linears are stored, from what the report says of each, or else from config.json."""
    if _searched(facts):
        kinds = Counter(_type_name(layer["kind"]) for layer in facts.layers)
        return [f"{kind} ({count} Linears)" for kind, count in kinds.most_common()]
    symmetric = (facts.report or {}).get("recipe", {}).get("spec", {}).get("symmetric")
    stored = facts.root.quantization if facts.root else {}
    if symmetric is None and isinstance(stored.get("zero_point"), bool):
        symmetric = not stored["zero_point"]
    grid = "" if symmetric is None else ", symmetric" if symmetric else ", with zero points"
    if facts.layers:
        found = Counter((layer["bits"], layer["group_size"]) for layer in facts.layers).most_common()
    elif isinstance(group := stored.get("group_size", stored.get("q_group_size")), int) and facts.root and facts.root.bits:
        found = [((facts.root.bits[0], group), 0)]
    else:
        return []
    count = (lambda number: f" ({number} Linears)") if len(found) > 1 else lambda number: ""
    return [f"{bits} bits, {_groups(group)}{grid}{count(number)}" for (bits, group), number in found]


def _type_name(kind: Any) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name if isinstance(kind, int) else one_line(kind)


def _groups(group_size: int) -> str:
    return "one scale a row" if group_size == -1 else f"a scale for {group_size} input channels"


def _kinds(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Linears of one name in all blocks: how many, and what is left of plain rounding's loss."""
    found: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        found.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    worst = {kind: max(some, key=_ratio) for kind, some in found.items()}
    return [
        {"kind": kind, "count": len(some), "loss": f"{loss_ratio(some):.0%}", "worst": f"{_ratio(worst[kind]):.0%}"}
        for kind, some in found.items()
    ]


def _ratio(layer: dict[str, Any]) -> float:
    return layer["loss"] / layer["loss_plain"] if layer["loss_plain"] > 0 else 1.0


def _left(facts: Facts) -> list[dict[str, Any]]:
    """Modules in float, those of all blocks as one, with the reason where it is known."""
    if facts.report:
        named = [*facts.report["left_in_float"].items()]
    else:
        entries = facts.root.quantization.get("modules_to_not_convert") if facts.root else None
        named = [(name, None) for name in entries or () if isinstance(name, str)]
    found: dict[tuple[str, str | None], list[str]] = {}
    for name, reason in named:
        found.setdefault((_starred(name), reason), []).append(name)
    return [
        {"name": starred if len(names) > 1 else names[0], "count": len(names), "reason": reason}
        for (starred, reason), names in found.items()
    ]


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _machine(machine: dict[str, Any]) -> str | None:
    threads = machine.get("threads")
    parts = [
        machine.get("device"),
        machine.get("processor"),
        machine.get("platform"),
        f"{threads} thread{'s' * (threads != 1)}" if threads else None,
    ]
    return ", ".join(str(part) for part in parts if part) or None


def _time(seconds: Any) -> str | None:
    if not isinstance(seconds, (int, float)):
        return None
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
