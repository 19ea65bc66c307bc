"""A quantization run in a few lines, from what report.json holds."""

from __future__ import annotations

from statistics import fmean
from typing import Any


def summarize(report: dict[str, Any]) -> str:
    """What was done, how much better than plain rounding it is, and every exception to the rule. report: as in report.json."""
    layers, calibration = report["layers"], report["calibration"]
    widths = sorted({layer["bits"] for layer in layers})
    lines = [
        f"{len(layers)} layers quantized to {' and '.join(map(str, widths))} bits in {report['seconds'].get('total', 0):.1f} s, "
        f"calibrated on {calibration['tokens']:,} tokens ({calibration['source']}).",
        f"Output error of a layer on held-out calibration text: {loss_ratio(layers):.0%} of plain rounding's on average.",
    ]
    fallbacks = [layer for layer in layers if layer["fallback"]]
    if fallbacks:
        count = f"{len(fallbacks)} layer{'s' * (len(fallbacks) > 1)}"
        lines.append(f"{count} fell back to simpler rounding:")
        lines += [f"  {layer['name']}: {layer['fallback']}" for layer in fallbacks]
    if report["left_in_float"]:
        lines.append(f"Left in float: {_shortened(list(report['left_in_float']))}.")
    return "\n".join([*lines, *remarks(report), *(f"Note: {note}." for note in report["notes"])])


def remarks(report: dict[str, Any]) -> list[str]:
    """What the layers say about the limits of the run, a sentence each, for the summary and the model card."""
    layers, found = report["layers"], []
    if report["recipe"].get("scale") is not None:
        not_folded = sum(layer["fold"] is None for layer in layers)
        line = f"Smoothing scales help {sum(layer['alpha'] > 0 for layer in layers)} of {len(layers)} layers"
        found.append(line + (f"; {not_folded} have no place to fold them." if not_folded else "."))
    if dead := [layer for layer in layers if layer["dead_channels"]]:
        worst = max(dead, key=lambda layer: layer["dead_channels"])
        count = "1 layer has" if len(dead) == 1 else f"{len(dead)} layers have"
        found.append(
            f"{count} input channels that are zero for every calibration token (most: {worst['name']}, "
            f"{worst['dead_channels']} of {worst['shape'][1]}). Weights there could not be fitted: other calibration text may reach them."
        )
    return found


def loss_ratio(layers: list[dict[str, Any]]) -> float:
    """Mean over layers of loss / plain rounding's loss; 1 when no layer has one."""
    ratios = [layer["loss"] / layer["loss_plain"] for layer in layers if layer["loss_plain"] > 0]
    return fmean(ratios) if ratios else 1.0


def _shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
