"""`awq-hf eval`: its JSON, its table, and what it refuses before any weights are loaded."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import awq_hf
from awq_hf import cli, evaluation_table
from awq_hf.cli import common
from awq_hf.cli import evaluate as evaluate_command

SEQ_LEN, TOKENS = 64, 640
QUICK = ["--seq-len", SEQ_LEN, "--max-tokens", TOKENS, "--device", "cpu"]


@pytest.fixture
def evaluate(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """evaluate(MODEL, ...): `awq-hf eval` on the demonstration's text, unless another is given."""
    monkeypatch.setattr(common, "debug", False)

    def run(*arguments: object) -> Result:
        text = [] if "--text" in arguments else ["--text", demo_dir / "evaluation.txt"]
        return CliRunner().invoke(cli.app, ["eval", *map(str, [*arguments, *text, *QUICK])])

    return run


@pytest.fixture(scope="module")
def original(demo_dir: Path) -> Path:
    return demo_dir / "model"


@pytest.fixture(scope="module")
def variant(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """variant(name, change): a directory with the demonstration model after change(model), and its tokenizer."""

    def build(name: str, change: Callable[[Any], Any]) -> Path:
        path = tmp_path_factory.mktemp("variant") / name
        model = AutoModelForCausalLM.from_pretrained(original)
        change(model)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(original).save_pretrained(path)
        return path

    return build


def scaled(factor: float) -> Callable[[Any], Any]:
    return lambda model: model.model.norm.weight.data.mul_(factor)


@pytest.fixture(scope="module")
def sharper(variant: Callable[..., Path]) -> Path:
    return variant("sharper", scaled(1.25))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


def is_one_error(result: Result, *parts: str) -> bool:
    """Status 1; on stderr one line "error: ..." with these parts; nothing on stdout."""
    return (
        (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        and result.stderr.startswith("error: ")
        and all(part in result.stderr for part in parts)
    )


def test_json_holds_what_evaluate_returns(evaluate: Callable[..., Result], original: Path, sharper: Path, demo_dir: Path) -> None:
    result = evaluate(sharper, original, "--reference", original, "--json", "--dtype", "float32", "--batch-size", 3)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [each["model"] for each in found] == [str(sharper), str(original)]
    model, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (sharper, original))
    tokenizer = AutoTokenizer.from_pretrained(original)
    expected = awq_hf.evaluate(model, reference, demo_dir / "evaluation.txt", tokenizer, SEQ_LEN, TOKENS, batch_size=3).to_dict()
    size = (original / "model.safetensors").stat().st_size
    assert (sharper / "model.safetensors").stat().st_size == found[0]["weights_bytes"]
    about = {"model": str(sharper), "reference": str(original), "reference_weights_bytes": size}
    assert found[0] == expected | about | {"weights_bytes": found[0]["weights_bytes"]}
    assert expected["kl"] > 0 and (found[1]["kl"], found[1]["top1"], found[1]["weights_bytes"]) == (0, 1, size)


def test_table(evaluate: Callable[..., Result], original: Path, sharper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_command, "console", Console(width=80))
    options = (sharper, "--reference", original)
    found = json.loads(evaluate(*options, "--json").stdout)[0]
    table = evaluate(*options).stdout
    assert f"{TOKENS} tokens of evaluation.txt" in table and "sharper" in table and "(reference)" in table
    figures = [f"{found['perplexity']:.3f}", f"{found['reference_perplexity']:.3f}", f"{found['top1']:.2%}"]
    figures += [f"{found[key]:.3g}" for key in ("kl_median", "kl_99", "kl_999")] + [f"{found['weights_bytes'] / 1e6:.2f}"]
    assert all(figure in table for figure in figures), table
    alone = evaluate(sharper).stdout
    assert figures[0] in alone and "KL" not in alone and "loss" not in alone


def test_devices_and_numbers_that_do_not_exist(evaluate: Callable[..., Result], original: Path, no_weights: None) -> None:
    assert is_one_error(evaluate(original, "--dtype", "float17"), "float17")
    assert is_one_error(evaluate(original, "--batch-size", 0), "--batch-size 0")


@pytest.mark.parametrize(
    "content, message", [(None, "does not exist"), (b"", "holds no text"), (b" \n", "holds no text"), (b"\x80\x03}q\x00", "not UTF-8")]
)
def test_texts_that_cannot_be_used(
    content: bytes | None, message: str, evaluate: Callable[..., Result], original: Path, tmp_path: Path, no_weights: None
) -> None:
    text = tmp_path / "book.txt"
    if content is not None:
        text.write_bytes(content)
    assert is_one_error(evaluate(original, "--text", text, "--reference", original), "book.txt", message)


def test_exports_are_measured_as_the_checkpoint(evaluate: Callable[..., Result], original: Path, demo_dir: Path, tmp_path: Path) -> None:
    config = awq_hf.AwqConfig.plain_rounding(group_size=64, calibration=demo_dir / "calibration.txt", samples=2, seq_len=64)
    awq_hf.quantize(original, config, output_dir=tmp_path / "awq")
    targets = ("compressed-tensors", "gptq")
    for target in targets:
        awq_hf.export(tmp_path / "awq", target, tmp_path / target)
    result = evaluate(tmp_path / "awq", *(tmp_path / target for target in targets), "--json")
    assert result.exit_code == 0, result.stderr
    assert len({row["perplexity"] for row in json.loads(result.stdout)}) == 1 and len(json.loads(result.stdout)) == 3


def test_what_is_not_read_of_a_gptq_checkpoint_needs_gptqmodel(
    evaluate: Callable[..., Result], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    monkeypatch.setattr(evaluate_command, "find_spec", lambda _name: None)
    gptq = shutil.copytree(original, tmp_path / "gptq")
    content = json.loads((original / "config.json").read_text(encoding="utf-8"))
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (gptq / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert is_one_error(evaluate(gptq), "is gptq of a kind that is not read here (no tensor is named *.qweight)", "pip install gptqmodel")


def test_a_name_that_nothing_can_have(evaluate: Callable[..., Result], original: Path, no_weights: None) -> None:
    for arguments in (("no where",), (original, "--reference", "no where")):
        assert is_one_error(evaluate(*arguments), "there is no directory no where, and it cannot be a Hub id (owner/name) either")


def test_windows_are_as_long_as_the_models_take(original: Path, variant: Callable[..., Path], demo_dir: Path) -> None:
    short = variant("short", lambda model: setattr(model.config, "max_position_embeddings", 96))
    text = ["--text", demo_dir / "evaluation.txt", "--max-tokens", "300", "--device", "cpu", "--json"]
    result = CliRunner().invoke(cli.app, ["eval", *map(str, [original, "--reference", short, *text])])
    assert result.exit_code == 0, result.stderr
    assert (json.loads(result.stdout)[0]["seq_len"], json.loads(result.stdout)[0]["tokens"]) == (96, 288)


def test_a_model_without_a_tokenizer(evaluate: Callable[..., Result], original: Path, tmp_path: Path, no_weights: None) -> None:
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    assert is_one_error(evaluate(original, tmp_path), str(tmp_path), "no tokenizer")


def test_tokenizers_that_differ(evaluate: Callable[..., Result], original: Path, tmp_path: Path, no_weights: None) -> None:
    other = tmp_path / "other"
    shutil.copytree(original, other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for arguments in ((original, "--reference", other), (other, original)):
        assert is_one_error(evaluate(*arguments), "tokenizers of", str(other), str(original))


def test_vocabularies_of_different_size(evaluate: Callable[..., Result], original: Path, variant: Callable[..., Path]) -> None:
    padded = variant("padded", lambda model: model.resize_token_embeddings(1032))
    result = evaluate(padded, "--reference", original)
    assert result.exit_code == 1 and result.stdout == "" and "Traceback" not in result.stderr
    assert f"error: {padded} computes logits for 1032 tokens and the reference for 1024" in result.stderr


def test_a_broken_model_prints_no_table(evaluate: Callable[..., Result], original: Path, variant: Callable[..., Path]) -> None:
    broken = variant("broken", scaled(float("nan")))
    result = evaluate(original, broken, "--reference", original)
    assert result.exit_code == 1 and result.stdout == ""
    assert f"error: {broken} computes logits that are not finite (window 0, token 0" in result.stderr


# The table


def row(name: str, **changes: Any) -> dict[str, Any]:
    figures = dict(perplexity=12.34567, reference_perplexity=11.5, loss_difference=0.0123456, loss_difference_se=0.00098, top1=0.91234)
    divergences = dict(kl=0.0234567, kl_se=0.00067, kl_median=0.0111111, kl_99=0.222222, kl_999=3.33333)
    sizes = dict(weights_bytes=1_234_567_890, reference_weights_bytes=None)
    return {
        "model": name,
        "reference": "org/original",
        "tokens": 20_000,
        "text": "book [v2].txt",
        **figures,
        **divergences,
        **sizes,
        **changes,
    }


def printed(rows: list[dict[str, Any]], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in evaluation_table.tables(rows, width):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FIGURES = ["12.346", "+0.01235 ± 0.00098", "0.02346 ± 0.00067", "0.0111", "0.222", "3.33", "91.23%", "1,234.57"]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_nothing_is_cropped(count: int, width: int) -> None:
    names = [f"models/a-rather-long-name-of-a-model-{n}" for n in range(count)]
    text = printed([row(name) for name in names], width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for figure in FIGURES:
        assert text.count(figure) == count, figure
    assert "20,000 tokens of book [v2].txt" in text
    headers = "".join(line for line in text.splitlines() if line.startswith("┃"))
    assert headers.count("a-rather") == count and sum(letter.isdigit() for letter in headers) == count  # folded, not cut


def test_a_table_at_80_columns() -> None:
    """As it looks."""
    text = printed([row("models/4bit"), row("models/3bit", kl=3.1e-7, kl_se=1.26e-8, loss_difference_se=None)], 80)
    assert [line.rstrip() for line in text.splitlines()[:14]] == [
        "                       20,000 tokens of book [v2].txt",
        "┏━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━┓",
        "┃            ┃            original ┃                    ┃                  ┃",
        "┃            ┃         (reference) ┃               4bit ┃             3bit ┃",
        "┡━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━┩",
        "│ perplexity │              11.500 │             12.346 │           12.346 │",
        "│ loss diff. │                     │ +0.01235 ± 0.00098 │          +0.0123 │",
        "│ KL mean    │                     │  0.02346 ± 0.00067 │ 3.10e-07 ± 1e-08 │",
        "│ KL median  │                     │             0.0111 │           0.0111 │",
        "│ KL 99 %    │                     │              0.222 │            0.222 │",
        "│ KL 99.9 %  │                     │               3.33 │             3.33 │",
        "│ same top-1 │                     │             91.23% │           91.23% │",
        "│ MB on disk │                     │           1,234.57 │         1,234.57 │",
        "└────────────┴─────────────────────┴────────────────────┴──────────────────┘",
    ]


def test_the_last_table_may_be_narrow_but_not_the_text_below() -> None:
    lines = printed([row("models/4bit"), row("models/3bit"), row("models/2bit")], 80).splitlines()
    below = lines[max(i for i, line in enumerate(lines) if line.startswith("└")) + 1 :]
    assert len(below) == 3 and below[0].startswith("loss diff.: log of the perplexity") and len(lines[-4]) < 40


def test_a_strange_text_is_said_and_a_bad_model_is_not_blamed_on_it() -> None:
    strange = "Every perplexity is above 100"
    assert strange in printed([row("a", perplexity=4000.0, reference_perplexity=3000.0)], 80)
    assert strange in printed([row("a", perplexity=4000.0, reference=None, reference_perplexity=None)], 80)
    assert strange not in printed([row("a", perplexity=4000.0)], 80)  # the original's is 11.5
    assert strange not in printed([row("a", perplexity=4000.0, reference=None, reference_perplexity=None), row("b", reference=None)], 80)


def test_names_are_cut_to_what_tells_them_apart() -> None:
    assert "runs" not in printed([row("runs/a"), row("runs/b")], 120)
    text = printed([row("runs/1/awq"), row("runs/2/awq")], 120)
    assert "runs/1/awq" in text and "runs/2/awq" in text
