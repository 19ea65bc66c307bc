"""A model in a subfolder of a repository, whose tokenizer is beside it or at the root; the real client throughout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import awq_hf
from awq_hf import AwqConfig, demo
from tests.hub.server import Hub

CONFIG = AwqConfig.plain_rounding(samples=2, seq_len=16)
OTHER = json.dumps({"tokenizer_class": "BertTokenizer", "model_type": "bert"}).encode()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("from_hub", [True, False])
def test_the_tokenizer_is_found(inside: bool, from_hub: bool, hub: Hub, tmp_path: Path) -> None:
    """At the root is another, or none, if it is inside."""
    files = {}
    for path in demo.MODEL.iterdir():
        folder = "small/" if inside or not path.name.startswith("token") else ""
        files[folder + path.name] = path.read_bytes()
    files |= {"tokenizer_config.json": OTHER} if inside else {}
    files["small/preprocessor_config.json"] = b'{"size": 28}'
    hub.create("maker/several", files=files)
    source = "maker/several" if from_hub else str(tmp_path / "several")
    for name, content in files.items() if not from_hub else ():
        (tmp_path / "several" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "several" / name).write_bytes(content)

    model = awq_hf.quantize(source, CONFIG, output_dir=tmp_path / "out", subfolder="small")
    written, expected = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "out", demo.MODEL))
    assert written.get_vocab() == expected.get_vocab()
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'
    awq_hf.export(model, "dense", tmp_path / "dense")
    assert (tmp_path / "dense" / "tokenizer.json").is_file() is inside  # an export copies what lies beside the weights
