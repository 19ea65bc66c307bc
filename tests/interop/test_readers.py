"""Checkpoints of ours, read by programs that are not ours: each must compute our dequantized model's logits.

A program is tested where it is installed beside awq_hf, or in the Python that an environment variable names (see README.md here).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen2Config

import awq_hf
from awq_hf import AwqLinear

Logits = np.ndarray[Any, np.dtype[np.float32]]


# What is written

# What is read does not depend on how its numbers were chosen: but for one case, in the quickest way
QUICK = dict(scale=False, clip=False, correction=False, rounding="nearest", stream="float", samples=2)


@dataclass(frozen=True)
class Case:
    config: type[PreTrainedConfig] = LlamaConfig
    changes: dict[str, Any] = field(default_factory=dict)  # to the config
    options: dict[str, Any] = field(default_factory=dict)  # of AwqConfig
    dtype: torch.dtype = torch.float16


SIZES = dict(vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
BIASES = dict(attention_bias=True, mlp_bias=True)
CASES = {
    "llama-32": Case(),
    "llama-64": Case(options={"group_size": 64}),
    "llama-128": Case(options={"group_size": 128}),
    "biases": Case(changes=BIASES),
    "bfloat16": Case(changes=BIASES, dtype=torch.bfloat16),
    "tied": Case(changes={"tie_word_embeddings": True}),
    # mlx-lm takes rope_theta and rope_scaling from the top of config.json, where transformers 5 does not write them
    "qwen2": Case(Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "another-rope-base": Case(changes={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "scaled-rope": Case(changes={"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}),
    "symmetric": Case(options={"zero_point": False}),
    "o_proj-in-float": Case(options={"modules_to_not_convert": ["o_proj"]}),
    "one-layer-in-float": Case(options={"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}),
    "a-block-in-float": Case(options={"modules_to_not_convert": ["layers.0."]}),
    "mlps-in-float": Case(options={"modules_to_not_convert": ["mlp"]}),
    "groups-of-16": Case(options={"group_size": 16}),
    "whole-rows": Case(options={"group_size": -1}),
    "3-bits": Case(options={"bits": 3}),
}

# Damage to one Linear of a sound checkpoint, to see that it is noticed
BROKEN_LINEAR, SOUND = "model.layers.1.mlp.up_proj", "llama-32"
BROKEN: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "nibble-order": lambda linear: linear["qweight"].copy_((linear["qweight"] << 4) | ((linear["qweight"] >> 28) & 15)),
    "zero-points": lambda linear: linear["qzeros"].copy_(linear["qzeros"] ^ 0x11111111),  # each of them one off
    "one-zero-point": lambda linear: linear["qzeros"][0, 0].bitwise_xor_(1),
}


def damage(checkpoint: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    how({suffix: tensors[f"{BROKEN_LINEAR}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")})
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def folder(
    random_model: Callable[..., Any], small_config: Callable[..., Any], demo_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What reader.py takes: folders of a checkpoint and a prompt each."""
    folder = tmp_path_factory.mktemp("interop")
    ids = torch.randint(3, 96, (48,), generator=torch.Generator().manual_seed(3)).tolist()
    for name, case in CASES.items():
        model = random_model(case.config(**{**SIZES, **case.changes}), case.dtype)
        config = small_config(**({} if name == SOUND else QUICK), **case.options)
        awq_hf.quantize(model, config).save_pretrained(folder / name / "checkpoint")
        (folder / name / "prompt.json").write_text(json.dumps(ids))
    for name, how in BROKEN.items():
        shutil.copytree(folder / SOUND, folder / name)
        damage(folder / name / "checkpoint", how)
    demo = small_config(group_size=128, calibration=demo_dir / "calibration.txt", **QUICK)
    awq_hf.quantize(demo_dir / "model", demo, output_dir=folder / "demo" / "checkpoint")
    (folder / "demo" / "prompt.json").write_text(json.dumps((demo_dir / "evaluation.txt").read_text(encoding="utf-8")[:400]))
    return folder


# Who reads it


@dataclass(frozen=True, eq=False)
class Program:
    name: str  # in reader.py
    module: str  # that has to be installed
    variable: str  # of the environment: a Python that has it
    refuses: dict[str, str]  # case -> a part of what it says

    def python(self) -> str | None:
        return os.environ.get(self.variable) or (sys.executable if importlib.util.find_spec(self.module) else None)


MLX_GROUPS = "supported group sizes are 32, 64, and 128"
MLX = Program("mlx", "mlx_lm", "AWQ_HF_MLX_PYTHON", {"3-bits": "bits=3", "groups-of-16": MLX_GROUPS, "whole-rows": MLX_GROUPS})
GPTQMODEL = Program("gptqmodel", "gptqmodel", "AWQ_HF_GPTQMODEL_PYTHON", {"3-bits": "Invalid format 'awq_hf'"})


