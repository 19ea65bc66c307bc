"""What a card says, gathered from the JSON files and headers of a directory. Nothing is computed that was not measured."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from awq_hf.base_model import REPORT_NAME, describe
from awq_hf.evaluation_table import is_strange
from awq_hf.model_cards.artifacts import ROOT, Artifact, find_artifacts, read_json, writes_text
from awq_hf.model_cards.card import README, is_generated
from awq_hf.model_cards.chat import Chat, chat_of, template_of
from awq_hf.model_cards.licence import check_licence, licence_of
from awq_hf.wording import option

EVALUATION, RECIPE = "evaluation.json", "recipe.yaml"
FAST_TARGET = "compressed-tensors"  # of an export, for weights that servers run slowly as AWQ


@dataclass(frozen=True)
class Base:
    """The original model. id: on the Hub, where one is known; local: whether it was a directory when it was quantized; metadata: of its
    card, as in report.json."""

    name: str
    id: str | None
    revision: str | None
    local: bool
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A row of evaluation.json; figures that are missing or not finite are None."""

    name: str
    files: tuple[str, ...]
    runtime: str
    text: str
    sha256: str
    tokens: int
    seq_len: int
    weights_bytes: int | None
    bits_per_weight: float | None
    perplexity: float | None
    kl: float | None
    kl_se: float | None
    kl_99: float | None
    top1: float | None

    @property
    def sample(self) -> tuple[str, str, int, int]:
        """What was read. Only rows of the same sample can be compared."""
        return self.text, self.sha256, self.tokens, self.seq_len


@dataclass(frozen=True)
class Facts:
    """directory: as the user called it. where: the repository's id, or the directory's name, which snippets use.

    licence: license, license_name and license_link of the card's header, those that there are. report: report.json or None; recipe: the
    text of recipe.yaml or None; rows, date: of evaluation.json; reference_bytes: of the original's weights. chat: the prompt format, None
    of a model without a chat template, and where that fails: chat_problem says why then. tokenizer, code: whether there is a tokenizer,
    and code that loading runs.
    """

    directory: str
    title: str
    where: str
    repo_id: str | None
    base: Base | None
    licence: dict[str, Any]
    artifacts: list[Artifact]
    report: dict[str, Any] | None
    recipe: str | None
    rows: list[Measured]
    date: str | None
    reference_bytes: int | None
    chat: Chat | None
    chat_problem: str | None
    tokenizer: bool
    code: bool

    @property
    def root(self) -> Artifact | None:
        return next((artifact for artifact in self.artifacts if artifact.path == ROOT), None)

    @property
    def class_name(self) -> str | None:
        return self.root.class_name if self.root else None

    @property
    def gguf(self) -> list[Artifact]:
        return [artifact for artifact in self.artifacts if artifact.format == "gguf"]

    @property
    def served_folders(self) -> list[Artifact]:
        """Exports that vLLM and SGLang load, out of a folder."""
        return [a for a in self.artifacts if a.path != ROOT and writes_text(a.class_name) and "vLLM" in a.readers]

    @property
    def layers(self) -> list[dict[str, Any]]:
        return self.report["layers"] if self.report else []

    def is_strange(self, sample: tuple[str, str, int, int]) -> bool:
        """Whether the text of this sample is strange to all models that were measured on it."""
        return is_strange(row.perplexity for row in self.rows if row.sample == sample)

    def row(self, artifact: Artifact) -> Measured | None:
        return next((row for row in self.rows if artifact.path in row.files or {*artifact.files} & {*row.files}), None)

    def bits_per_weight(self, artifact: Artifact) -> float | None:
        """As measured, where the row is of this artifact in the first place and not of another that holds the same integers; of GGUF the
        file's own."""
        row = self.row(artifact) if artifact.format != "gguf" else None
        own = row is not None and row.files[:1] in ((artifact.path,), artifact.files[:1])
        return row.bits_per_weight if row and own and row.bits_per_weight is not None else artifact.bits_per_weight


