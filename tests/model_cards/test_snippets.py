"""What a card tells a reader to run is run, where its program is installed; the repository's id is a directory then."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
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
PARTS = "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}"
FOLDERS = ("compressed-tensors", "gptq", "dense")


def blocks(card: bytes, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card.decode(), re.DOTALL)


def section(card: bytes, heading: str) -> bytes:
    """Of the part on how to run it."""
    return re.split(r"\n#+ ", card.decode().split(f"### {heading}\n")[1])[0].encode()


@pytest.fixture(scope="module")
def repository(two_blocks: Path, demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acme/tiny: two blocks of the demonstration model with its tokenizer, AWQ in the root, exports beside it."""
    import awq_hf
    from awq_hf.to_gguf import to_gguf

    path = tmp_path_factory.mktemp("snippets") / ID
    path.parent.mkdir()
    text = demo_dir / "calibration.txt"
    awq_hf.quantize(two_blocks, awq_hf.AwqConfig.plain_rounding(calibration=text, samples=4, seq_len=64), output_dir=path)
    for target in FOLDERS:
        awq_hf.export(path, target, path / target)
    to_gguf(path, path / "tiny-Q4_K.gguf", progress=False)
    return path


@pytest.fixture(scope="module")
def three_bit_repository(two_blocks: Path, demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import awq_hf

    path = tmp_path_factory.mktemp("three") / ID
    path.parent.mkdir()
    config = awq_hf.AwqConfig.plain_rounding(bits=3, calibration=demo_dir / "calibration.txt", samples=4, seq_len=64)
    awq_hf.quantize(two_blocks, config, output_dir=path)
    awq_hf.export(path, "compressed-tensors", path / "compressed-tensors")
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
    card = section(make_readme(path, ID), "transformers")
    assert run_python(card, path.parents[1], monkeypatch, capsys).startswith("The sky is blue because")


@pytest.mark.parametrize("repo_id", [ID, None])
def test_dense_with_transformers_alone(
    repo_id: str | None, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = section(make_readme(repository, repo_id), "Dequantized, bfloat16")
    assert b"awq_hf" not in card
    cwd = repository.parents[1] if repo_id else repository.parent
    assert run_python(card, cwd, monkeypatch, capsys).startswith("The sky is blue because")


def test_widths_that_servers_have_no_kernel_for(
    three_bit_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors")
    card = section(make_readme(three_bit_repository, ID), "compressed-tensors, 3 bits")
    assert not blocks(card, "bash")
    assert run_python(card, three_bit_repository.parents[1], monkeypatch, capsys).startswith("The sky is blue because")


def test_gptq_with_gptqmodel(repository: Path) -> None:
    """GPTQModel reads zero points as they are, which vLLM does not."""
    card = section(make_readme(repository, None), "GPTQ, 4 bits")
    (snippet,), (served,) = blocks(card, "python"), blocks(card, "bash")
    assert served.startswith("python3 -m sglang") and 'GPTQModel.load("tiny/gptq")' in snippet
    compile(snippet, "snippet", "exec")
    interpreter = os.environ.get("AWQ_HF_GPTQMODEL_PYTHON") or (importlib.util.find_spec("gptqmodel") and sys.executable)
    if not interpreter:
        pytest.skip("gptqmodel is not installed (tests/interop/README.md)")
    done = subprocess.run([interpreter, "-c", snippet], cwd=repository.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "The sky is blue because" in done.stdout, done.stderr


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
    for template, whole in ((CHAT, True), (PARTS, False)):
        card = make_card_of(repository, tmp_path / ID, {"tokenizer_config.json": {"chat_template": template}})
        snippets = blocks(card, "python")
        assert len(snippets) == 3 and all("apply_chat_template" in each and ('"type": "text"' in each) != whole for each in snippets)
        assert run_python(section(card, "transformers"), tmp_path, monkeypatch, capsys).startswith("Why is the sky blue?")


def test_transformers_of_a_model_that_writes_no_text(repository: Path, tmp_path: Path) -> None:
    card = make_card_of(repository, tmp_path / ID, {"config.json": {"architectures": ["BertForMaskedLM"]}})
    (snippet,) = blocks(section(card, "transformers"), "python")
    compile(snippet, "snippet", "exec")
    assert "BertForMaskedLM.from_pretrained(name" in snippet and "generate" not in snippet
    assert b"pipeline_tag" not in card and card.count(b"vllm serve") == 1  # of the folder, which is a Llama


def make_readme(repository: Path, repo_id: str | None) -> bytes:
    return make_card(repository, repo_id)["README.md"]


@pytest.mark.parametrize("repo_id", [ID, None])
def test_commands_name_what_is_there(repository: Path, repo_id: str | None) -> None:
    """Of a card without a repository, paths are relative to the directory above."""
    lines = [shlex.split(line) for block in blocks(make_readme(repository, repo_id), "bash") for line in block.splitlines()]
    programs = [line[0] for line in lines]
    hub = bool(repo_id)
    servers, folders = ["vllm", "python3"], ["mlx_lm.generate", *["hf"] * hub, "vllm", "python3", *["hf"] * hub, "python3"]
    assert programs == [*servers, *folders, "llama-completion", *["ollama"] * hub, *["hf"] * hub, "awq-hf"]
    assert lines[-1] == ["awq-hf", "quantize", "--recipe", "recipe.yaml", "MODEL", "OUT"] and (repository / "recipe.yaml").is_file()
    assert not hub or lines[-2] == ["hf", "download", ID, "recipe.yaml", "--local-dir", "."]
    served = [line[2] if line[0] == "vllm" else line[-1] for line in lines if line[0] in servers]
    if repo_id is None:
        assert served == ["tiny", "tiny", "tiny/compressed-tensors", "tiny/compressed-tensors", "tiny/gptq"]
        assert all((repository.parent / place / "config.json").is_file() for place in served)
        return
    assert served == [ID, ID, "tiny/compressed-tensors", "tiny/compressed-tensors", "tiny/gptq"]
    downloads = [dict(itertools.pairwise(line)) for line in lines if line[0] == "hf" and "--include" in line]
    assert [(each["--include"], each["--local-dir"]) for each in downloads] == [("compressed-tensors/*", "tiny"), ("gptq/*", "tiny")]
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--include" in known and "--local-dir" in known
    places = {line[0]: line for line in lines}
    assert places["mlx_lm.generate"][1:] == ["--model", ID, "--prompt", "The sky is blue because", "--max-tokens", "64"]
    assert places["llama-completion"][1:5] == ["--hf-repo", ID, "--hf-file", "tiny-Q4_K.gguf"]
    assert places["ollama"][-1] == f"hf.co/{ID}:tiny-Q4_K.gguf"


def test_mlx(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported most of what it needs."""
    program = pytest.importorskip("mlx_lm.generate")
    words = shlex.split(blocks(section(make_readme(repository, None), "MLX"), "bash")[0])
    assert words[0] == program.__name__
    words[words.index("--max-tokens") + 1] = "4"
    monkeypatch.chdir(repository.parent)
    monkeypatch.setattr(sys, "argv", words)
    program.main()
    assert "Generation: 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("chats", [False, True])
def test_llama_cpp_runs_the_file(chats: bool, repository: Path, tmp_path: Path) -> None:
    """By its Python binding where the program itself is not installed."""
    changes: dict[str, Any] = {"tokenizer_config.json": {"chat_template": CHAT}} if chats else {}
    shutil.copytree(repository, tmp_path / ID)
    make_card_of(repository, tmp_path / ID, changes)
    (command,) = blocks(section(make_readme(tmp_path / ID, None), "llama.cpp"), "bash")
    program, *words = shlex.split(command)
    assert (program, words[:2]) == ("llama-cli" if chats else "llama-completion", ["-m", "tiny/tiny-Q4_K.gguf"])
    assert words[2:] == ([] if chats else ["-no-cnv", "-p", "The sky is blue because", "-n", "64"])
    if chats:  # which would wait for somebody to write
        return
    if shutil.which(program):
        run = subprocess.run(
            [program, *words], cwd=repository.parent, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )
        assert run.returncode == 0, run.stderr
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
    run = subprocess.run([sys.executable, "-c", code, words[1]], cwd=repository.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr


@pytest.mark.parametrize(("program", "heading"), [("vllm", "vLLM"), ("sglang", "SGLang"), ("vllm", "compressed-tensors, 4 bits")])
def test_servers_start(program: str, heading: str, repository: Path) -> None:
    if importlib.util.find_spec(program) is None:
        pytest.skip(f"{program} is not installed")
    command = shlex.split(blocks(section(make_readme(repository, None), heading), "bash")[0])
    with subprocess.Popen(command, cwd=repository.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "startup complete" in line:
                break
        server.terminate()
    assert said and "startup complete" in said[-1], "".join(said[-40:])
