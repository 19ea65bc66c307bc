"""Models whose code comes with them: it runs only where somebody said so, and goes wherever the weights go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import awq_hf
from awq_hf import AwqConfig
from awq_hf.model_cards.card import make_card

PLAIN = ["--samples", "2", "--seq-len", "32", "--rounding", "nearest", "--device", "cpu"]
RAN = "import os, pathlib\npathlib.Path(os.environ['OWN_CODE_RAN']).touch()\n"
CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
    "tokenization_own.py": "from transformers import PreTrainedTokenizerFast\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
Run = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code to that it runs; and nobody is asked anything."""

    def ask(text: str) -> str:
        raise AssertionError(f"a question: {text}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("builtins.input", ask)
        patch.setenv("OWN_CODE_RAN", str(tmp_path_factory.mktemp("ran") / "mark"))
        yield


@pytest.fixture
def own(demo_dir: Path, tmp_path: Path) -> Path:
    """The demonstration model as one of a type that transformers does not know, with a tokenizer that it does not know either."""
    path = Path(shutil.copytree(demo_dir / "model", tmp_path / "own"))
    for name, code in CODE.items():
        (path / name).write_text(f"{RAN}{code}# {tmp_path}\n")  # what has run already is not run again
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    changes = {
        "config.json": {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP},
        "tokenizer_config.json": tokenizer,
    }
    for name, change in changes.items():
        (path / name).write_text(json.dumps({**json.loads((path / name).read_text()), **change}))
    return path


def code_ran() -> bool:
    """Since this was asked the last time."""
    mark = Path(os.environ["OWN_CODE_RAN"])
    ran = mark.exists()
    mark.unlink(missing_ok=True)
    return ran


def test_without_the_flag_nothing_runs(run: Run, own: Path, demo_dir: Path, tmp_path: Path) -> None:
    original = demo_dir / "model"
    commands: list[list[Any]] = [
        ["quantize", own, tmp_path / "out", *PLAIN],
        ["quantize", own, tmp_path / "out", *PLAIN, "--export", "gptq", "--measure"],
        ["eval", own],
        ["eval", original, "--reference", own],
        ["inspect", own],
    ]
    for words in commands:
        result = run(*words)
        assert result.status == 1 and f"{own} is a model of the type 'own', whose code comes with it" in result.err, result.err
        assert "if you trust it, say so: --trust-remote-code" in result.err
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        awq_hf.quantize(own, AwqConfig())
    assert not code_ran() and not (tmp_path / "out").exists()


def test_with_the_flag_it_runs_and_comes_along(run: Run, own: Path, demo_dir: Path, tmp_path: Path, prompt: Tensor) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text((demo_dir / "evaluation.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    exports = ["--export", "dense", "--export", "gptq"]
    result = run("quantize", own, out, *PLAIN, *exports, "--text", text, "--trust-remote-code")
    assert result.status == 0, result.err
    assert code_ran() and len(json.loads((out / "evaluation.json").read_text())["rows"]) == 3
    for folder in (out, out / "dense", out / "gptq"):
        assert {name for name in CODE if (folder / name).is_file()} == CODE.keys()
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    model, dense = (AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True) for place in (out, out / "dense"))
    assert type(model).__name__ == "OwnForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits.float(), dense(prompt).logits.float(), rtol=0.1, atol=0.1)
    assert type(AutoTokenizer.from_pretrained(out, trust_remote_code=True)).__name__ == "OwnTokenizer"
    card = make_card(out)["README.md"].decode()
    loads = [line for line in card.splitlines() if "from_pretrained(" in line or ".load(" in line]
    assert len(loads) == 6 and all("trust_remote_code=True)" in line for line in loads)  # of model and tokenizer, in each folder
    assert "vllm serve out --trust-remote-code" in card
    assert "--recipe recipe.yaml MODEL OUT --trust-remote-code" in card.replace(f"# Repeat{card.partition('# Repeat')[2]}", "")
    for words in (["eval", out, "--reference", own, "--text", text], ["inspect", own], ["inspect", out]):
        assert run(*words, "--trust-remote-code").status == 0


def test_a_recipe_alone_runs_no_code(run: Run, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are passed on: who repeats one has to say it as well."""
    config = AwqConfig.plain_rounding(samples=2, seq_len=16)
    awq_hf.quantize(own, config, output_dir=tmp_path / "first", trust_remote_code=True)
    recipe = tmp_path / "first" / "recipe.yaml"
    text = recipe.read_text()
    assert yaml.safe_load(text)["trust_remote_code"] is True and "--recipe recipe.yaml OUT --trust-remote-code" in text
    monkeypatch.chdir(tmp_path)
    for name in CODE:
        (own / name).write_text((own / name).read_text() + "# changed\n")
    assert code_ran()
    refused = run("quantize", "--recipe", recipe, tmp_path / "second")
    assert refused.status == 1 and "ran code that comes with ./own" in refused.err and "say --trust-remote-code" in refused.err
    assert not code_ran()
    assert run("quantize", "--recipe", recipe, tmp_path / "second", "--trust-remote-code").status == 0 and code_ran()
    assert (tmp_path / "second" / "recipe.yaml").read_text() == text


def test_code_of_a_tokenizer_alone(own: Path, demo_dir: Path, tmp_path: Path) -> None:
    """Of a model that transformers knows."""
    shutil.copy(demo_dir / "model" / "config.json", own)
    config = AwqConfig.plain_rounding(samples=2, seq_len=16)
    with pytest.raises(ValueError, match="no tokenizer was found"):
        awq_hf.quantize(own, config)
    assert not code_ran()
    awq_hf.quantize(own, config, output_dir=tmp_path / "out", trust_remote_code=True)
    assert code_ran() and (tmp_path / "out" / "tokenization_own.py").is_file()
    with pytest.raises(ValueError, match="no tokenizer was found"):  # of somewhere else it is not the model's
        awq_hf.quantize(demo_dir / "model", config, tokenizer=str(own), trust_remote_code=True)
    assert not code_ran()
