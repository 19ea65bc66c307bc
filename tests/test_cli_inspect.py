"""awq-hf inspect: what it prints, its exit status, and that it fits a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import awq_hf
from awq_hf import cli
from awq_hf.cli import common
from awq_hf.inspection import costs
from awq_hf.inspection.text import duration, size


@pytest.fixture
def inspect(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """inspect(MODEL, ...): on a terminal of 80 columns."""
    monkeypatch.setattr(common.console, "width", 80)
    return lambda *arguments: run("inspect", *arguments, "--device", "cpu")


def lines_of(result: Any) -> list[str]:
    """As words with single spaces between them; none is wider than the terminal."""
    assert result.status == 0, result.err
    assert all(len(line) <= 80 and not line.endswith("-") for line in result.out.splitlines())  # options are not broken at hyphens
    return [" ".join(line.split()) for line in result.out.splitlines()]


def test_the_demonstration_model(inspect: Callable[..., Any], demo_dir: Path) -> None:
    lines = lines_of(inspect(demo_dir / "model", "--samples", 8, "--seq-len", 64))
    assert "LlamaForCausalLM, bfloat16, 2,623,744 parameters, 5.25 MB on disk" in lines
    assert "4 blocks in model.layers" in lines and "Quantized to 4 bits, groups of 128, with zero points" in lines
    assert "self_attn.q_proj 256 x 256 4 input_layernorm 4.16" in lines
    assert "mlp.down_proj 256 x 512 4 mlp.up_proj 4.16" in lines
    assert "Folds were found and verified with the weights of block 0." in lines
    assert "Result 1.75 MB on disk, 33% of now" in lines and "1.23 MB quantized" in lines
    text = "\n".join(lines)
    assert "Memory about" in text and "Time about" in text and "for 8 windows of 64 tokens" in text and "WARNING" not in text


def test_json_is_all_there_is_on_stdout(inspect: Callable[..., Any], demo_dir: Path) -> None:
    result = inspect(
        demo_dir / "model",
        "--samples",
        8,
        "--seq-len",
        64,
        "--bits",
        3,
        "--override",
        "down_proj=8:64",
        "--skip",
        "o_proj",
        "--symmetric",
        "--json",
    )
    found = json.loads(result.out)
    assert result.status == 0 and found["kind"] == "float" and found["fits"] is True
    assert found["spec"] == {"bits": 3, "group_size": 128, "symmetric": True} and found["calibration"] == {"samples": 8, "seq_len": 64}
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    assert kinds["self_attn.o_proj"]["reason"] == "modules_to_not_convert"
    assert kinds["mlp.down_proj"]["bits_per_weight"] == 8 + 24 / 64


def test_what_does_not_fit_is_named(inspect: Callable[..., Any], llama_dir: Path) -> None:
    lines = lines_of(inspect(llama_dir, "--group-size", 64, "--skip", "o_proj", "--rounding", "nearest"))
    assert "mlp.down_proj 64 x 96 2 mlp.up_proj float" in lines
    assert "in_features 96 is not divisible by group_size 64; these divide it: -1, 16, 32" in " ".join(lines)
    assert lines[lines.index("self_attn.o_proj") + 1] == "--skip"
    assert "awq-hf quantize refuses layers that do not fit" in " ".join(lines)


def test_a_short_memory_is_warned_of(inspect: Callable[..., Any], llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "this_program", lambda _device: {})
    monkeypatch.setattr(costs, "free_memory", lambda _device: 10**6)
    lines = lines_of(inspect(llama_dir, "--group-size", 32))
    assert lines[-2].startswith("WARNING: this will not fit") and "Fewer --samples" in " ".join(lines[-2:])
    monkeypatch.setattr(costs, "free_memory", lambda _device: 10**4)
    assert "The quantized model alone is larger." in " ".join(lines_of(inspect(llama_dir, "--group-size", 32))[-2:])


def test_an_architecture_with_long_names(inspect: Callable[..., Any], random_model: Callable[..., Any], tmp_path: Path) -> None:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    random_model(transformers.GPTNeoXConfig(**sizes)).save_pretrained(tmp_path)
    lines = lines_of(inspect(tmp_path, "--group-size", 32))
    assert "attention.query_key_value 192 x 64 2 input_layernorm 4.62" in lines
    assert "mlp.dense_4h_to_h 64 x 96 2 none 4.62" in lines


def test_what_there_is_several_times(inspect: Callable[..., Any], random_model: Callable[..., Any], tmp_path: Path) -> None:
    sizes = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    random_model(transformers.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)).save_pretrained(
        tmp_path
    )
    lines = lines_of(inspect(tmp_path, "--group-size", 32))
    assert "model.layers.*.mlp.gate (x 2)" in lines
    assert "mlp.experts.gate_up_proj 4 x 64 x 64 2 post_attention_layernorm 4.62" in lines
    assert "model.layers.*.mlp.experts (x 2)" in lines_of(inspect(tmp_path, "--group-size", 32, "--skip", "mlp.experts"))


def test_an_awq_checkpoint(inspect: Callable[..., Any], quantized_dir: Path) -> None:
    lines = lines_of(inspect(quantized_dir))
    assert "LlamaForCausalLM, AWQ gemm: 4 bits, groups of 32, with zero points" in lines
    assert "14 modules quantized, 4.62 bits a weight; scales F16" in lines
    assert "Left in float: lm_head" in lines and lines[-1] == "Its tensors fit its config."
    assert "report.json: calibrated on 384 tokens (12 token tensors); output error of a layer" in " ".join(lines)
    assert json.loads(inspect(quantized_dir, "--json").out)["kind"] == "awq"


def test_an_export(inspect: Callable[..., Any], quantized_dir: Path, tmp_path: Path) -> None:
    awq_hf.export(quantized_dir, "gptq", tmp_path / "out")
    lines = lines_of(inspect(tmp_path / "out"))
    assert "LlamaForCausalLM, GPTQ gptq_v2: 4 bits, groups of 32, with zero points" in lines
    assert "awq-hf eval measures it" in " ".join(lines[-2:])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    lines = lines_of(inspect(tmp_path / "out"))
    assert "LlamaForCausalLM, GPTQ marlin" in lines and "its checkpoint_format is marlin" in " ".join(lines[-2:])


def test_errors_are_one_sentence(inspect: Callable[..., Any], llama_dir: Path, tmp_path: Path) -> None:
    for arguments, part in (
        ([tmp_path / "nowhere"], "there is no directory"),
        ([tmp_path], "holds no config.json"),
        ([llama_dir, "--bits", 5], "--bits 5 is"),
        ([llama_dir, "--seq-len", 4096], "128 positions"),
        ([llama_dir, "--dtype", "float17"], "float17"),
    ):
        result = inspect(*arguments)
        assert result.status == 1 and result.out == "" and part in result.err and len(result.err.splitlines()) == 1
        assert result.err.startswith("error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["awq-hf", "inspect", str(llama_dir), "--device", "cuda"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0.00 kB"), (4_608, "4.61 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (52_400_000, "52.4 MB"), (141 * 10**9, "141 GB")],
)
def test_sizes(amount: int, text: str) -> None:
    assert size(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [((0.35, 0.7), "0.3-0.7 s"), ((50, 100), "50-100 s"), ((240, 480), "4.0-8.0 min"), ((9000, 18000), "2.5-5.0 h")]
)
def test_durations(seconds: tuple[float, float], text: str) -> None:
    assert duration(seconds) == text
