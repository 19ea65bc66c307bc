"""What breaks between here and the Hub is continued, or ends in one sentence; a repository is never half-made."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, close_session, constants
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf import model_cards
from tests.hub.fixtures import OTHER, READER, WRITER, environment
from tests.hub.server import Hub
from tests.hub.store import Blob

Run = Callable[..., Any]
REPO = "me/tiny-AWQ"


@pytest.fixture(autouse=True)
def stand_in_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cards, "make_card", lambda *_, base_model, **_rest: {"README.md": f"# generated {base_model}\n".encode()})
    monkeypatch.setattr(model_cards, "is_generated", lambda text: text.startswith("# generated"))


@pytest.fixture
def directory(quantized_dir: Path, tmp_path: Path) -> Path:
    """With two large files."""
    copied = Path(shutil.copytree(quantized_dir, tmp_path / "out"))
    (copied / "Tiny-Q4_K_M.gguf").write_bytes(bytes(range(256)) * 400)
    return copied


@pytest.fixture(autouse=True)
def no_tokens(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever is logged, at any level of ours and the client's, holds no token."""
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    caplog.set_level(logging.DEBUG, "awq_hf")
    yield
    assert not any(token in caplog.text for token in (WRITER, READER, OTHER))


def refusal(directory: Path, repo: str = REPO, kind: Any = ValueError, **options: Any) -> str:
    """What a push that fails says: one line without a token."""
    with pytest.raises(kind) as caught:
        awq_hf.push_to_hub(directory, repo, **options)
    text = str(caught.value)
    assert "\n" not in text and not any(token in text for token in (WRITER, READER, OTHER, str(options.get("token"))))
    return text


def oid(path: Path) -> str:
    return Blob(path.read_bytes()).sha256


def is_complete(hub: Hub, directory: Path) -> bool:
    there = hub.repos[REPO].files()
    return all(there[path.name] == path.read_bytes() for path in directory.iterdir())


# Broken uploads


def test_one_cut_is_not_noticed(hub: Hub, directory: Path) -> None:
    hub.fail("PUT", "/lfs/", cut=20_000)
    awq_hf.push_to_hub(directory, REPO)
    assert is_complete(hub, directory) and hub.count("PUT", "/lfs/") == 3


@pytest.mark.parametrize("part_size", [2**40, 30_000], ids=["whole", "in parts"])
def test_a_run_that_broke_is_continued(part_size: int, hub: Hub, directory: Path) -> None:
    arrives, breaks = oid(directory / "Tiny-Q4_K_M.gguf"), oid(directory / "model.safetensors")
    hub.part_size = part_size
    hub.fail("PUT", f"{breaks}" if part_size == 2**40 else f"{breaks}/2", cut=20_000, times=100)
    said = refusal(directory, kind=ConnectionError)
    assert said.startswith(f"{REPO}: the connection broke (")
    assert said.endswith("the repository is new and still empty; run the same command again, it sends only what has not arrived")
    repo = hub.repos[REPO]
    assert (list(repo.files()), len(repo.messages), list(repo.objects)) == ([".gitattributes"], 1, [arrives])
    hub.forget()
    result = awq_hf.push_to_hub(directory, REPO)
    assert is_complete(hub, directory) and len(repo.messages) == 2
    assert hub.count("PUT", arrives) == 0 and hub.count("PUT", breaks) > 0
    assert {"Tiny-Q4_K_M.gguf", "model.safetensors"} <= result.uploaded.keys()


def test_a_repository_that_is_updated_stays_whole(hub: Hub, directory: Path) -> None:
    awq_hf.push_to_hub(directory, REPO)
    before = hub.repos[REPO].files()
    (directory / "Tiny-Q4_K_M.gguf").write_bytes(b"GGUF" * 9000)
    (directory / "report.json").write_text("{}")
    hub.fail("PUT", "/lfs/", cut=1000, times=100)
    assert "the repository is as it was; run the same command again" in refusal(directory, kind=ConnectionError)
    assert hub.repos[REPO].files() == before


