"""Forecasts and contents for a person, in 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from awq_hf.exporters.reading import PACKAGES
from awq_hf.inspection.contents import Contents
from awq_hf.inspection.forecast import Forecast
from awq_hf.inspection.kernel_use import KernelUse
from awq_hf.preflight import SKIPPED

_FORMATS = {"awq": "AWQ", "gptq": "GPTQ"}


def show(found: Forecast | Contents, console: Console) -> None:
    def say(lines: list[str]) -> None:
        for line in lines:
            indent = " " * (len(line) - len(line.lstrip()))
            wrapped = textwrap.fill(line, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            console.print(wrapped, highlight=False, markup=False, soft_wrap=True)

    if isinstance(found, Contents):
        say(_contents(found))
        return
    say(_model(found))
    if found.kinds:
        console.print(_table(found))
    say(_staying_float(found) + _folds(found) + _refusal(found) + _result(found))


def _model(found: Forecast) -> list[str]:
    return [
        found.model,
        f"{found.class_name}, {found.dtype}, {found.parameters:,} parameters, {size(found.bytes_on_disk)} on disk",
        f"{found.block_count} blocks in {found.blocks}",
    ]


def _table(found: Forecast) -> Table:
    title = f"\nQuantized to {_grid(found.spec)}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="", pad_edge=False)
    for header, justify in (("Linear", "left"), ("out x in", "right"), ("count", "right"), ("scales fold into", "left"), ("bits", "right")):
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for kind in found.kinds:
        fold = kind.fold or ("none" if kind.probed else "?")
        bits = "float" if kind.bits_per_weight is None else f"{kind.bits_per_weight:.2f}"
        table.add_row(
            kind.name,
            ("" if kind.experts == 1 else f"{kind.experts} x ") + f"{kind.shape[0]} x {kind.shape[1]}",
            str(kind.count),
            fold,
            bits,
        )
    return table


def _staying_float(found: Forecast) -> list[str]:
    """By reason, since many share one."""
    reasons: dict[str, list[str]] = {}
    for kind in found.kinds:
        if kind.reason is not None:
            fitting = "" if kind.group_size in (None, *kind.group_sizes) else f"; these divide it: {', '.join(map(str, kind.group_sizes))}"
            reasons.setdefault("--skip" if kind.reason == SKIPPED else kind.reason + fitting, []).append(kind.name)
    for name, (count, reason) in found.left_in_float.items():
        reasons.setdefault(reason, []).append(name + _times(count))
    lines = [line for reason, names in reasons.items() for line in (f"  {', '.join(dict.fromkeys(names))}", f"    {reason}")]
    return ["Left in float:", *lines] if lines else []


def _folds(found: Forecast) -> list[str]:
    if not found.kinds:
        return []
    if not found.probed and not found.not_probed:
        return ["", "Folds are found by experiment on weights, which are not here but on the Hub."]
    blocks = f"block{'s' * (len(found.probed) > 1)} {', '.join(map(str, found.probed))}"
    lines = ["", f"Folds were found and verified with the weights of {blocks}."] if found.probed else [""]
    return lines + [f"Block {index} could not be tried by itself: {why}" for index, why in found.not_probed.items()]


def _refusal(found: Forecast) -> list[str]:
    if found.refusal is None:
        return []
    if any(kind.refused for kind in found.kinds):
        remedy = "choose another --group-size or --bits, or leave them in float with --skip, as is reckoned below"
        return [f"awq-hf quantize refuses layers that do not fit: {remedy}."]
    return [f"awq-hf quantize refuses this: {found.refusal}"]


def _result(found: Forecast) -> list[str]:
    if found.seconds is None:
        return []
    total, memory = sum(found.result_bytes.values()), sum(found.memory.values())
    free = "" if found.memory_free is None else f"; {found.device} has {size(found.memory_free)} free"
    lines = [
        "",
        f"Result  {size(total)} on disk, {total / max(found.bytes_on_disk, 1):.0%} of now",
        *_breakdown(found.result_bytes),
        f"        {found.result_bits_per_weight:.2f} bits a quantized weight, {8 * total / found.parameters:.2f} over all parameters",
        f"Memory  about {size(memory)} at the peak{free}",
        *_breakdown(found.memory),
        f"Time    about {duration(found.seconds)} for {found.calibration['samples']} windows of {found.calibration['seq_len']} tokens",
        "Memory and time are estimates; time at the speed that was measured here just now, which other programs share.",
    ]
    lines[-2:-2] = _serving(found.serving)
    if not found.probed:
        lines.append("Without the weights they are rougher: every Linear counts as having its own input.")
    if found.fits is False:
        alone = found.memory["quantized model"] > (found.memory_free or 0)
        remedy = "The quantized model alone is larger." if alone else "Fewer --samples or a shorter --seq-len take less."
        lines += ["", f"WARNING: this will not fit in the memory that is free on {found.device}. {remedy}"]
    return lines


def _serving(sentences: list[str]) -> list[str]:
    return [f"{'' if i else 'Serving':<8}{sentence}" for i, sentence in enumerate(sentences)]


def _breakdown(sizes: dict[str, int]) -> list[str]:
    return [f"        {size(amount):>8} {what}" for what, amount in sizes.items() if amount]


def _contents(found: Contents) -> list[str]:
    lines = [
        found.model,
        f"{found.class_name}, {_FORMATS.get(found.format, found.format)} {' and '.join(found.layouts) or found.version or ''}".rstrip()
        + (f": {_grid(found.spec)}" if found.spec else ""),
        f"{found.quantized_modules} modules quantized"
        + (f", {found.bits_per_weight:.2f} bits a weight" if found.bits_per_weight else "")
        + f"; scales {', '.join(found.scales) or 'missing'}",
        f"{size(sum(found.bytes.values()))} on disk",
        *_breakdown(found.bytes),
    ]
    if found.overrides:
        lines.append(f"Other bits or groups for {', '.join(found.overrides)}")
    if found.left_in_float:
        lines.append("Left in float: " + ", ".join(f"{name}{_times(count)}" for name, count in found.left_in_float.items()))
    if found.written_by:
        lines.append(f"Written by {found.written_by}")
    if found.loss_ratio is not None and found.calibration is not None:
        lines.append(
            f"report.json: calibrated on {found.calibration['tokens']:,} tokens ({found.calibration['source']}); output error of a layer "
            f"{found.loss_ratio:.0%} of plain rounding's on average"
        )
    for use in found.kernels:
        lines += _kernels(use, found.device)
    lines += _serving(found.serving)
    return [*lines, _verdict(found)]


def _verdict(found: Contents) -> str:
    if found.format == "awq":
        return "Its tensors fit its config." if found.problem is None else f"PROBLEM: awq-hf cannot load it: {found.problem}"
    if found.problem is None:
        return f"awq-hf eval measures it; awq-hf has kernels for AWQ, other programs for {_FORMATS.get(found.format, found.format)}."
    return f"Of a kind that awq-hf does not read itself: {found.problem}. awq-hf eval measures it with {PACKAGES[found.format]}"


def _kernels(use: KernelUse, device: str) -> list[str]:
    starts = list(use.by_tokens)
    ends = [start - 1 for start in starts[1:]]
    spans = [f"{start}" if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=False)]
    spans.append("any number of" if len(starts) == 1 else f"{starts[-1]} or more")
    kernels = ", ".join(f"{name} for {span}" for name, span in zip(use.by_tokens.values(), spans, strict=True))
    lines = [f"On {device}, {use.modules} modules run with {kernels} tokens a call ({use.dtype})"]
    return lines if use.reason is None else [*lines, f"  no faster kernel for {', '.join(use.names)}: {use.reason}"]


def _grid(spec: dict[str, Any]) -> str:
    groups = "one group a row" if spec["group_size"] == -1 else f"groups of {spec['group_size']}"
    return f"{spec['bits']} bits, {groups}, {'symmetric' if spec['symmetric'] else 'with zero points'}"


def _times(count: int) -> str:
    return f" (x {count})" if count > 1 else ""


def size(amount: int) -> str:
    """Bytes in three figures: 5.25 MB, 141 GB."""
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if amount < 999.5 * scale or unit == "GB":
            value = amount / scale
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    raise AssertionError


def duration(seconds: tuple[float, float]) -> str:
    """A range in the unit that suits its upper end: 8-17 s, 4-8 min, 1.2-2.4 h."""
    unit, scale = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if seconds[1] >= 2 * s), ("s", 1))
    low, high = (s / scale for s in seconds)
    return f"{_two(low)}-{_two(high)} {unit}"


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"
