"""Which files of a directory belong into a repository: all of a model, nothing half-made, no secrets."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from awq_hf.headers import INDEX, WEIGHTS, weight_files

TEMPORARY = ("*.partial", "*.incomplete", "*.tmp", "*.lock", "*.pyc", "*~")
CACHES = ("__pycache__", "cache")
SECRET_NAMES = (
    ".env",
    ".env.*",
    "*.env",
    ".netrc",
    ".git-credentials",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
    "token",
    "*_token",
    "*token.txt",
)
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_TEXT_BYTES = 2**20  # files up to here are searched for tokens
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def collect(directory: Path) -> dict[str, Path]:
    """Path in the repository -> file. Hidden and temporary files and caches stay here.

    Raises ValueError when the directory holds no model or only a part of one, or when something in it looks like a secret.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the one that awq-hf quantize or awq-hf export wrote")
    files: dict[str, Path] = {}
    for path in sorted(directory.rglob("*")):
        *folders, name = path.relative_to(directory).parts
        if not path.is_file() or any(part.startswith(".") or part in CACHES for part in folders):
            continue
        if any(fnmatch(name.lower(), pattern) for pattern in SECRET_NAMES):
            raise ValueError(f"{path} looks like a secret, so nothing of {directory} is uploaded; move it elsewhere")
        if not name.startswith(".") and not any(fnmatch(name, pattern) for pattern in TEMPORARY):
            files["/".join([*folders, name])] = path
    for path in files.values():
        if path.stat().st_size <= _TEXT_BYTES and _TOKEN.search(path.read_bytes()):
            raise ValueError(f"{path} contains what looks like an access token, so nothing of {directory} is uploaded; take it out")
    _check_model(directory, files)
    return files


def is_weights(path: str) -> bool:
    """Whether programs would load it as (a part of) the one safetensors model of its folder."""
    name = path.rpartition("/")[2]
    return name == INDEX or fnmatch(name, "model*.safetensors")


def _check_model(directory: Path, files: dict[str, Path]) -> None:
    folders = {path.parent for path in files.values() if path.name in (WEIGHTS, INDEX) and (path.parent / "config.json").is_file()}
    gguf = [path for path in files.values() if path.suffix == ".gguf"]
    if not folders and not gguf:
        raise ValueError(
            f"{directory} holds no model: neither config.json with safetensors beside it, nor a GGUF file; "
            "give the directory that awq-hf quantize or awq-hf export wrote"
        )
    needed = [file for folder in folders for file in weight_files(folder, str(folder))]
    for path in gguf:
        if match := _SHARD.fullmatch(path.name):
            needed += [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    present = set(files.values())
    if missing := [path for path in needed if path not in present]:
        raise ValueError(f"{missing[0]} is missing, so {directory} holds a part of a model only, and is not uploaded")
