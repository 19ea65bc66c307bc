"""The texts that come with the package: what is measured on was never calibrated on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from awq_hf.calibration.data import embedded_texts

LENGTH = 8  # words; what is longer than a set phrase is a quotation


def shingles(texts: list[str]) -> set[tuple[str, ...]]:
    """Every LENGTH words in a row, whatever their case and punctuation."""
    found = set()
    for text in texts:
        words = "".join(c.casefold() if c.isalnum() else " " for c in text).split()
        found |= {tuple(words[i : i + LENGTH]) for i in range(len(words) - LENGTH + 1)}
    return found


def test_evaluation_shares_nothing_with_calibration(demo_dir: Path) -> None:
    calibration = [*embedded_texts(), (demo_dir / "calibration.txt").read_text(encoding="utf-8")]
    evaluation = embedded_texts("evaluation")
    assert shingles(calibration) & shingles(evaluation) == set()
    assert shingles([*calibration, evaluation[0]]) & shingles(evaluation)  # it would be seen


def test_nor_where_words_are_not_divided() -> None:
    chinese_or_japanese = re.compile("[\u3040-\u30ff\u4e00-\u9fff]{6,}")
    texts = {role: chinese_or_japanese.findall("".join(embedded_texts(role))) for role in ("calibration", "evaluation")}
    assert min(map(len, texts.values())) > 5
    pieces = {run[i : i + 6] for run in texts["evaluation"] for i in range(len(run) - 5)}
    assert not any(piece in run for run in texts["calibration"] for piece in pieces)


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_every_domain_is_near_the_beginning(role: str) -> None:
    texts = embedded_texts(role)
    assert len(texts) > 30 and sum(map(len, texts)) > 25_000
    assert all(text.strip() == text.strip("\n").strip() and "<|document|>" not in text for text in texts)
    beginning = "".join(texts[: len(texts) // 4])
    assert all(mark in beginning for mark in ("return", "ä", "=", " the "))
