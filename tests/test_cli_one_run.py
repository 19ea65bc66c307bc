"""`awq-hf quantize` that does it all: the order, what is refused before the work, and what is left when a step fails."""

from __future__ import annotations

import inspect
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf import cli
from awq_hf.block import BlockWork
from awq_hf.cli import common
from awq_hf.cli import quantize as quantize_command
from awq_hf.cli.one_run import OneRun
from awq_hf.exporters.hub import PushResult
from awq_hf.model_cards.facts import Facts
from awq_hf.recipe_file import OPTIONS

PLAIN = ["--samples", "2", "--seq-len", "32", "--rounding", "nearest", "--device", "cpu"]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any], demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is quantized in a second, with a tokenizer."""
    path = tmp_path_factory.mktemp("one-run") / "model"
    tiny_llama(vocab_size=1024, hidden_size=256, intermediate_size=256, max_position_embeddings=512).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_dir / "model" / file, path / file)
    return path


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a Hub that takes everything was asked."""
    calls: list[tuple[Any, ...]] = []

    def push_to_hub(
        model: Any,
        repo_id: str,
        *,
        private: bool | None = None,
        base_model: str | None = None,
        license: str | None = None,
        progress: bool = True,
    ) -> PushResult:
        calls.append(("push", model, repo_id, private, base_model, license, sorted(path.name for path in Path(model).iterdir())))
        return PushResult(repo_id, f"https://hub/{repo_id}", uploaded={"README.md": 4})

    def find_repository(repo_id: str, *, private: bool | None = None) -> SimpleNamespace:
        calls.append(("look", repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def write_card(facts: Facts) -> dict[str, bytes]:
        calls.append(("card", Path(facts.directory), facts.repo_id, facts.base and facts.base.id, facts.licence))
        return {"README.md": b"card", "images/loss.png": b"plot"}

    monkeypatch.setattr("awq_hf.push_to_hub", push_to_hub)
    monkeypatch.setattr("awq_hf.model_cards.card.write_card", write_card)
    monkeypatch.setattr("awq_hf.exporters.hub_repository.find_repository", find_repository)
    return calls


def test_all_in_one_run(
    run: Run, two_blocks: Path, pushes: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_dir: Path
) -> None:
    text, out = tmp_path / "held out.txt", tmp_path / "out"
    text.write_text((demo_dir / "evaluation.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    exports = [word for target in ("gguf", "gguf:Q8_0", "gptq", "dense:float16") for word in ("--export", target)]
    arguments = [*PLAIN, *exports, "--text", text, "--push", "me/model-AWQ", "--private", "--base-model", "me/model", "--license", "MIT"]
    result = run("quantize", two_blocks, out, *arguments)
    assert result.status == 0, result.err
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"model-AWQ-Q4_K_S.gguf", "model-Q8_0.gguf", "gptq/model.safetensors", "dense/model.safetensors"} <= files
    assert {"README.md", "images/loss.png", "evaluation.json", "recipe.yaml", "report.json", "model.safetensors"} <= files
    assert not any("evaluation.json" in name and "/" in name for name in files)
    described = {
        name: GGUFReader(out / name).fields["general.description"].contents() for name in files if name.endswith("AWQ-Q4_K_S.gguf")
    }
    assert all("integers of an AWQ checkpoint" in text for text in described.values()) and described
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    assert [row["files"] for row in rows] == [[], [], [".", "gptq", "dense"], ["model-AWQ-Q4_K_S.gguf"], ["model-Q8_0.gguf"]]
    assert rows[0]["text"] == "held out.txt" and rows[4]["kl"] < rows[2]["kl"]
    kinds = [call[0] for call in pushes]
    assert kinds == ["look", "card", "push"] and pushes[0] == ("look", "me/model-AWQ", True)
    assert pushes[1] == ("card", out, "me/model-AWQ", "me/model", {"license": "mit"})
    assert pushes[2][:6] == ("push", out, "me/model-AWQ", True, "me/model", "mit")
    assert {"README.md", "evaluation.json", "model-Q8_0.gguf"} <= set(pushes[2][6])
    order = ["Written to", "gguf: the same integers", "gguf: Q8_0, from the float weights", "gptq", "dense", "Measuring", "card", "Pushing"]
    places = [result.out.index(part) for part in order]
    assert places == sorted(places) and "https://hub/me/model-AWQ" in result.out and "plain rounding" in result.out
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    expected = {
        "model": "./model",
        "device": "cpu",
        "text": "held out.txt",
        "base_model": "me/model",
        "license": "mit",
        "samples": 2,
        "seq_len": 32,
    }
    assert recipe == {**expected, "export": ["gguf", "gguf:Q8_0", "gptq", "dense:float16"], "rounding": "nearest"}


def test_json_alone_is_on_stdout(run: Run, model: Path, pushes: list[tuple[Any, ...]], tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "held.txt"
    text.write_text("The state of our Union is strong. " * 40)
    result = run("quantize", model, out, *PLAIN, "--export", "compressed-tensors", "--text", text, "--push", "me/model", "--json")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert found["evaluation"] == json.loads((out / "evaluation.json").read_text())
    assert (found["push"]["url"], found["push"]["uploaded"]) == ("https://hub/me/model", {"README.md": 4})
    assert found["exports"] == ["compressed-tensors"] and found["layers"] == json.loads((out / "report.json").read_text())["layers"]
    assert "Exporting to compressed-tensors" in result.err


@pytest.mark.parametrize("option, measured", [([], False), (["--measure"], True), (["--push", "me/m"], True)])
def test_when_it_is_measured(
    option: list[str], measured: bool, run: Run, model: Path, pushes: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneRun, "_measure", lambda _self: {"rows": [{"weights_bytes": 1}], "reference": {"name": ""}})
    monkeypatch.setattr("awq_hf.evaluation_table.tables", lambda *_: [])
    result = run("quantize", model, tmp_path / "out", *PLAIN, *option)
    assert result.status == 0 and ("Measuring" in result.out) == measured, result.err
    if option[:1] == ["--push"]:
        assert "Measuring" not in run("quantize", model, tmp_path / "other", *PLAIN, *option, "--no-measure").out


# Refused before the work


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--export", "onnx"], ["there is no target 'onnx'", "compressed-tensors, gptq, dense, gguf"]),
        (["--export", "awq"], ["AWQ is what OUT holds anyway"]),
        (["--export", "gguf:Q9"], ["type 'Q9' is not written to GGUF files"]),
        (["--export", "gptq:4"], ["gptq has no types"]),
        (["--export", "dense:int8"], ["'int8' is not known", "float16, bfloat16, float32"]),
        (["--export", "gptq", "--export", "gptq"], ["gptq is asked for already"]),
        (["--export", "gguf:Q4_K_M", "--export", "gguf:q4_k_m"], ["gguf:Q4_K_M is asked for already"]),
        (["--export", "dense", "--export", "dense:float16"], ["dense is asked for already"]),
        (["--export", "gguf", "--bits", "8"], ["no type of blocks holds its codes (8 bits"]),
        (["--text", "none.txt"], ["none.txt' does not exist"]),
        (["--text", "none.txt", "--no-measure"], ["contradict each other"]),
        (["--private"], ["--private is about the repository of --push"]),
        (["--base-model", "no id!"], ["--base-model 'no id!' is not the id of a repository"]),
        (["--license", "my own!"], ["--license 'my own!' is not the id of a licence", "apache-2.0", "or other"]),
        (["--calibration", "none.txt"], ["none.txt' does not exist"]),
        (["--group-size", "100"], ["--group-size 100 is"]),
    ],
)
def test_refused_before_the_work(
    options: list[str], parts: list[str], run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--calibration" not in options:  # which quantize() itself looks at, before it loads a weight
        monkeypatch.setattr(awq_hf, "quantize", None)
    assert run("quantize", model, tmp_path / "out", *PLAIN, *options).refused(*parts)
    assert not (tmp_path / "out").exists()


def test_architectures_that_a_target_does_not_know(run: Run, no_work: None, random_model: Any, llama_dir: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, OPTConfig

    opt = OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
        word_embed_proj_dim=64,
    )  # fmt: skip
    random_model(opt).save_pretrained(tmp_path / "opt")
    random_model(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96)).save_pretrained(tmp_path / "gpt2")
    small = ["--group-size", "32"]
    assert run("quantize", tmp_path / "opt", tmp_path / "out", *small, "--export", "gguf").refused("opt")
    assert run("quantize", tmp_path / "gpt2", tmp_path / "out", *small, "--export", "gptq").refused("is a Conv1D")
    assert run("quantize", llama_dir, tmp_path / "out", *small, "--measure").refused("has no tokenizer")


def test_models_that_write_no_text_are_not_measured(run: Run, pushes: list[Any], random_model: Any, demo_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig

    config = BertConfig(vocab_size=1100, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    random_model(config, auto=AutoModelForMaskedLM).save_pretrained(tmp_path / "bert")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_dir / "model" / file, tmp_path / "bert" / file)
    options = [*PLAIN, "--group-size", "32"]
    refusal = "a BertForMaskedLM, which does not predict the next token"
    assert run("quantize", tmp_path / "bert", tmp_path / "out", *options, "--measure").refused(refusal)
    pushed = run("quantize", tmp_path / "bert", tmp_path / "out", *options, "--push", "me/bert")
    assert pushed.status == 0 and "Nothing is measured: a BertForMaskedLM" in pushed.out, pushed.err
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert run("eval", tmp_path / "out", "--reference", tmp_path / "bert", "--save").refused(refusal)


def test_the_original_is_not_replaced(run: Run, no_work: None, pushes: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.api.check_model", lambda *_: AutoModelForCausalLM)
    result = run("quantize", "me/model", tmp_path / "out", "--push", "Me/model")
    assert result.refused("Me/model is the original model, whose weights would be replaced")


def test_a_repository_that_cannot_be_pushed_to(
    run: Run, no_work: None, pushes: list[Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_repository(_repo: str, **_options: Any) -> None:
        raise PermissionError("the token only reads; make one that writes")

    monkeypatch.setattr("awq_hf.exporters.hub_repository.find_repository", find_repository)
    assert run("quantize", model, tmp_path / "out", *PLAIN, "--push", "me/model").refused("the token only reads")


# A step that fails


@pytest.mark.parametrize("error", [ConnectionError("the Hub is away"), KeyboardInterrupt()])
def test_what_is_left_is_said(
    error: BaseException, run: Run, model: Path, pushes: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("awq_hf.measure.measure", fail)
    out = tmp_path / "o u t"
    result = run(
        "quantize", model, out, *PLAIN, "--export", "gptq", "--push", "me/model", "--private", "--base-model", "me/base", "--license", "mit"
    )
    interrupted = isinstance(error, KeyboardInterrupt)
    assert result.status == (130 if interrupted else 1) and ("interrupted" if interrupted else "the Hub is away") in result.err
    commands = [shlex.split(line) for line in result.err.splitlines() if line.startswith("  awq-hf")]
    assert commands == [
        ["awq-hf", "eval", str(out), "--reference", str(model), "--save", "--device", "cpu"],
        ["awq-hf", "card", str(out), "--repo-id", "me/model", "--base-model", "me/base", "--license", "mit"],
        ["awq-hf", "push", str(out), "me/model", "--private", "--base-model", "me/base", "--license", "mit"],
    ]
    assert (out / "gptq" / "config.json").is_file() and not (out / "evaluation.json").exists()
    monkeypatch.undo()
    assert run(*commands[0][1:], "--max-tokens", 512).status == 0 and (out / "evaluation.json").is_file()


@pytest.mark.parametrize("target", ["gguf", "gguf:Q8_0", "dense:float16"])
def test_an_export_that_failed_can_be_repeated(target: str, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("awq_hf.to_gguf.to_gguf", fail)
    monkeypatch.setattr(awq_hf, "export", fail)
    result = run("quantize", model, tmp_path / "out", *PLAIN, "--export", target)
    (again, _card) = [shlex.split(line) for line in result.err.splitlines() if line.startswith("  awq-hf")]
    assert result.status == 1 and "no space left" in result.err and not list(tmp_path.rglob("*.gguf"))
    monkeypatch.undo()
    done = run(*again[1:])
    assert done.status == 0, done.err
    written = {"gguf": "model-AWQ-Q4_K_S.gguf", "gguf:Q8_0": "model-Q8_0.gguf", "dense:float16": "dense/model.safetensors"}[target]
    assert (tmp_path / "out" / written).is_file() and len(list((tmp_path / "out").glob("*.gguf"))) == written.endswith(".gguf")


def test_resume(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_scales = BlockWork.choose_scales

    def fail(self: BlockWork, at: str) -> None:
        if self.name.endswith(at):
            raise KeyboardInterrupt
        choose_scales(self)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWork, "choose_scales", lambda self: fail(self, "layers.0"))
        assert "nothing was written; --resume keeps finished blocks" in run("quantize", model, tmp_path / "out", *PLAIN).err
        stopped = run("quantize", model, tmp_path / "out", *PLAIN, "--resume")
        assert stopped.status == 130 and "kept in" not in stopped.err and not (tmp_path / "out.progress").exists()
        patch.setattr(BlockWork, "choose_scales", lambda self: fail(self, "layers.1"))
        stopped = run("quantize", model, tmp_path / "out", *PLAIN, "--resume")
    assert stopped.status == 130 and f"kept in {tmp_path / 'out'}.progress" in stopped.err and (tmp_path / "out.progress").is_dir()
    assert "nothing was written" not in stopped.err
    other = run("quantize", model, tmp_path / "out", *PLAIN, "--resume", "--bits", 3)
    assert other.refused("recipe.spec.bits was 4 and is 3", "remove the directory") and "goes on from there" not in other.err
    assert run("quantize", model, tmp_path / "out", *PLAIN, "--resume").status == 0
    assert not (tmp_path / "out.progress").exists() and "resume" not in (tmp_path / "out" / "recipe.yaml").read_text()


# The command line itself


def test_options_have_the_defaults_and_names_of_the_config() -> None:
    """What --help shows is what happens."""
    parameters = inspect.signature(quantize_command.quantize).parameters
    given = {name: parameter.default for name, parameter in parameters.items() if name not in ("ctx", "out", "recipe", "resume", "as_json")}
    for name, value in dict(common.in_config(*item) for item in given.items()).items():
        assert value in (OPTIONS[name][1], {}), name


def test_a_revision_is_the_hub_s(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def check_model(model: str, options: dict[str, Any]) -> None:
        asked.append({"model": model, **options})
        raise ValueError("that is enough")

    monkeypatch.setattr("awq_hf.api.check_model", check_model)
    assert run("quantize", "me/model", tmp_path / "out", "--revision", "v2").refused("that is enough")
    assert asked == [{"model": "me/model", "revision": "v2"}]
    assert common.located("me/model@v2") == ("me/model", {"revision": "v2"})
    (tmp_path / "a@b").mkdir()
    assert common.located(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), {})


@pytest.mark.parametrize(
    "words, expected",
    [
        (["quantize", "m", "o", "--rounding", "d"], {"descent"}),
        (["quantize", "m", "o", "--dtype", "f"], {"float16", "float32"}),
        (["quantize", "m", "o", "--export", "gguf:Q4_K_"], {"gguf:Q4_K_M", "gguf:Q4_K_S"}),
        (["quantize", "m", "o", "--export", "d"], {"dense"}),
        (["export", "comp"], {"compressed-tensors"}),
        (["export", "gguf", "m", "o", "--type", "Q8"], {"Q8_0"}),
        (["export", "dense", "m", "o", "--dtype", "b"], {"bfloat16"}),
    ],
)
def test_completion(words: list[str], expected: set[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shells ask for it."""
    line = " ".join(["awq-hf", *words])
    for name, value in {"_AWQ_HF_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "main", lambda: cli.app(prog_name="awq-hf"))
    assert set(run(*words).out.split()) == expected


def test_completion_can_be_installed(run: Run) -> None:
    assert {"install_completion", "show_completion"} <= {p.name for p in typer.main.get_command(cli.app).params}
