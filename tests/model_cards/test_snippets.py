"""What a card tells a reader to run is run, where its program is installed; the repository's id is a directory then."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from awq_hf.model_cards import make_card

ID = "acme/tiny"
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def blocks(card: bytes, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card.decode(), re.DOTALL)


@pytest.fixture(scope="module")
def repository(two_blocks: Path, demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acme/tiny: two blocks of the demonstration model with its tokenizer, AWQ in the root, exports beside it."""
    import awq_hf
    from awq_hf.to_gguf import to_gguf

    path = tmp_path_factory.mktemp("snippets") / ID
    path.parent.mkdir()
    text = demo_dir / "calibration.txt"
    awq_hf.quantize(two_blocks, awq_hf.AwqConfig.plain_rounding(calibration=text, samples=4, seq_len=64), output_dir=path)
    awq_hf.export(path, "compressed-tensors", path / "compressed-tensors")
    to_gguf(path, path / "tiny-Q4_K.gguf", progress=False)
    return path


@pytest.fixture(scope="module")
def three_bit_repository(two_blocks: Path, demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import awq_hf

    path = tmp_path_factory.mktemp("three") / ID
    path.parent.mkdir()
    config = awq_hf.AwqConfig.plain_rounding(bits=3, calibration=demo_dir / "calibration.txt", samples=4, seq_len=64)
    awq_hf.quantize(two_blocks, config, output_dir=path)
    return path


def run_python(card: bytes, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    (snippet,) = blocks(card, "python")
    monkeypatch.chdir(cwd)
    capsys.readouterr()
    exec(compile(snippet, "snippet", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["repository", "three_bit_repository"])
def test_transformers(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = request.getfixturevalue(kind)
    assert run_python(make_readme(path, ID), path.parents[1], monkeypatch, capsys).startswith("The sky is blue because")


def make_card_of(path: Path, target: Path, changes: dict[str, Any]) -> bytes:
    """The card of a copy in which a tokenizer's or a model's config is changed."""
    shutil.copytree(path, target, dirs_exist_ok=True)
    for name, values in changes.items():
        file = target / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return make_card(target, ID)["README.md"]


def test_transformers_with_a_chat_template(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = make_card_of(repository, tmp_path / ID, {"tokenizer_config.json": {"chat_template": CHAT}})
    assert b"apply_chat_template" in card
    assert run_python(card, tmp_path, monkeypatch, capsys).startswith("Why is the sky blue?")


def test_transformers_of_a_model_that_writes_no_text(repository: Path, tmp_path: Path) -> None:
    card = make_card_of(repository, tmp_path / ID, {"config.json": {"architectures": ["BertForMaskedLM"]}})
    (snippet,) = blocks(card, "python")
    compile(snippet, "snippet", "exec")
    assert "BertForMaskedLM.from_pretrained(name" in snippet and "generate" not in snippet
    assert b"pipeline_tag" not in card and b"generate" not in card and card.count(b"vllm serve") == 1  # of the folder, which is a Llama


def make_readme(repository: Path, repo_id: str | None) -> bytes:
    return make_card(repository, repo_id)["README.md"]


@pytest.mark.parametrize("repo_id", [ID, None])
def test_commands_name_what_is_there(repository: Path, repo_id: str | None) -> None:
    """Of a card without a repository, paths are relative to the directory above."""
    lines = [shlex.split(line) for block in blocks(make_readme(repository, repo_id), "bash") for line in block.splitlines()]
    programs = [line[0] for line in lines]
    hub = bool(repo_id)
    assert programs == ["vllm", "python3", *["hf"] * hub, "vllm", "llama-cli", *["ollama"] * hub, *["hf"] * hub, "awq-hf"]
    assert lines[-1] == ["awq-hf", "quantize", "--recipe", "recipe.yaml", "OUT"] and (repository / "recipe.yaml").is_file()
    assert not hub or lines[-2] == ["hf", "download", ID, "recipe.yaml", "--local-dir", "."]
    places = {line[0]: line for line in reversed(lines)}
    if repo_id is None:
        above = repository.parent
        assert all((above / line[2]).exists() for line in lines if line[0] in ("vllm", "llama-cli"))
        assert (above / places["python3"][-1] / "config.json").is_file()
        return
    download = dict(zip(places["hf"], places["hf"][1:], strict=False))
    assert [*repository.glob(download["--include"])] and lines[3][2] == f"{download['--local-dir']}/compressed-tensors"
    known = subprocess.run([Path(sys.executable).with_name("hf"), "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--include" in known and "--local-dir" in known
    assert places["llama-cli"][-2:] == ["--hf-file", "tiny-Q4_K.gguf"] and places["ollama"][-1] == f"hf.co/{ID}:tiny-Q4_K.gguf"


def test_llama_cpp_runs_the_file(repository: Path) -> None:
    """By its Python binding where the program itself is not installed."""
    (command,) = (block for block in blocks(make_readme(repository, None), "bash") if block.startswith("llama-cli"))
    words = shlex.split(command)
    if shutil.which("llama-cli"):
        more = ["-p", "The sky", "-n", "4", "-no-cnv"]
        done = subprocess.run([*words, *more], cwd=repository.parent, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not installed")
    code = (
        "import sys, xllamacpp\n"
        "params = xllamacpp.CommonParams()\n"
        "params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = sys.argv[1], 128, 0, 0\n"
        "request = {'prompt': 'The sky', 'n_predict': 4}\n"
        "xllamacpp.Server(params).handle_completions(request, lambda answer: print(answer['choices'][0]['text']))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, words[-1]], cwd=repository.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr


@pytest.mark.parametrize(("program", "index"), [("vllm", 0), ("sglang", 1), ("vllm", 2)])
def test_servers_start(program: str, index: int, repository: Path) -> None:
    if importlib.util.find_spec(program) is None:
        pytest.skip(f"{program} is not installed")
    command = shlex.split(blocks(make_readme(repository, None), "bash")[index])
    with subprocess.Popen(command, cwd=repository.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "startup complete" in line:
                break
        server.terminate()
    assert said and "startup complete" in said[-1], "".join(said[-40:])
