"""Where a model is: its config and the headers of its tensors, from a directory, the Hub's cache, or the Hub. No weight is read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from awq_hf import classes
from awq_hf.headers import Headers, TensorInfo, read_headers, weight_files
from awq_hf.report import REPORT_NAME
from awq_hf.wording import no_model

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Source:
    """A model that was found.

    name: as it was given; config: transformers' config; headers: tensor name -> shape and dtype, of all safetensors files.
    directory: where the weights are, None when they are on the Hub only. report: report.json beside them, if there is one.
    """

    name: str
    config: Any
    headers: Headers
    directory: Path | None
    report: dict[str, Any] | None
    trusted: bool = False  # whether code that comes with it may run

    @property
    def quantization(self) -> dict[str, Any] | None:
        """config.json's quantization_config, or None for an ordinary checkpoint."""
        found = getattr(self.config, "quantization_config", None) or getattr(self.config, "compression_config", None)
        return found if found is None or isinstance(found, dict) else found.to_dict()

    @property
    def quant_method(self) -> str:
        quantization = self.quantization or {}
        return str(quantization.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in quantization else "an unnamed method"))

    def dtype(self) -> torch.dtype:
        """What dtype="auto" comes to: the config's, or else that of the first float tensor."""
        named = getattr(self.config, "dtype", None)
        named = getattr(torch, named) if isinstance(named, str) else named
        return named or next((_FLOATS[info.dtype] for info in self.headers.values() if info.dtype in _FLOATS), torch.float32)

    def empty_model(self, dtype: torch.dtype) -> Any:
        """The model on the meta device: names, shapes and ties, no memory. Raises ValueError when transformers cannot build it."""
        try:
            return classes.empty_model(self.config, dtype, self.trusted)
        except ValueError as error:
            raise ValueError(f"{self.name}: transformers cannot build a model from its config: {_first_line(error)}") from error


def open_source(name: str, revision: str | None = None, trusted: bool = False) -> Source:
    """Find a model by its directory or Hub id. Raises ValueError or FileNotFoundError when it cannot be inspected."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"{name} is a file; give the directory that holds config.json and *.safetensors, or a Hub id")
    directory = path if path.is_dir() else _cached(name, revision)
    if directory is None:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise FileNotFoundError(f"there is no directory {name}, and it cannot be a Hub id (owner/name) either") from None
        return _from_hub(name, revision, trusted)
    if not (directory / "config.json").is_file():
        raise ValueError(no_model(name, directory))
    headers = read_headers(weight_files(directory, name), str(directory))
    report = directory / REPORT_NAME
    try:
        config = classes.read_config(directory, trusted)
    except classes.UntrustedCode:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: transformers cannot read its config.json: {_first_line(error)}") from error
    return Source(name, config, headers, directory, _read_report(report) if report.is_file() else None, trusted)


def _read_report(path: Path) -> dict[str, Any] | None:
    """report.json; None when it is not one of ours: the file's name is a common one."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if {"layers", "calibration", "recipe"} <= report.keys() else None
    except (ValueError, AttributeError):
        return None


def _cached(repo: str, revision: str | None) -> Path | None:
    """The directory of a Hub model whose weights were downloaded before."""
    try:
        directory = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        complete = all(file.is_file() for file in weight_files(directory, repo))
    except (LocalEntryNotFoundError, ValueError):  # an id that is none is a ValueError
        return None
    return directory if complete and (directory / "config.json").is_file() else None


def _from_hub(repo: str, revision: str | None, trusted: bool) -> Source:
    """Config and headers over the network: some hundred kilobytes."""
    try:
        config = classes.read_config(repo, trusted, revision=revision)
        files = get_safetensors_metadata(repo, revision=revision).files_metadata
        try:
            report = _read_report(Path(hf_hub_download(repo, REPORT_NAME, revision=revision)))
        except EntryNotFoundError:
            report = None
    except classes.UntrustedCode:
        raise
    except Exception as error:  # of the network, the Hub and transformers: many classes, all of them the same to a user
        raise ValueError(f"{repo} is no directory here, and the Hub does not give such a model: {_first_line(error)}") from error
    headers = {n: TensorInfo(tuple(info.shape), info.dtype, file) for file, data in files.items() for n, info in data.tensors.items()}
    return Source(repo, config, headers, None, report, trusted)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def stored_bytes(info: TensorInfo) -> int:
    """Size of a tensor in its file. safetensors names dtypes by their width in bits: F16, BF16, I32, F8_E4M3; and BOOL, one byte."""
    width = re.search(r"\d+", info.dtype)
    return math.prod(info.shape) * (int(width[0]) if width else 8) // 8
