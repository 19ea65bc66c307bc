"""The fixture `hub`: a Hub on loopback, which the real client of this process talks to over a socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.hf_api
import pytest
import transformers.utils.hub
from huggingface_hub import close_session, constants

from tests.hub.server import Hub

WRITER, READER, OTHER = ("hf_" + letter * 34 for letter in "mro")  # what the tokens of Hub.users are


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Logged in as "me", who may write; an empty cache. Waiting takes no time: hub.slept says how long it would have been."""
    server = Hub()
    fresh_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(time, "sleep", server.slept.append)
    close_session()
    yield server
    close_session()
    server.close()


def fresh_cache(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """What is downloaded from here on goes to an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Of another process that is to talk to `hub`; huggingface_hub reads these when it is imported."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": WRITER}
