"""A GGUF file, a block at a time. Every architecture: exporters/gguf/test_architectures.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import LlamaForCausalLM

import awq_hf
from awq_hf import measure as measuring
from awq_hf.gguf_blocks import InGguf, write_excerpt
from awq_hf.streaming import InMemory, load_float


@pytest.fixture(scope="module")
def file(two_blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model-Q4_0.gguf"
    awq_hf.export(two_blocks, "gguf", path, progress=False, type="Q4_0", search=False)
    return path


@pytest.fixture
def empty(two_blocks: Path) -> Any:
    model, _ = load_float(LlamaForCausalLM, two_blocks, dtype=torch.float32)
    return model


def in_memory(model: Any) -> list[bool]:
    return [any(not tensor.is_meta for tensor in block.parameters()) for block in model.model.layers]


def test_one_block_is_there_at_a_time(empty: Any, file: Path) -> None:
    source = InGguf(empty, file)
    assert in_memory(empty) == [False, False]
    source.load(1)
    assert in_memory(empty) == [False, True]
    source.unload(1)
    assert in_memory(empty) == [False, False]


def test_what_is_tied_stays_tied(empty: Any, file: Path) -> None:
    embedding, head = empty.get_input_embeddings().weight, empty.lm_head.weight
    assert embedding is head
    before = embedding.clone()
    InGguf(empty, file)
    assert empty.lm_head.weight is empty.get_input_embeddings().weight is embedding and not torch.equal(embedding, before)


def test_an_excerpt_has_its_tensors_and_no_vocabulary(file: Path, tmp_path: Path) -> None:
    whole = GGUFReader(file)
    names = [tensor.name for tensor in whole.tensors if tensor.name.startswith("blk.1.")]
    write_excerpt(whole, names, tmp_path / "part.gguf")
    part = GGUFReader(tmp_path / "part.gguf")
    assert [tensor.name for tensor in part.tensors] == names
    expected = {tensor.name: tensor for tensor in whole.tensors}
    for tensor in part.tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type and (tensor.data == expected[tensor.name].data).all()
    kept = {key: field.contents() for key, field in whole.fields.items() if not key.startswith(("GGUF.", "tokenizer."))}
    assert {key: field.contents() for key, field in part.fields.items() if not key.startswith("GGUF.")} == kept
    del whole.fields["llama.vocab_size"]  # then the vocabulary is counted
    write_excerpt(whole, names, tmp_path / "part.gguf")
    assert "tokenizer.ggml.tokens" in GGUFReader(tmp_path / "part.gguf").fields


@pytest.mark.parametrize("lacking", ["output_norm.weight", "blk.1.ffn_up.weight"])
def test_a_tensor_that_is_not_there(lacking: str, empty: Any, file: Path, tmp_path: Path) -> None:
    whole = GGUFReader(file)
    write_excerpt(whole, {tensor.name for tensor in whole.tensors} - {lacking}, tmp_path / "part.gguf")
    name = {"output_norm.weight": "model.norm.weight"}.get(lacking, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=f"{name} is not in the file, or of another shape"):
        source = InGguf(empty, tmp_path / "part.gguf")
        source.load(0)
        source.load(1)


def test_a_file_of_another_model(file: Path, llama_dir: Path) -> None:
    other, _ = load_float(LlamaForCausalLM, llama_dir, dtype=torch.float32)
    with pytest.raises(ValueError, match="of another shape"):
        InGguf(other, file)


def test_measuring_reads_it_whole_where_the_original_is_loaded_whole(
    file: Path, two_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(file, tmp_path)
    short: dict[str, Any] = dict(seq_len=64, max_tokens=256)
    whole = LlamaForCausalLM.from_pretrained(two_blocks, dtype=torch.float32)
    monkeypatch.setattr(measuring, "load_float", lambda *_args, **_options: (whole, InMemory()))
    expected = measuring.measure(tmp_path, two_blocks, **short)["rows"][1]
    monkeypatch.undo()
    monkeypatch.setattr(measuring, "loaded_whole", None)
    found = measuring.measure(tmp_path, two_blocks, dtype=torch.float32, **short)["rows"][1]
    assert found == expected and 0 < found["kl"] < 0.1
