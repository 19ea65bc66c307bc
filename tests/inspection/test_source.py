"""What cannot be inspected, and models on the Hub and in its cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError

from awq_hf.headers import read_headers
from awq_hf.inspection import Contents, Forecast, inspect, source


def forecast_of(*arguments: Any, **options: Any) -> Forecast:
    found = inspect(*arguments, **options)
    assert isinstance(found, Forecast)
    return found


def contents_of(path: Path) -> Contents:
    found = inspect(str(path))
    assert isinstance(found, Contents)
    return found


def test_directories_that_hold_no_model(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        inspect(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no config.json"):
        inspect(str(tmp_path))
    shutil.copy(llama_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        inspect(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\)"):
        inspect(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        inspect(str(tmp_path))
    with pytest.raises(ValueError, match="is a file; give the directory"):
        inspect(str(tmp_path / "model.safetensors"))
    shutil.copy(llama_dir / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read its config.json"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="cannot build a model from its config"):
        inspect(str(tmp_path))


def test_code_beside_a_checkpoint_is_not_run(llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="whose code comes with it"):
        inspect(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], None]:
    """hub(directory): the Hub gives the files of this directory as someone/model; the cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def serve(directory: Path) -> None:
        headers = read_headers([str(directory / "model.safetensors")])
        metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=headers)})
        config = transformers.AutoConfig.from_pretrained(directory)

        def look(repo: str, revision: str | None, found: Any) -> Any:
            if (repo, revision) not in (("someone/model", None), ("someone/model", "v2")):
                raise ValueError(f"no {repo} at {revision}")
            return found

        def download(repo: str, name: str, revision: str | None = None) -> str:
            if not (directory / name).is_file():
                raise EntryNotFoundError(f"no {name}")
            return str(look(repo, revision, directory / name))

        read = lambda repo, _trusted, revision=None: look(repo, revision, config)  # noqa: E731
        monkeypatch.setattr(source, "get_safetensors_metadata", lambda repo, revision=None: look(repo, revision, metadata))
        monkeypatch.setattr("awq_hf.inspection.source.classes.read_config", read)
        monkeypatch.setattr(source, "hf_hub_download", download)

    return serve


def test_a_float_model_on_the_hub(hub: Callable[[Path], None], llama_dir: Path, small_config: Callable[..., Any]) -> None:
    here = forecast_of(str(llama_dir), small_config())
    hub(llama_dir)
    there = forecast_of("someone/model", small_config())
    assert there.probed == [] and not any(kind.probed for kind in there.kinds)
    assert there.result_bytes == here.result_bytes and there.bytes_on_disk == here.bytes_on_disk
    assert [replace(kind, fold=None, probed=False) for kind in here.kinds] == there.kinds
    working = lambda said: sum(said.memory.values()) - said.memory["this program"]  # noqa: E731
    assert 0.7 * working(here) < working(there) < 2 * working(here)


def test_an_awq_model_on_the_hub(hub: Callable[[Path], None], quantized_dir: Path) -> None:
    here = contents_of(quantized_dir)
    hub(quantized_dir)
    assert inspect("someone/model") == replace(here, model="someone/model")
    assert inspect("someone/model", revision="v2") == inspect("someone/model")
    with pytest.raises(ValueError, match="no someone/model at v3"):
        inspect("someone/model", revision="v3")
    with pytest.raises(ValueError, match="someone/other is no directory here, and the Hub does not give such a model"):
        inspect("someone/other")


def test_a_hub_model_in_the_cache(hub: Callable[[Path], None], llama_dir: Path, small_config: Callable[..., Any]) -> None:
    repo = Path(constants.HF_HUB_CACHE) / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    snapshot = shutil.copytree(llama_dir, repo / "snapshots" / ("a" * 40))
    assert forecast_of("someone/model", small_config()).probed == [0]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the Hub does not give such a model"):
        inspect("someone/model")
