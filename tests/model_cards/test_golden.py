"""A card for every case, compared with the one that a person has read.

After a change that is meant, write them anew and read what changed:  UPDATE_GOLDEN=1 pytest tests/model_cards/test_golden.py; git diff
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from awq_hf.model_cards import is_generated, make_card

GOLDEN = Path(__file__).parent / "golden"
CASES = {  # fixture -> arguments of make_card
    "full": {"repo_id": "acme/Tiny-AWQ"},
    "awq_only": {},
    "three_bits": {"repo_id": "acme/tiny-3bit"},
    "symmetric": {"repo_id": "acme/tiny-sym"},
    "gguf_only": {"repo_id": "acme/Tiny-GGUF"},
    "foreign": {"repo_id": "acme/Mystery-AWQ", "base_model": "acme/Mystery"},
}


@pytest.mark.parametrize("case", CASES)
def test_card(case: str, request: pytest.FixtureRequest) -> None:
    card = make_card(request.getfixturevalue(case), **CASES[case])["README.md"].decode()
    file = GOLDEN / f"{case}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(card, encoding="utf-8")
    assert card == file.read_text(encoding="utf-8")
    assert is_generated(card)


def test_every_golden_card_is_tested() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_the_client_library_reads_the_metadata(case: str) -> None:
    card = ModelCard.load(GOLDEN / f"{case}.md")
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert (data.get("base_model_relation") == "quantized") == ("base_model" in data)
    if "model-index" in data:
        name, results = model_index_to_eval_results(data["model-index"])
        assert name and len({result.metric_name for result in results}) == len(results)
        assert [result.metric_value for result in results] == [result.metric_value for result in card.data.eval_results]
