"""What happened to every layer: collected while quantizing, written as report.json beside the weights."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from awq_hf.base_model import REPORT_NAME as REPORT_NAME
from awq_hf.model_cards.summary import loss_ratio, summarize
from awq_hf.wording import option


@dataclass
class LayerReport:
    """One quantized Linear, or one of all experts of a layer. Losses are held-out output errors as a share of the output's energy; where
    residual is a number, errors of the sum of the output and the residual stream that it is added to.

    fold: the producer that absorbed the smoothing scales, or None; alpha, family: the scales that won (0: identity).
    dead_channels: input channels that were zero for every calibration token.
    clip: mean ratio of the clipped to the unclipped step. correction, residual: strengths in [0, 1] (transforms/correction.py); residual is
    None where the layer does not make up for errors of the residual stream.
    loss_plain: of plain rounding to nearest of the original weight; loss: of what is stored.
    rounding: the method that produced the codes; fallback: why it is not the one asked for, or None.
    experts: how many matrices of `shape` it stands for; few_tokens: numbers of those that fewer calibration tokens reached than a row has
    weights, whose statistics were filled up with all tokens of the layer (expert_block.py).
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    fold: str | None
    alpha: float
    family: str
    clip: float
    correction: float
    rounding: str
    loss_plain: float
    loss: float
    dead_channels: int = 0
    fallback: str | None = None
    experts: int = 1
    few_tokens: list[int] = field(default_factory=list)
    residual: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.loss + self.loss_plain):
            raise ValueError(overflow(self.name))


def overflow(module: str) -> str:
    """What to say of a module that gets or puts out values that are no numbers, though its weights are."""
    return (
        f"{module} gets or puts out NaN or infinity on the calibration text: activations are too large for the model's dtype; load it with "
        f"{option('dtype', 'bfloat16')} or {option('dtype', 'float32')}"
    )


@dataclass
class Report:
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    base_model: dict[str, Any] = field(default_factory=dict)  # see base_model.describe
    layers: list[LayerReport] = field(default_factory=list)
    left_in_float: dict[str, str] = field(default_factory=dict)  # module -> reason
    notes: list[str] = field(default_factory=list)  # what a person should know, a sentence each
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the enclosed work to seconds[phase]."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write report.json into `directory`, whole or not at all."""
        path = Path(directory) / REPORT_NAME
        partial = path.with_name(f".{REPORT_NAME}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return partial.replace(path)

    def loss_ratio(self) -> float:
        """Mean over layers of loss / plain rounding's loss."""
        return loss_ratio(self.to_dict()["layers"])

    def summary(self) -> str:
        """A few lines for a person."""
        return summarize(self.to_dict())
