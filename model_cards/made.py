"""How a model was made, as its card says it: what report.json and config.json hold, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from awq_hf.model_cards.facts import Facts
from awq_hf.model_cards.markdown import one_line
from awq_hf.model_cards.summary import loss_ratio, remarks
from awq_hf.wording import starred

ROUNDING = {
    "nearest": "rounding to nearest",
    "gptq": "rounding with GPTQ",
    "descent": "rounding with GPTQ, then coordinate descent on integers and scales",
}
OF_SCALES_KEPT = " and scales"  # what is left out of these where scales are not refitted


def made(facts: Facts) -> dict[str, Any]:
    """What the template of that section is given."""
    report = facts.report or {}
    return {
        "recipe": report.get("recipe", {}),
        "method": _method(facts),
        "fitted": _fitted(facts.layers, report.get("recipe") or {}),
        "stored": _stored(facts),
        "kinds": _kinds(facts.layers),
        "baseline": "the type's plain quantizer" if _searched(facts) else "plain rounding",
        "loss": f"{loss_ratio(facts.layers):.0%}" if facts.layers else None,
        "fallbacks": [layer for layer in facts.layers if layer.get("fallback")],
        "remarks": remarks(report) if report else [],
        "notes": [_sentence(note) for note in dict.fromkeys([*report.get("notes", []), *_obstacles(facts)])],
        "left": _left(facts),
        "machine": _machine(report.get("machine", {})),
        "seconds": _time(report.get("seconds", {}).get("total")),
        "versions": listed(f"{name} {version}" for name, version in report.get("versions", {}).items()),
    }


def _obstacles(facts: Facts) -> list[str]:
    return [text for artifact in facts.artifacts for text in artifact.obstacles]


def _sentence(note: str) -> str:
    """With a capital, unless it begins with a name."""
    first = note.split(" ")[0]
    return note[:1].upper() + note[1:] if first.isalpha() and first.islower() else note


def listed(names: Iterable[str]) -> str:
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _method(facts: Facts) -> str | None:
    recipe = (facts.report or {}).get("recipe") or {}
    if not recipe:
        return None
    if _searched(facts):
        return "smoothing scales judged by each type's own quantizer; codes chosen together, on the steps that it found"
    rounding = ROUNDING.get(recipe.get("rounding", ""), one_line(recipe.get("rounding")))
    steps = [
        *(["AWQ's smoothing scales"] if recipe.get("scale") else []),
        *(["clipping of group ranges"] if recipe.get("clip") else []),
        rounding.removesuffix(OF_SCALES_KEPT) if recipe.get("scales_for") else rounding,
    ]
    return listed(steps)


def _fitted(layers: list[dict[str, Any]], recipe: dict[str, Any]) -> list[str]:
    """What layers were fitted to: what the recipe asked for, as far as it was of use to a layer. See transforms/correction.py."""
    if recipe.get("stream") != "quantized":
        return []
    count = lambda key: sum((layer.get(key) or 0) > 0 for layer in layers) if recipe.get("correction") else 0  # noqa: E731
    aimed, mending = count("correction"), count("residual") if recipe.get("residual") else 0
    return [
        "Each layer is fitted to the inputs that it gets from the layers quantized before it",
        *([f"{aimed} of {len(layers)} layers aim at the float model's outputs in spite of the error in these inputs"] if aimed else []),
        *([f"{mending} of {len(layers)} layers make up for the error that has gathered in the residual stream"] if mending else []),
    ]


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
    kind = (facts.report or {}).get("recipe", {}).get("scales_for")
    exact = f"; scales that GGUF's {one_line(kind)} holds exactly" if kind else ""
    return [f"{bits} bits, {_groups(group)}{grid}{count(number)}{exact}" for (bits, group), number in found]


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
        found.setdefault((starred(name), reason), []).append(name)
    return [
        {"name": pattern if len(names) > 1 else names[0], "count": len(names), "reason": reason}
        for (pattern, reason), names in found.items()
    ]


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
