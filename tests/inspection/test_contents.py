"""What inspect() says of an AWQ checkpoint is what is in its files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import awq_hf
from awq_hf.inspection import Contents, inspect

pytestmark = pytest.mark.usefixtures("usual_kernels")


def contents_of(path: Path) -> Contents:
    found = inspect(str(path))
    assert isinstance(found, Contents)
    return found


def test_an_awq_checkpoint(quantized_dir: Path) -> None:
    found = contents_of(quantized_dir)
    tensors = load_file(quantized_dir / "model.safetensors")
    size = lambda *ends: sum(t.nbytes for name, t in tensors.items() if name.endswith(ends))  # noqa: E731
    assert (found.class_name, found.dtype, found.version) == ("LlamaForCausalLM", "float32", "gemm")
    assert (found.quantized_modules, found.spec) == (14, {"bits": 4, "group_size": 32, "symmetric": False})
    assert found.bytes["quantized"] == size(".qweight", ".qzeros", ".scales")
    assert found.bytes["embeddings"] == size("embed_tokens.weight", "lm_head.weight") == 2 * 96 * 64 * 4
    assert sum(found.bytes.values()) == size("")
    assert found.bits_per_weight == 4 + 20 / 32
    assert (found.scales, found.left_in_float, found.problem) == (["F16"], {"lm_head": 1}, None)
    assert found.written_by == f"awq-hf {awq_hf.__version__}"
    report = json.loads((quantized_dir / "report.json").read_text())
    assert found.calibration == report["calibration"] and found.loss_ratio is not None and 0 < found.loss_ratio < 1


@pytest.fixture
def copy(quantized_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_dir, tmp_path / "copy"))


def edit(directory: Path, **changes: Any) -> None:
    """Change quantization_config in config.json."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("changes", "problem"), [({"group_size": 16}, "qzeros is I32 [3, 8], expected"), ({"bits": 8}, "cannot be read")])
def test_tensors_that_do_not_fit_the_config(changes: dict[str, Any], problem: str, copy: Path) -> None:
    edit(copy, **changes)
    found = contents_of(copy)
    assert found.problem is not None and problem in found.problem
    assert (found.quantized_modules, found.bits_per_weight, found.left_in_float) == (14, None, {})


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a checkpoint."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_tensor_that_is_missing(copy: Path) -> None:
    rewrite(copy, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.0.mlp.up_proj.scales"})
    problem = contents_of(copy).problem
    assert problem is not None and problem.startswith("model.layers.0.mlp.up_proj.scales is missing from the checkpoint")


def test_a_float_tensor_of_another_shape(copy: Path) -> None:
    rewrite(copy, lambda tensors: {n: t[:60] if n == "model.norm.weight" else t for n, t in tensors.items()})
    problem = contents_of(copy).problem
    assert problem is not None and "model.norm.weight" in problem and "[60]" in problem


def test_names_without_the_prefix_of_the_base_model(copy: Path, quantized_dir: Path) -> None:
    rewrite(copy, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    assert contents_of(copy) == replace(contents_of(quantized_dir), model=str(copy))


def test_who_wrote_it(copy: Path) -> None:
    (copy / "report.json").write_text('["somebody else\'s"]')
    found = contents_of(copy)
    assert (found.written_by, found.loss_ratio, found.calibration) == (None, None, None)
    for changes, writer in (
        ({"autoround_version": "0.9"}, "auto-round 0.9"),
        ({"provider": "auto-round"}, "auto-round"),
        ({"meta": {"quantizer": ["gptqmodel:7.0"]}}, "gptqmodel:7.0"),
    ):
        edit(copy, **changes)
        assert contents_of(copy).written_by == writer


def test_other_methods_are_refused_by_name(copy: Path) -> None:
    edit(copy, quant_method="bitsandbytes")
    with pytest.raises(ValueError, match="is quantized already, with bitsandbytes;"):
        inspect(str(copy))


@pytest.mark.parametrize(("method", "problem"), [("gptq", "has no g_idx"), ("compressed-tensors", r"no tensor is named \*.weight_packed")])
def test_tensors_that_are_not_of_the_format_that_the_config_names(method: str, problem: str, copy: Path) -> None:
    edit(copy, quant_method=method)
    assert re.search(problem, contents_of(copy).problem or "")


def test_quantized_tensors_that_the_config_does_not_name(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds \*.qweight, so it is quantized already"):
        inspect(str(copy))


def test_kernels_that_would_run_it(quantized_dir: Path) -> None:
    found = inspect(str(quantized_dir), dtype="bfloat16", device="meta")
    assert isinstance(found, Contents)
    (use,) = found.kernels
    assert (use.modules, use.dtype, use.by_tokens) == (14, "bfloat16", {1: "reference"})
    assert use.names[0] == "model.layers.*.mlp.down_proj" and use.reason == "there are no kernels for meta"


@pytest.mark.parametrize(
    ("target", "version", "ends"),
    [
        ("gptq", "gptq_v2", (".qweight", ".qzeros", ".scales", ".g_idx")),
        ("compressed-tensors", "pack-quantized", (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")),
    ],
)
def test_an_export(target: str, version: str, ends: tuple[str, ...], quantized_dir: Path, tmp_path: Path) -> None:
    """What is said of the AWQ checkpoint that it was made of, but for the format and the bytes of that."""
    awq_hf.export(quantized_dir, target, tmp_path / "out")
    found, original = contents_of(tmp_path / "out"), contents_of(quantized_dir)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    quantized = sum(t.nbytes for name, t in tensors.items() if name.endswith(ends))
    assert (found.format, found.version, found.layouts, found.to_dict()["kind"]) == (target, version, [], target)
    assert found.bytes == {**original.bytes, "quantized": quantized} and sum(found.bytes.values()) == sum(
        t.nbytes for t in tensors.values()
    )
    assert found.bits_per_weight == 8 * quantized * original.bits_per_weight / (8 * original.bytes["quantized"])
    same = ("parameters", "spec", "quantized_modules", "left_in_float", "scales", "problem", "loss_ratio", "written_by")
    assert {name: getattr(found, name) for name in same} == {name: getattr(original, name) for name in same}


def test_an_export_of_several_widths(llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path) -> None:
    config = small_config(samples=2, rounding="nearest", overrides={"down_proj": {"bits": 8}})
    awq_hf.quantize(llama_dir, config, output_dir=tmp_path / "awq")
    awq_hf.export(tmp_path / "awq", "gptq", tmp_path / "gptq")
    found = contents_of(tmp_path / "gptq")
    assert found.spec == {"bits": 4, "group_size": 32, "symmetric": False}
    assert found.overrides == {"model.layers.*.mlp.down_proj": {"bits": 8, "group_size": 32, "zero_point": True}}


def test_an_export_of_a_kind_that_is_not_read(quantized_dir: Path, tmp_path: Path) -> None:
    awq_hf.export(quantized_dir, "compressed-tensors", tmp_path / "out")
    edit(tmp_path / "out", kv_cache_scheme={"num_bits": 8})
    found = contents_of(tmp_path / "out")
    assert (found.problem, found.spec, found.bits_per_weight) == ("it quantizes the cache of keys and values", None, None)
    assert found.bytes["quantized"] > 0 and found.quantized_modules == 14