def each(cases: Callable[[Program], Iterable[str]], programs: Iterable[Program] = (MLX, GPTQMODEL)) -> pytest.MarkDecorator:
    """The test gets every program with every one of its cases."""
    rows = []
    for program in programs:
        missing = pytest.mark.skipif(not program.python(), reason=f"{program.module} is not installed, nor a Python in {program.variable}")
        rows += [pytest.param(program, name, id=f"{program.name}-{name}", marks=missing) for name in cases(program)]
    return pytest.mark.parametrize(("program", "name"), rows)


@pytest.fixture(scope="module")
def read(folder: Path) -> Callable[[Program], None]:
    """read(program): have it read all the checkpoints, the first time it is asked."""

    @functools.cache
    def read(program: Program) -> None:
        command = [program.python() or "", "-I", str(Path(__file__).with_name("reader.py")), program.name, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr

    return read


@pytest.fixture
def theirs(program: Program, name: str, folder: Path, read: Callable[[Program], None]) -> Logits:
    """Logits of `program` for the case `name`."""
    read(program)
    refused = folder / name / f"{program.name}.refused"
    assert not refused.exists(), refused.read_text()
    logits: Logits = np.load(folder / name / f"{program.name}.npy")
    return logits


def as_in_mlx(linear: AwqLinear) -> Tensor:
    """The weight [out, in] that mlx-lm computes with: q s + b, where b = -z s was rounded to float16."""
    weight = linear.to_quantized()
    scales = weight.scales.float()
    b = (weight.zero_points * -scales).half().float()
    scales, b = (x.repeat_interleave(weight.spec.group_width(linear.in_features), dim=1) for x in (scales, b))
    return weight.q * scales + b


def ours(folder: Path, weight_of: Callable[[AwqLinear], Tensor] | None = None) -> Logits:
    """Logits of our dequantized model in float32; weight_of: with other weights than the exact ones."""
    checkpoint, prompt = folder / "checkpoint", json.loads((folder / "prompt.json").read_text())
    ids = AutoTokenizer.from_pretrained(checkpoint).encode(prompt) if isinstance(prompt, str) else prompt
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    model = model.dequantize(torch.float32)
    if weight_of:
        for name, linear in quantized.items():
            model.get_submodule(name).weight.data = weight_of(linear)
    with torch.inference_mode():
        logits: Logits = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def distance(logits: Logits, reference: Logits) -> float:
    """Root mean square of the difference, relative to the reference's spread."""
    assert logits.shape == reference.shape
    return float(np.sqrt(np.mean((logits - reference) ** 2)) / reference.std())


# Both programs round to float16 on their way: mlx-lm the products of scales and zero points, gptqmodel weights and activations.
# That weighs more in random models than in a trained one.
TRAINED, RANDOM, SAME_ROUNDING = 1e-3, 2e-3, 1e-5


@each(lambda program: [name for name in CASES if name not in program.refuses])
def test_computes_our_logits(program: Program, name: str, folder: Path, theirs: Logits) -> None:
    assert distance(theirs, ours(folder / name)) <= RANDOM


@each(lambda program: ["demo"])
def test_reads_a_trained_model_and_its_tokenizer(program: Program, name: str, folder: Path, theirs: Logits) -> None:
    assert distance(theirs, ours(folder / name)) <= TRAINED


@each(lambda program: [name for name in (*CASES, "demo") if name not in program.refuses], [MLX])
def test_nothing_but_that_rounding_is_different(program: Program, name: str, folder: Path, theirs: Logits) -> None:
    assert distance(theirs, ours(folder / name, as_in_mlx)) <= SAME_ROUNDING


@each(lambda program: ["nibble-order", "zero-points"])
def test_a_wrong_checkpoint_is_noticed(program: Program, name: str, folder: Path, theirs: Logits) -> None:
    assert distance(theirs, ours(folder / SOUND)) > 10 * RANDOM


@each(lambda program: ["one-zero-point"], [MLX])
def test_one_wrong_zero_point_is_noticed(program: Program, name: str, folder: Path, theirs: Logits) -> None:
    assert distance(theirs, ours(folder / SOUND, as_in_mlx)) > 10 * SAME_ROUNDING


@each(lambda program: program.refuses)
def test_refuses_what_it_cannot_read(program: Program, name: str, folder: Path, read: Callable[[Program], None]) -> None:
    read(program)
    assert program.refuses[name] in (folder / name / f"{program.name}.refused").read_text()
