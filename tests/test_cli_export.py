"""awq-hf export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

Run = Callable[..., Any]


@pytest.mark.parametrize("target", ["awq", "compressed-tensors", "gptq", "dense"])
def test_writes_and_says_what(target: str, run: Run, quantized_dir: Path, tmp_path: Path) -> None:
    done = run("export", target, quantized_dir, tmp_path / "out")
    assert (done.status, done.err.count("error")) == (0, 0)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    files = len(list((tmp_path / "out").iterdir()))
    assert done.out == f"{target} written to {tmp_path / 'out'}: {size / 1e6:,.1f} MB in {files} files\n"


def test_json_and_options(run: Run, quantized_dir: Path, tmp_path: Path) -> None:
    options = ("--dtype", "bfloat16", "--max-shard-size", "60KB", "--json")
    result = json.loads(run("export", "dense", quantized_dir, tmp_path / "out", *options).out)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert result == {"target": "dense", "path": str(tmp_path / "out"), "bytes": size, "files": names}
    assert "model.safetensors.index.json" in names
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_refusals_are_one_sentence(run: Run, quantized_dir: Path, llama_dir: Path, tmp_path: Path) -> None:
    cases = {
        ("onnx", quantized_dir): "there is no target 'onnx'; choose one of awq, compressed-tensors, gptq, dense, gguf",
        ("awq", quantized_dir, "--dtype", "float16"): "the target awq has no option 'dtype'; it has max_shard_size",
        ("gptq", llama_dir): f"{llama_dir} is not quantized, and the target gptq holds quantized weights; run awq-hf quantize first",
    }
    for (target, model, *options), message in cases.items():
        failed = run("export", target, model, tmp_path / "out", *options)
        assert (failed.status, failed.out, failed.err) == (1, "", f"error: {message}\n")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    assert "exists and is not an empty directory" in run("export", "awq", quantized_dir, tmp_path / "out").err
    assert run("export", "awq", quantized_dir, tmp_path / "out", "--overwrite").status == 0
    assert run("export", "awq").status == 2


def test_a_gguf_file_says_its_bits_a_weight(run: Run, demo_dir: Path, tmp_path: Path) -> None:
    done = run("export", "gguf", demo_dir / "model", tmp_path / "tiny.gguf", "--type", "Q4_0", "--no-search")
    tensors = GGUFReader(tmp_path / "tiny.gguf").tensors
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    assert done.status == 0 and f" MB in 1 file, {bits:.2f} bits a weight\n" in done.out, done
    assert done.out.endswith(f"Run it:  llama-completion -m {tmp_path / 'tiny.gguf'} -no-cnv -p 'Once upon a time'\n")
    shutil.copytree(demo_dir / "model", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    done = run("export", "gguf", tmp_path / "chat", tmp_path / "chat.gguf", "--type", "F16")
    assert done.out.endswith(f"Run it:  llama-cli -m {tmp_path / 'chat.gguf'}\n")
