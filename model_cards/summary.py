"""A quantization run in a few lines, from what report.json holds."""

from __future__ import annotations

from typing import Any


def summarize(report: dict[str, Any]) -> str:
    """What was done, how much better than plain rounding it is, and every exception to the rule. report: as in report.json."""
    layers, calibration = report["layers"], report["calibration"]
    lines = [
        f"{len(layers)} layers quantized to {report['recipe']['spec']['bits']} bits in {report['seconds'].get('total', 0):.1f} s, "
        f"calibrated on {calibration['tokens']:,} tokens ({calibration['source']}).",
        f"Output error of a layer on held-out calibration text: {loss_ratio(layers):.0%} of plain rounding's on average.",
    ]
    if report["recipe"]["scale"] is not None:
        not_folded = sum(layer["fold"] is None for layer in layers)
        line = f"Smoothing scales help {sum(layer['alpha'] > 0 for layer in layers)} of {len(layers)} layers"
        lines.append(line + (f"; {not_folded} have no place to fold them." if not_folded else "."))
    fallbacks = [layer for layer in layers if layer["fallback"]]
    if fallbacks:
        lines.append(f"{len(fallbacks)} layers fell back to simpler rounding, since the held-out text asked for it:")
        lines += [f"  {layer['name']}: {layer['fallback']}" for layer in fallbacks]
    if report["left_in_float"]:
        lines.append(f"Left in float: {', '.join(report['left_in_float'])}.")
    return "\n".join(lines)


def loss_ratio(layers: list[dict[str, Any]]) -> float:
    """Mean over layers of loss / plain rounding's loss; 1 when no layer has one."""
    ratios = [layer["loss"] / layer["loss_plain"] for layer in layers if layer["loss_plain"] > 0]
    return sum(ratios) / len(ratios) if ratios else 1.0
