"""What the benchmark scripts share: models and texts to measure on, results as a table and as JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from awq_hf import AwqConfig, demo
from awq_hf.evaluate import Evaluation, evaluate
from awq_hf.machine import processor

RESULTS = Path(__file__).parent / "results"


@dataclass
class Subject:
    """A model with calibration and evaluation tokens that share nothing."""

    name: str
    source: Path
    calibration: torch.Tensor
    evaluation: torch.Tensor
    seq_len: int = 256
    dtype: str = "auto"

    @classmethod
    def packaged(cls) -> Subject:
        """The demonstration model, with its own texts."""
        tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
        texts = (demo.CALIBRATION, demo.EVALUATION)
        calibration, evaluation = (_tokens(tokenizer, path.read_text(encoding="utf-8")) for path in texts)
        return cls("demo-llama", demo.MODEL, calibration, evaluation)

    @classmethod
    def from_directory(cls, source: Path, text: Path, calibration_tokens: int = 100_000) -> Subject:
        """A model of the user's; the first tokens of `text` are for calibration, the rest for evaluation."""
        tokens = _tokens(AutoTokenizer.from_pretrained(source), text.read_text(encoding="utf-8"))
        return cls(source.name, source, tokens[:calibration_tokens], tokens[calibration_tokens:])

    def load(self, config: AwqConfig | None = None, dtype: str | None = None) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, quantization_config=config, dtype=dtype or self.dtype)

    def config(self, plain: bool = False, **changes: Any) -> AwqConfig:
        options: dict[str, Any] = dict(calibration=[self.calibration], samples=64, seq_len=self.seq_len) | changes
        return AwqConfig.plain_rounding(**options) if plain else AwqConfig(**options)

    def measure(self, model: Any, original: Any, max_tokens: int = 40_000) -> Evaluation:
        return evaluate(model, original, [self.evaluation], seq_len=self.seq_len, max_tokens=max_tokens)


def _tokens(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def machine() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("awq-hf", "torch", "transformers")}
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {"processor": processor(), "threads": torch.get_num_threads(), **gpu, "python": platform.python_version(), **versions}


def publish(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, and write them with the machine's description to results/<name>.json."""
    show(title, rows)
    write(name, title, rows)


def read(name: str) -> list[dict[str, Any]]:
    """The rows of results/<name>.json."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=max(160, 14 * len(rows[0]))).print(table)


def write(name: str, title: str, rows: list[dict[str, Any]], **more: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"title": title, "machine": machine(), **more, "rows": rows}, indent=1) + "\n")