def test_xet_that_fails(hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client prefers this transfer, of which the loopback Hub knows nothing."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    said = refusal(directory, kind=ConnectionError)
    assert said.startswith(f"{REPO}: an upload failed (") and "the repository is new and still empty" in said
    assert list(hub.repos[REPO].files()) == [".gitattributes"]


CALLS = [("GET", "whoami"), ("GET", f"models/{REPO}"), ("POST", "/create"), ("POST", "/preupload/"), ("POST", "/batch"), ("PUT", "/lfs/")]
CALLS += [("POST", "/commit/")]


@pytest.mark.parametrize(("method", "part"), CALLS)
def test_errors_of_the_server_are_waited_for(method: str, part: str, hub: Hub, directory: Path) -> None:
    hub.fail(method, part, status=500)
    hub.fail(method, part, status=429, headers={"Retry-After": "17"})
    hub.fail(method, part, status=503)
    awq_hf.push_to_hub(directory, REPO)
    assert is_complete(hub, directory) and len(hub.repos[REPO].messages) == 2
    assert 17 in hub.slept or 18 in hub.slept  # the client adds a second


@pytest.mark.parametrize(("method", "part"), CALLS)
def test_errors_that_last_are_one_sentence(method: str, part: str, hub: Hub, directory: Path, run: Run) -> None:
    hub.fail(method, part, status=500, times=100)
    failed = run("push", directory, REPO)
    assert (failed.status, failed.out) == (1, "")
    assert f"error: {REPO}: the Hub has trouble (" in failed.err and "run the same command again" in failed.err
    assert not hub.repos or list(hub.repos[REPO].files()) == [".gitattributes"]


def test_a_page_in_place_of_an_answer(hub: Hub, directory: Path) -> None:
    hub.fail("POST", "/validate-yaml", status=502, page=True)
    awq_hf.push_to_hub(directory, REPO)
    assert is_complete(hub, directory)
    hub.fail("POST", "/validate-yaml", status=502, page=True, times=100)
    (directory / "report.json").write_text("{}")
    assert "the repository is as it was; run the same command again" in refusal(directory, kind=ConnectionError, base_model="me/tiny")


def test_a_wait_of_hours_is_said_instead(hub: Hub, directory: Path) -> None:
    hub.fail("POST", "/create", status=429, headers={"Retry-After": "7200"})
    assert "the Hub is busy" in refusal(directory, kind=ConnectionError)
    assert hub.slept == [] and hub.repos == {}


# The commit


@pytest.mark.parametrize("how", [{"status": 500}, {"cut": 0}])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(how: dict[str, int], hub: Hub, directory: Path) -> None:
    hub.fail("POST", "/commit/", late=True, **how)
    result = awq_hf.push_to_hub(directory, REPO)
    assert is_complete(hub, directory) and len(hub.repos[REPO].messages) == 2
    assert (result.commit, "config.json" in result.uploaded, result.unchanged) == (hub.repos[REPO].sha("main"), True, [])


def test_a_pull_request_is_not_opened_twice(hub: Hub, directory: Path) -> None:
    hub.create(REPO)
    hub.fail("POST", "/commit/", late=True, status=504)
    said = refusal(directory, kind=ConnectionError, create_pr=True)
    assert f"a pull request may have been opened, so look at {hub.url}/{REPO}/discussions first" in said
    assert list(hub.repos[REPO].branches) == ["main", "refs/pr/1"]


def test_others_commit_meanwhile(hub: Hub, directory: Path) -> None:
    """What they did stays, a card that they wrote included."""
    repo = hub.create(REPO)
    theirs = {"README.md": Blob(b"# theirs\n"), "config.json": Blob(b"{}"), "notes.txt": Blob(b"theirs")}
    hub.fail("POST", "/commit/", do=lambda: repo.commit("main", theirs, "theirs"))
    result = awq_hf.push_to_hub(directory, REPO)
    assert is_complete(hub, directory) and result.kept == ["README.md"]
    assert (repo.files()["README.md"], repo.files()["notes.txt"], len(repo.messages)) == (b"# theirs\n", b"theirs", 3)
    hub.forget()
    (directory / "report.json").write_text("{}")
    hub.fail("POST", "/commit/", do=lambda: repo.commit("main", theirs, f"theirs {len(repo.messages)}"), times=100)
    assert f"{REPO}: others keep committing to it (412: A commit has happened since" in refusal(directory, kind=RuntimeError)
    assert repo.files() == {path: blob.data for path, blob in theirs.items()}


# Refused before anything is sent


TOKENS = {  # what is said of each
    None: "no token was found; log in",
    "hf_" + "x" * 34: "does not accept the token (401), nothing was changed; log in",
    READER: "the token can only read",
    "hf_ab\ncd": "the token has characters that no token has",
    "hf_\u00e4": "the token has characters that no token has",
}


@pytest.mark.parametrize("token", TOKENS, ids=["none", "unknown", "reads", "two lines", "umlaut"])
def test_tokens(token: str | None, hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert TOKENS[token] in refusal(directory, kind=(PermissionError, ValueError), token=token)
    assert hub.repos == {} and hub.count("POST", "/") == 0


def test_no_right_to_write(hub: Hub, directory: Path) -> None:
    hub.create("team/theirs")
    for part, revision, holds in (("/preupload/", None, "the repository is as it was"), ("/branch/", "new", "nothing was changed")):
        hub.fail("POST", part, status=403, times=1)
        said = refusal(directory, "team/theirs", PermissionError, revision=revision)
        assert said == f"team/theirs: the token has no right to do this (403: injected), {holds}; use one that can write to team"
    assert hub.count("PUT", "") == 0


def test_places_that_cannot_be_pushed_to(hub: Hub, directory: Path) -> None:
    repo = hub.create(REPO)
    repo.tags["v1"] = repo.branches["main"]
    assert "'a/b/c' is not the name of a repository" in refusal(directory, "a/b/c")
    assert "v1 of me/tiny-AWQ is a commit or a tag" in refusal(directory, revision="v1")
    assert "is a commit or a tag" in refusal(directory, revision=repo.branches["main"])
    assert "has no revision refs/pr/7" in refusal(directory, revision="refs/pr/7")
    assert "has no revision new" in refusal(directory, revision="new", create_pr=True)
    assert "me/new does not exist, so it has no refs/pr/1" in refusal(directory, "me/new", revision="refs/pr/1")
    assert "exists and is public, and private is for new repositories" in refusal(directory, private=True)
    assert {method for method, _ in hub.log} == {"GET"}


def test_directories_that_are_not_uploaded(hub: Hub, directory: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[str, bytes]] = {
        "looks like a secret": (".env", b"A=1"),
        "looks like a secret, so": ("keys/id_rsa", b""),
        "contains what looks like an access token": ("dense/notes.txt", WRITER.encode()),
        "Tiny-00002-of-00002.gguf is missing": ("Tiny-00001-of-00002.gguf", b"GGUF"),
        "metadata at the top of README.md cannot be read": ("README.md", b"---\na: [\n---\n"),
    }
    for message, (name, content) in cases.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        assert message in refusal(directory)
        path.unlink()
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    shards = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (directory / "model.safetensors.index.json").write_text(shards)
    assert "model-00002-of-00002.safetensors is missing" in refusal(directory)
    assert "is not a directory" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no model: neither" in refusal(tmp_path / "empty")
    assert hub.repos == {} and hub.count("PUT", "") == 0


def test_what_stays_here(hub: Hub, directory: Path) -> None:
    there = awq_hf.push_to_hub(directory, "me/clean").uploaded.keys()
    for name in (".git/config", ".report.json.partial", "0.partial", "__pycache__/a.pyc", ".cache/token", "cache/blob", "a.tmp", "b.lock"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")
    assert awq_hf.push_to_hub(directory, REPO).uploaded.keys() == there


def test_the_hub_refuses_the_card(hub: Hub, directory: Path) -> None:
    hub.fail("POST", "/validate-yaml", status=400)
    assert refusal(directory) == f"{REPO}: the Hub refused it (Invalid metadata in README.md.), the repository is new and still empty"
    assert list(hub.repos[REPO].files()) == [".gitattributes"]


def test_offline_and_interrupted(hub: Hub, directory: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("awq_hf.push.push_directory", interrupt)
        stopped = run("push", directory, REPO)
    assert stopped.status == 130 and stopped.err.startswith("interrupted; nothing was committed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(directory, kind=ConnectionError) == f"{REPO}: the Hub client is offline; unset HF_HUB_OFFLINE and run it again"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    close_session()  # a connection that is kept alive outlives the server's socket
    assert "the connection broke" in refusal(directory, kind=ConnectionError)


def test_a_client_that_another_thread_closed(hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's threads share a connection pool, and the first that has to reconnect closes it."""
    upload, calls = HfApi.preupload_lfs_files, iter([True, True])

    def flaky(self: HfApi, *args: Any, **options: Any) -> None:
        if next(calls, False):
            raise RuntimeError("Error while uploading") from RuntimeError("the client has been closed")
        upload(self, *args, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", flaky)
    awq_hf.push_to_hub(directory, REPO)
    assert is_complete(hub, directory)


# Downloads, and another process


def test_a_broken_download_is_continued(hub: Hub, directory: Path, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    awq_hf.push_to_hub(directory, REPO)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what arrives is kept in such steps
    hub.fail("GET", "/cdn/", cut=20_000)
    model = AutoModelForCausalLM.from_pretrained(REPO)
    assert hub.ranges == ["bytes=20000-"]
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, AutoModelForCausalLM.from_pretrained(directory)(prompt).logits)


def test_a_download_that_breaks_again_and_again(hub: Hub, llama_dir: Path, tmp_path: Path, run: Run, small_config: Any) -> None:
    """One sentence, nothing written, and another run works."""
    awq_hf.push_to_hub(llama_dir, "me/float")
    hub.fail("GET", "/cdn/", cut=10_000, times=100)
    failed = run("quantize", "me/float", tmp_path / "awq")
    assert failed.status == 1 and re.fullmatch(r"error: me/float: the download broke \(peer closed [^\n]+\n", failed.err)
    with pytest.raises(ConnectionError, match="me/float: the download broke"):
        awq_hf.export("me/float", "dense", tmp_path / "dense")
    assert not (tmp_path / "awq").exists() and not (tmp_path / "dense").exists()
    hub.forget()
    awq_hf.quantize("me/float", small_config(samples=2, rounding="nearest"), output_dir=tmp_path / "awq")


def test_the_command_in_a_process_of_its_own(hub: Hub, quantized_dir: Path, tmp_path: Path) -> None:
    """Nothing of it is patched; the card is the real one."""
    arguments = ["push", str(quantized_dir), REPO, "--private", "--base-model", "me/tiny"]
    around = {**os.environ, **environment(hub, tmp_path / "home")}
    command = [sys.executable, "-c", "from awq_hf.cli import main; main()", *arguments]
    done = subprocess.run(command, env=around, cwd=Path(awq_hf.__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert is_complete(hub, quantized_dir) and hub.repos[REPO].private
    assert b"base_model: me/tiny" in hub.repos[REPO].files()["README.md"] and WRITER not in done.stdout + done.stderr
