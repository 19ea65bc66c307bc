"""`awq-hf quantize` from a model on the Hub to a repository with card, AWQ, compressed-tensors and GGUF; the real client throughout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq_hf import demo, model_cards
from tests.hub.fixtures import fresh_cache
from tests.hub.server import Hub
from tests.hub.store import Blob

CARD = b"---\nlicense: apache-2.0\nlanguage:\n- en\npipeline_tag: text-generation\n---\n# Tiny\n"
OPTIONS = ("--samples", 2, "--seq-len", 32, "--rounding", "nearest", "--device", "cpu")


@pytest.fixture
def base(hub: Hub, two_blocks: Path) -> str:
    """Two blocks of the demonstration model in a repository; the commit that is asked for is not the newest."""
    files = {path.name: path.read_bytes() for path in two_blocks.iterdir()} | {"README.md": CARD}
    repo = hub.create("maker/tiny", files=files)
    commit = repo.sha("main")
    assert commit is not None
    repo.commit("main", {"config.json": Blob(b"{}", False)}, "broken since")
    return commit


def test_from_the_hub_to_the_hub(hub: Hub, base: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.model_cards.make_card", model_cards.card.make_card)
    text, out = tmp_path / "held_out.txt", tmp_path / "out"
    text.write_text(demo.EVALUATION.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    exports = ("--export", "gguf", "--export", "gguf:Q4_K_M", "--export", "compressed-tensors")
    result = run("quantize", "maker/tiny", out, "--revision", base, *OPTIONS, *exports, "--text", text, "--push", "tiny-AWQ")
    assert result.status == 0, result.err
    there = hub.repos["me/tiny-AWQ"].files()
    local = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert there == {".gitattributes": b"", **local}
    assert {
        "tiny-AWQ-Q4_K_S.gguf",
        "tiny-Q4_K_M.gguf",
        "compressed-tensors/model.safetensors",
        "README.md",
        "images/loss-per-layer.png",
        "recipe.yaml",
    } <= there.keys()

    fresh_cache(monkeypatch, tmp_path / "elsewhere")
    prompt = AutoTokenizer.from_pretrained("me/tiny-AWQ")("The state of our Union", return_tensors="pt")
    with torch.no_grad():
        pulled, kept = (AutoModelForCausalLM.from_pretrained(place)(**prompt).logits for place in ("me/tiny-AWQ", out))
    assert torch.equal(pulled, kept)
    assert Path(hf_hub_download("me/tiny-AWQ", "tiny-AWQ-Q4_K_S.gguf")).read_bytes()[:4] == b"GGUF"

    card = ModelCard.load("me/tiny-AWQ")  # the Hub validated it when it was committed
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("maker/tiny", "quantized", "apache-2.0")
    assert data["pipeline_tag"] == "text-generation" and {"awq", "gguf"} <= {*data["tags"]}
    assert f"https://huggingface.co/maker/tiny/tree/{base}" in card.content
    assert "llama-completion -hf me/tiny-AWQ:Q4_K_M" in card.content and "held_out.txt" in card.content

    hub.forget()
    again = run("push", out, "tiny-AWQ")
    assert again.status == 0 and "Nothing to upload" in again.out and hub.count("PUT", "") == 0