def gather(
    directory: str | os.PathLike[str], repo_id: str | None = None, base_model: str | None = None, license: str | None = None
) -> Facts:
    """Arguments are make_card's. Raises ValueError for a directory without a model, and for a float model that no report.json says was
    ever quantized; for files that cannot be read, and for names that are no Hub ids, or no licence's.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{directory} is not a directory; give the one that awq-hf quantize wrote")
    check_hub_id("repo_id", repo_id)
    check_hub_id("base_model", base_model)
    license = check_licence(license)
    report = _report(path / REPORT_NAME)
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in report["layers"]} if report else {}
    artifacts = find_artifacts(path, shapes)
    if not artifacts:
        raise ValueError(f"{directory} holds no model: neither config.json with safetensors files nor a GGUF file is there")
    if report is None and all(artifact.format == "float" for artifact in artifacts):
        raise ValueError(
            f"{directory} holds a float model, and nothing that is quantized: this card would tell of what was not done. Give the "
            "directory that awq-hf quantize or export wrote; a README.md of your own is pushed as it is"
        )
    before = _said_before(path)
    if base_model is None and _hub_id(report) is None:
        base_model = _named_before(before)
    base = _base(report, base_model)
    if (base.id if base else None) == before.get("base_model") and isinstance(before.get("license"), str):
        license = license or before["license"]
    evaluation = read_json(path / EVALUATION) if (path / EVALUATION).is_file() else {}
    chat, chat_problem = _chat(path, artifacts)
    name = repo_id or path.resolve().name
    return Facts(
        directory=str(directory),
        title=name.rpartition("/")[2],
        where=name,
        repo_id=repo_id,
        base=base,
        licence=licence_of(path, base.metadata if base else {}, base.id if base else None, license),
        artifacts=artifacts,
        report=report,
        recipe=(path / RECIPE).read_text(encoding="utf-8") if (path / RECIPE).is_file() else None,
        rows=list(_rows(evaluation, path / EVALUATION)),
        date=evaluation.get("date") or None,
        reference_bytes=_whole((evaluation.get("reference") or {}).get("weights_bytes")),
        chat=chat,
        chat_problem=chat_problem,
        tokenizer=any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")),
        code=_has_code(path),
    )


def _has_code(path: Path) -> bool:
    """A model of a class that transformers knows may keep a mention of code that it came with, but not the code."""
    configs = [path / name for name in ("config.json", "tokenizer_config.json")]
    return any(path.glob("*.py")) and any(config.is_file() and read_json(config).get("auto_map") for config in configs)


def _report(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found.get("layers"), list) or not isinstance(found.get("calibration"), dict):
        raise ValueError(f"{path} has no layers or no calibration, so awq-hf did not write it; remove it, or quantize again")
    return {"left_in_float": {}, "notes": [], "versions": {}, "machine": {}, "seconds": {}, "recipe": {}, "peak_memory_bytes": {}, **found}


def _hub_id(report: dict[str, Any] | None) -> str | None:
    """The original's id, where report.json knows one."""
    said = (report or {}).get("base_model") or {}
    name = said.get("name")
    return name if isinstance(name, str) and name and not said.get("local", True) and _is_hub_id(name) else None


def _said_before(path: Path) -> dict[str, Any]:
    """The header of an earlier card of ours: pushing makes the card again, and need not be told once more what nobody else knows."""
    readme = path / README
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return ModelCard(text).data.to_dict() if is_generated(text) else {}


def _named_before(before: dict[str, Any]) -> str | None:
    """The original's id that an earlier card was given."""
    named = before.get("base_model")
    return named if isinstance(named, str) and _is_hub_id(named) else None


def _base(report: dict[str, Any] | None, base_model: str | None) -> Base | None:
    said = (report or {}).get("base_model") or {}
    metadata = said.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name = said.get("name") or None
    revision = said.get("revision") if isinstance(said.get("revision"), str) else None
    hub_id = base_model
    if base_model is not None:
        revision = revision if name == base_model and not said.get("local") else None
    elif isinstance(name, str):
        hub_id = _hub_id(report)
    else:
        return None
    if hub_id and not metadata.get("license"):  # the directory that was quantized had no card, or the card has been written since
        metadata = {**describe(hub_id)["metadata"], **metadata}
    return Base(hub_id or str(name), hub_id, revision, bool(said.get("local")), metadata)


def _rows(evaluation: dict[str, Any], path: Path) -> Iterator[Measured]:
    rows = evaluation.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
        raise ValueError(f"{path}: rows is not a list of objects with a name; measure again, or remove the file")
    for row in rows:
        figures: dict[str, Any] = {key: _finite(row.get(key)) for key in ("bits_per_weight", "perplexity", "kl", "kl_se", "kl_99", "top1")}
        texts: dict[str, Any] = {key: str(row.get(key) or "") for key in ("text", "sha256")}
        counts: dict[str, Any] = {key: _whole(row.get(key)) or 0 for key in ("tokens", "seq_len")}
        yield Measured(
            name=row["name"],
            files=tuple(str(file).removeprefix("./").rstrip("/") or ROOT for file in row.get("files") or ()),
            runtime=str(row.get("runtime") or "transformers"),
            weights_bytes=_whole(row.get("weights_bytes")),
            **texts,
            **counts,
            **figures,
        )


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def check_hub_id(what: str, name: str | None) -> None:
    """Raises ValueError for what cannot be the name of a repository; None is no name."""
    if name is not None and not _is_hub_id(name):
        raise ValueError(f"{option(what, name)} is not the id of a repository; give owner/name")


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _chat(path: Path, artifacts: list[Artifact]) -> tuple[Chat | None, str | None]:
    """The prompt format, or why there is none although there is a template: of the tokenizer here, or else that of a GGUF file."""
    config = path / "tokenizer_config.json"
    template = template_of(path, read_json(config) if config.is_file() else {})
    template = template or next((artifact.template for artifact in artifacts if artifact.template), None)
    try:
        return (chat_of(template) if template else None), None
    except ValueError as problem:
        return None, str(problem)
