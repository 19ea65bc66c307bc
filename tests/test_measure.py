"""evaluation.json: its rows are what evaluate() says of models made in another way."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaForCausalLM

import awq_hf
from awq_hf import AwqConfig, QuantSpec
from awq_hf.measure import bits_per_weight, measure, round_plainly
from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.render import render

QUICK: dict[str, Any] = dict(samples=4, seq_len=64, rounding="nearest")
SHORT: dict[str, Any] = dict(seq_len=64, max_tokens=512)
OVERRIDES = {"down_proj": {"bits": 3, "group_size": 64}, "layers.1.self_attn": None}


@pytest.fixture(scope="module")
def original(two_blocks: Path) -> Path:
    return two_blocks


@pytest.fixture(scope="module")
def out(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "out"
    awq_hf.quantize(original, AwqConfig(**QUICK, overrides=OVERRIDES), output_dir=path)
    awq_hf.export(path, "gptq", path / "gptq")
    awq_hf.export(path, "gguf", path / "model-AWQ.gguf", progress=False)
    awq_hf.export(original, "gguf", path / "model-F32.gguf", progress=False, type="F32")
    return path


@pytest.fixture(scope="module")
def content(out: Path, original: Path) -> dict[str, Any]:
    return measure(out, original, **SHORT)


def test_the_file_holds_what_is_returned(content: dict[str, Any], out: Path, original: Path) -> None:
    assert json.loads((out / "evaluation.json").read_text()) == content
    assert content["reference"] == {"name": "model", "revision": None, "weights_bytes": (original / "model.safetensors").stat().st_size}
    assert content["versions"].keys() == {"awq-hf", "transformers", "torch"} and len(content["date"]) == 10
    assert [row["name"] for row in content["rows"]] == ["original", "plain rounding", "awq-hf", "model-AWQ.gguf", "model-F32.gguf"]
    assert [row["files"] for row in content["rows"]] == [[], [], [".", "gptq"], ["model-AWQ.gguf"], ["model-F32.gguf"]]
    assert {row["runtime"] for row in content["rows"]} == {"transformers"}
    assert {row["text"] for row in content["rows"]} == {"awq-hf's embedded evaluation text"}
    assert not list(out.glob(".*"))


def test_rows_agree_with_evaluate(content: dict[str, Any], out: Path, original: Path) -> None:
    reference, ours = (AutoModelForCausalLM.from_pretrained(path) for path in (original, out))
    tokenizer = AutoTokenizer.from_pretrained(original)
    baseline = awq_hf.quantize(original, AwqConfig.plain_rounding(**{**QUICK, "overrides": OVERRIDES}))
    expected = awq_hf.evaluate_many(
        {"original": reference, "plain rounding": baseline, "awq-hf": ours}, reference, None, tokenizer, **SHORT
    )
    rows = {row["name"]: row for row in content["rows"]}
    for name, result in expected.items():
        for key, value in result.to_dict().items():  # plain rounding's Linears are float: some CPUs compute others in bfloat16 with them
            close = name == "plain rounding" and isinstance(value, float)
            assert rows[name][key] == (pytest.approx(value, rel=0.03, abs=0.003) if close else value), (name, key)
    assert rows["original"]["kl"] == 0 < rows["awq-hf"]["kl"] < rows["plain rounding"]["kl"]
    assert rows["model-F32.gguf"]["kl"] < 0.2 * rows["awq-hf"]["kl"]  # the original in float32
    assert rows["model-AWQ.gguf"]["kl"] == pytest.approx(rows["awq-hf"]["kl"], rel=0.2)


def test_the_card_knows_the_rows(content: dict[str, Any], out: Path) -> None:
    quality = render(gather(out), ()).split("## Quality")[1]
    assert "| Original | " in quality and "| Plain rounding | " in quality
    ours, plain = (next(row["kl"] for row in content["rows"] if row["name"] == name) for name in ("awq-hf", "plain rounding"))
    assert f"**{ours / plain:.0%}** of the KL divergence is left" in quality


def test_sizes(content: dict[str, Any], out: Path) -> None:
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["original"]["bits_per_weight"] == 16 and rows["plain rounding"]["weights_bytes"] is None
    assert 3.3 < rows["awq-hf"]["bits_per_weight"] == rows["plain rounding"]["bits_per_weight"] < 10
    assert rows["awq-hf"]["weights_bytes"] == (out / "model.safetensors").stat().st_size
    assert rows["model-F32.gguf"]["weights_bytes"] == (out / "model-F32.gguf").stat().st_size
    assert rows["model-F32.gguf"]["bits_per_weight"] == pytest.approx(32, rel=0.05)


def test_files_that_are_not_this_model_have_no_row(out: Path, original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("*.gguf", "gptq"))
    (copy / "broken.gguf").write_bytes(b"GGUF and then nothing")
    cut = (out / "model-AWQ.gguf").read_bytes()
    (copy / "cut.gguf").write_bytes(cut[: len(cut) // 2])
    with caplog.at_level(logging.WARNING, "awq_hf"):
        found = measure(copy, original, ["The state of our Union is strong. " * 40], **SHORT)
    assert [row["name"] for row in found["rows"]] == ["original", "plain rounding", "awq-hf"]
    assert found["rows"][2]["files"] == ["."] and found["rows"][0]["text"] == "1 texts"
    assert all(f"{name}.gguf was not measured" in caplog.text for name in ("broken", "cut"))


def test_text_is_refused_before_anything_is_loaded(out: Path, original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match="does not exist"):
        measure(out, original, tmp_path / "none.txt")
    with pytest.raises(TypeError):
        measure(out, original)


def test_matrices_that_are_stored_the_other_way_round(random_model: Callable[..., Any]) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    model, exact = random_model(config), random_model(config)
    awq_hf.quantize(exact, AwqConfig.plain_rounding(group_size=32, calibration=[torch.arange(3, 35)], samples=1, seq_len=32))
    names = {name: module.spec for name, module in exact.named_modules() if isinstance(module, awq_hf.AwqLinear)}
    assert len(names) == 4 and set(names.values()) == {QuantSpec(4, 32)}
    for index, block in enumerate(model.transformer.h):
        round_plainly(names, f"transformer.h.{index}", block)
    for name, tensor in exact.dequantize().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    assert bits_per_weight(model) == 32


def test_a_directory_of_gguf_files_alone(content: dict[str, Any], out: Path, original: Path, tmp_path: Path) -> None:
    """What `awq-hf export gguf` leaves: the same figures as beside a checkpoint."""
    with pytest.raises(ValueError, match="holds no model"):
        measure(tmp_path, original, **SHORT)
    shutil.copy(out / "model-AWQ.gguf", tmp_path)
    assert measure(tmp_path, original, **SHORT)["rows"] == [content["rows"][0], content["rows"][3]]
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "model-AWQ.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(ValueError, match="nothing in .* could be measured"):
        measure(tmp_path, original, **SHORT)
    assert not (tmp_path / "evaluation.json").exists()
