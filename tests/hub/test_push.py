"""What a push does, seen from the repository: real client, loopback Hub."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq_hf
from awq_hf import model_cards
from tests.hub.fixtures import OTHER, READER, WRITER, fresh_cache
from tests.hub.server import Hub

Run = Callable[..., Any]
REPO = "me/tiny-AWQ"


@pytest.fixture(autouse=True)
def stand_in_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose text is known: which one goes where is what these tests are about."""

    def make_card(
        directory: Path, repo_id: str | None = None, base_model: str | None = None, license: str | None = None
    ) -> dict[str, bytes]:
        card = f"---\ntags:\n- awq\n---\n# {repo_id}, from {base_model}\n<!-- generated -->\n"
        return {"README.md": card.encode(), "images/loss.png": b"\x89PNG"}

    monkeypatch.setattr(model_cards, "make_card", make_card)
    monkeypatch.setattr(model_cards, "is_generated", lambda text: text.endswith("<!-- generated -->\n"))


@pytest.fixture
def directory(quantized_dir: Path, tmp_path: Path) -> Path:
    """A copy to add files to."""
    return Path(shutil.copytree(quantized_dir, tmp_path / "out"))


@pytest.fixture
def logits(prompt: Tensor) -> Callable[..., Tensor]:
    def of(source: Any, **options: Any) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(source, **options) if isinstance(source, (str, Path)) else source
        with torch.no_grad():
            return model(prompt).logits

    return of


