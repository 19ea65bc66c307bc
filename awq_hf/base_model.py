"""What is known of the model that was quantized: its name, its commit, and what its own card says of licence, languages and so on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers

CARD, REPORT_NAME = "README.md", "report.json"
TIMEOUT = 5  # seconds: a card is not worth waiting for
TEXT, TEXTS = ("license", "license_name", "license_link", "pipeline_tag", "library_name"), ("language", "tags", "base_model")


def identify(name_or_path: str | os.PathLike[str], commit: str | None = None) -> dict[str, Any]:
    """name: the Hub id, or the last part of a directory's path, or ""; revision: a commit's sha, or None; local: whether it is a directory.

    name_or_path, commit: as a loaded model's config has them; "" for a model that was made in memory.
    """
    name = os.fspath(name_or_path)
    if name and not Path(name).is_dir():
        return {"name": name, "revision": commit, "local": False}
    path = Path(name).resolve() if name else Path()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):  # in the Hub's cache
        hub_id = path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        return {"name": hub_id, "revision": path.name, "local": False}
    return {"name": path.name, "revision": None, "local": True}


def describe(name_or_path: str | os.PathLike[str], commit: str | None = None) -> dict[str, Any]:
    """report.json's base_model: what `identify` says, and metadata: keys of the card's header that have the type they should have.

    {} without a card, and where the Hub does not give it at once. Never raises.
    """
    name = os.fspath(name_or_path)
    card = "" if not name else _read(Path(name) / CARD) if Path(name).is_dir() else _from_hub(name, commit)
    return {**identify(name, commit), "metadata": _metadata(card)}


def quantized_from(directory: Path | None) -> dict[str, Any]:
    """What the report.json of a quantized model's directory says of the original, as `describe` did; {} where it says nothing."""
    try:
        said = {} if directory is None else json.loads((directory / REPORT_NAME).read_text(encoding="utf-8"))["base_model"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _from_hub(name: str, commit: str | None) -> str:
    """One try: hf_hub_download repeats what fails, for minutes."""
    try:
        cached = try_to_load_from_cache(name, CARD, revision=commit)
        if isinstance(cached, str):
            return _read(cached)
        if constants.HF_HUB_OFFLINE:
            return ""
        url = hf_hub_url(name, CARD, revision=commit)
        reply = get_session().get(url, headers=build_hf_headers(), timeout=TIMEOUT, follow_redirects=True)
        return reply.text if reply.status_code == 200 else ""
    except Exception:  # of the network, or a name that cannot be one: a card is no reason to fail
        return ""


def _metadata(card: str) -> dict[str, Any]:
    if not card.lstrip().startswith("---"):
        return {}
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody wrote it: it may be anything
        return {}
    found: dict[str, Any] = {key: data[key] for key in TEXT if isinstance(data.get(key), str)}
    for key in TEXTS:
        value = data.get(key)
        words = [_word(word) for word in value] if isinstance(value, list) else _word(value)
        if words and (isinstance(words, str) or all(words)):
            found[key] = words
    return found


def _word(value: Any) -> str | None:
    """Norwegian is `no`, which YAML reads as false."""
    return "no" if value is False else value if isinstance(value, str) else None