def test_a_pushed_directory_is_what_is_pulled(hub: Hub, directory: Path, logits: Any) -> None:
    """Weights, GGUF, folders of exports, card and its pictures: one commit, and each model of it loads."""
    awq_hf.export(directory, "dense", directory / "dense")
    (directory / "Tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
    result = awq_hf.push_to_hub(directory, REPO, base_model="me/tiny")
    repo = hub.repos[REPO]
    local = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    card = {"README.md": b"---\ntags:\n- awq\n---\n# me/tiny-AWQ, from me/tiny\n<!-- generated -->\n", "images/loss.png": b"\x89PNG"}
    assert repo.files() == {".gitattributes": b"", **local, **card}
    assert repo.messages == ["initial commit", f"Upload with awq-hf {awq_hf.__version__}"]
    assert result.uploaded == {path: len(content) for path, content in {**local, **card}.items()}
    assert (result.commit, result.url, result.created, repo.private) == (repo.sha("main"), f"{hub.url}/{REPO}", True, False)
    assert result.commit_url == f"{hub.url}/{REPO}/commit/{result.commit}"
    assert torch.equal(logits(REPO), logits(directory))
    assert torch.equal(logits(REPO, subfolder="dense"), logits(directory / "dense"))


def test_name_alone_private_message_and_description(hub: Hub, directory: Path) -> None:
    assert awq_hf.push_to_hub(directory, "tiny", private=True, commit_message="first").repo_id == "me/tiny"
    assert (hub.repos["me/tiny"].private, hub.repos["me/tiny"].messages[-1]) == (True, "first")
    AutoModelForCausalLM.from_pretrained("me/tiny")
    with pytest.raises(OSError, match="not a valid model identifier|Force download failed"):
        AutoModelForCausalLM.from_pretrained("me/tiny", token=OTHER, force_download=True)
    awq_hf.push_to_hub(directory, "team/tiny")
    assert "model.safetensors" in hub.repos["team/tiny"].files()


def test_a_second_push_sends_what_changed_and_nothing_else(hub: Hub, directory: Path) -> None:
    first = awq_hf.push_to_hub(directory, REPO)
    hub.forget()
    again = awq_hf.push_to_hub(directory, REPO)
    assert (again.uploaded, again.unchanged, again.commit) == ({}, sorted(first.uploaded), first.commit)
    assert {method for method, _ in hub.log} <= {"GET", "HEAD"}
    (directory / "report.json").write_text("{}")
    changed = awq_hf.push_to_hub(directory, REPO)
    assert (changed.uploaded, len(hub.repos[REPO].messages)) == ({"report.json": 2}, 3)
    assert hub.count("PUT", "/lfs/") == 0


def test_branch_and_pull_request(hub: Hub, directory: Path, logits: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.create(REPO, files={"README.md": b"# by hand\n", "notes.txt": b"old"})
    result = awq_hf.push_to_hub(directory, REPO, revision="4bit")
    repo = hub.repos[REPO]
    assert result.url == f"{hub.url}/{REPO}/tree/4bit"
    assert "model.safetensors" not in repo.files() and repo.files("4bit")["notes.txt"] == b"old"
    assert torch.equal(logits(REPO, revision="4bit"), logits(directory))
    pull = awq_hf.push_to_hub(directory, REPO, create_pr=True)
    assert (pull.pull_request, pull.url) == (f"{hub.url}/{REPO}/discussions/1",) * 2
    assert "model.safetensors" in repo.files("refs/pr/1") and "model.safetensors" not in repo.files()
    awq_hf.push_to_hub(directory, REPO, revision="refs/pr/1", overwrite_card=True)
    assert b"generated" in repo.files("refs/pr/1")["README.md"]
    fresh_cache(monkeypatch, tmp_path / "another")
    assert torch.equal(logits(REPO, revision="refs/pr/1"), logits(directory))


def test_a_pull_request_needs_no_right_to_write(hub: Hub, directory: Path) -> None:
    hub.create("other/theirs")
    assert awq_hf.push_to_hub(directory, "other/theirs", create_pr=True).pull_request == f"{hub.url}/other/theirs/discussions/1"
    with pytest.raises(PermissionError, match=r"me, whose token this is, does not belong to other.*open a pull request"):
        awq_hf.push_to_hub(directory, "other/theirs")


def test_which_card_goes(hub: Hub, directory: Path) -> None:
    card = lambda: hub.repos[REPO].files()["README.md"].decode()  # noqa: E731
    awq_hf.push_to_hub(directory, REPO)
    (directory / "README.md").write_text("stale <!-- generated -->\n")  # one that make_card wrote earlier
    awq_hf.push_to_hub(directory, REPO, base_model="me/tiny")
    assert "from me/tiny" in card()
    (directory / "README.md").write_text("# mine\n")
    assert awq_hf.push_to_hub(directory, REPO).kept == []
    assert card() == "# mine\n"
    assert awq_hf.push_to_hub(directory, REPO).kept == []  # it is the directory's too
    (directory / "README.md").unlink()
    assert awq_hf.push_to_hub(directory, REPO).kept == ["README.md"]
    (directory / "README.md").write_text("# mine, later\n")
    assert awq_hf.push_to_hub(directory, REPO).kept == ["README.md"]
    assert card() == "# mine\n"
    assert awq_hf.push_to_hub(directory, REPO, overwrite_card=True).kept == []
    assert card() == "# mine, later\n"
    (directory / "README.md").unlink()
    awq_hf.push_to_hub(directory, REPO, overwrite_card=True)
    assert card().endswith("<!-- generated -->\n")


def test_weights_of_an_earlier_model_make_room(hub: Hub, directory: Path, logits: Any) -> None:
    """Programs read model.safetensors where it is there, shards beside it or not."""
    shards = {f"model-{n:05d}-of-00002.safetensors": b"old" for n in (1, 2)}
    hub.create(
        REPO, files={**shards, "model.safetensors.index.json": b"{}", "other/model.safetensors": b"kept", "adapter.safetensors": b"kept"}
    )
    result = awq_hf.push_to_hub(directory, REPO)
    assert sorted(result.removed) == [*shards, "model.safetensors.index.json"]
    assert not shards.keys() & hub.repos[REPO].files().keys() and "other/model.safetensors" in hub.repos[REPO].files()
    assert torch.equal(logits(REPO), logits(directory))


def test_the_original_is_not_replaced(hub: Hub, directory: Path) -> None:
    report = json.loads((directory / "report.json").read_text())
    (directory / "report.json").write_text(json.dumps(report | {"base_model": {"name": "me/tiny", "local": False}}))
    hub.create("me/tiny", files={"model.safetensors": b"float"})
    with pytest.raises(ValueError, match="me/tiny is the original model, whose weights would be replaced"):
        awq_hf.push_to_hub(directory, "me/tiny")
    assert hub.repos["me/tiny"].files()["model.safetensors"] == b"float"
    awq_hf.push_to_hub(directory, "me/tiny", revision="awq")
    assert hub.repos["me/tiny"].files("awq")["model.safetensors"] == (directory / "model.safetensors").read_bytes()


def test_dry_run_without_a_token_says_what_is_known_here(hub: Hub, directory: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = awq_hf.push_to_hub(directory, REPO, dry_run=True)
    monkeypatch.delenv("HF_TOKEN")
    hub.forget()
    done = run("push", directory, REPO, "--dry-run")
    assert done.status == 0 and "Would upload" in done.out and "model.safetensors" in done.out and "would be created" not in done.out
    assert "The Hub was not asked, since there is no token (`hf auth login`, or HF_TOKEN): whether me/tiny-AWQ exists" in done.out
    found = json.loads(run("push", directory, REPO, "--dry-run", "--json").out)
    assert (found["uploaded"], found["asked"], found["created"]) == (wanted.uploaded, False, False) and wanted.asked and not hub.log
    assert run("push", directory, REPO).refused("no token was found; log in")
    (directory / ".env").write_text("")
    assert run("push", directory, REPO, "--dry-run").refused("looks like a secret")


def test_dry_run_changes_nothing(hub: Hub, directory: Path, run: Run) -> None:
    done = run("push", directory, REPO, "--dry-run")
    assert done.status == 0 and hub.repos == {}
    assert (
        re.match(rf"Would upload 5 files \(\d+(\.\d+)? [kM]B\) to {hub.url}/{REPO}\n  README.md  ", done.out) and "0.0 MB" not in done.out
    )
    assert done.out.endswith(f"{REPO} does not exist yet; it would be created, for everyone to see, unless --private is given.\n")
    assert "would be created, for you alone (--private)" in run("push", directory, REPO, "--dry-run", "--private").out
    hub.create(REPO, files={"config.json": (directory / "config.json").read_bytes(), "README.md": b"# mine\n"})
    done = run("push", directory, REPO, "--dry-run", "--revision", "new", "--json")
    assert json.loads(done.out)["unchanged"] == ["config.json"] and json.loads(done.out)["kept"] == ["README.md"]
    assert {method for method, _ in hub.log} <= {"GET", "HEAD"} and list(hub.repos[REPO].branches) == ["main"]


def test_command_line(hub: Hub, directory: Path, run: Run) -> None:
    hub.create(REPO, files={"README.md": b"# mine\n", "model-1.safetensors": b"old"})
    done = run("push", directory, REPO, "--message", "by hand")
    lines = done.out.splitlines()
    assert (done.status, hub.repos[REPO].messages[-1]) == (0, "by hand")
    assert lines[0].startswith("Uploaded 4 files (1") and lines[0].endswith(f"{hub.url}/{REPO}")
    assert "model-1.safetensors, of an earlier model there, was removed." in lines
    assert lines[-1] == "README.md there was written or edited by a person and is kept; --overwrite-card replaces it."
    (directory / "README.md").write_text("# Mine\n")
    hub.forget()
    for option, value in (("--base-model", "me/x"), ("--license", "mit")):
        assert run("push", directory, REPO, option, value).refused(f"which goes as it is, so {option} {value} would be of no use")
    assert not hub.count("GET", "")
    (directory / "README.md").unlink()
    assert run("push", directory, REPO).out.startswith(
        f"Nothing to upload to {hub.url}/{REPO}\n4 files of the same content are there already."
    )
    done = run("push", directory, "me/b", "--json", "--private", "--create-pr")
    assert {"repo_id", "url", "commit", "pull_request", "uploaded", "unchanged", "bytes", "kept", "removed"} <= json.loads(done.out).keys()
    assert hub.repos["me/b"].private and run("push", directory).status == 2
    for text in (done.out, done.err, run("push", "--help").out):
        assert WRITER not in text


# Models in memory


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained", "awq_hf", "copy"])
def test_a_model_in_memory(how: str, hub: Hub, demo_dir: Path, small_config: Any, logits: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_dir / "model", quantization_config=small_config(samples=2, rounding="nearest"))
    if how == "save_pretrained":
        model.save_pretrained(tmp_path / "tiny-AWQ", push_to_hub=True, commit_message="saved", private=True)
    elif how == "awq_hf":
        assert awq_hf.push_to_hub(model, REPO, max_shard_size="500KB").commit == hub.repos[REPO].sha("main")
    else:
        model = copy.deepcopy(model) if how == "copy" else model
        info = model.push_to_hub(REPO, commit_message="pushed", max_shard_size="500KB")
        assert (info.oid, info.repo_url.repo_id, info.pr_url) == (hub.repos[REPO].sha("main"), REPO, None)
    repo = hub.repos[REPO]
    names = repo.files().keys()
    assert {"config.json", "report.json", "tokenizer.json", "README.md", "images/loss.png"} <= names
    assert ("model.safetensors" in names) == (how == "save_pretrained") == repo.private == (tmp_path / "tiny-AWQ/config.json").exists()
    assert (len(repo.messages), repo.files()["README.md"][-19:]) == (2, b"<!-- generated -->\n")
    assert torch.equal(logits(REPO), logits(model))
    assert AutoTokenizer.from_pretrained(REPO)("a text").input_ids == AutoTokenizer.from_pretrained(demo_dir / "model")("a text").input_ids


def test_a_model_that_was_loaded_and_one_that_is_plain_again(hub: Hub, quantized_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_dir)
    assert model.push_to_hub(REPO, create_pr=True).pr_revision == "refs/pr/1"
    assert b"generated" in hub.repos[REPO].files("refs/pr/1")["README.md"]
    with pytest.raises(TypeError, match="colour"):
        model.push_to_hub(REPO, colour="red")
    assert "push_to_hub" not in model.dequantize().__dict__


# From the Hub


def test_quantize_and_export_of_a_revision(hub: Hub, demo_dir: Path, small_config: Any, tmp_path: Path) -> None:
    """Tokenizer and processor are those of the revision too; main holds nothing."""
    files = {path.name: path.read_bytes() for path in (demo_dir / "model").iterdir()}
    repo = hub.create("me/float", private=True)
    repo.branches["v1"] = repo.branches["main"]
    awq_hf.push_to_hub(demo_dir / "model", "me/float", revision="v1")
    assert files.keys() <= repo.files("v1").keys() and "config.json" not in repo.files()
    text = (demo_dir / "calibration.txt").read_text()[:20000]
    config = awq_hf.AwqConfig(group_size=32, calibration=[text], samples=2, seq_len=64, rounding="nearest")
    awq_hf.quantize("me/float", config, output_dir=tmp_path / "awq", revision="v1")
    assert (tmp_path / "awq/tokenizer.json").read_bytes() == (demo_dir / "model/tokenizer.json").read_bytes()
    awq_hf.export("me/float", "dense", tmp_path / "dense", revision="v1")
    assert (tmp_path / "dense/model.safetensors").exists()
    assert str(tmp_path) not in json.dumps(repo.messages)
    assert Path(constants.HF_HUB_CACHE).is_relative_to(tmp_path)


def test_tokens_that_only_read_pull_but_do_not_push(hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awq_hf.push_to_hub(directory, REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", READER)
    AutoModelForCausalLM.from_pretrained(REPO)
    with pytest.raises(PermissionError, match="can only read"):
        awq_hf.push_to_hub(directory, REPO)
