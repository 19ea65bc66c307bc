"""The report: its numbers, its file and its summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awq_hf.recipe import Recipe
from awq_hf.report import LayerReport, Report


def layer(name: str, loss: float, plain: float, fold: str | None = "norm", alpha: float = 0.5, fallback: str | None = None) -> LayerReport:
    return LayerReport(name, (8, 16), 4, 16, fold, alpha, "activations", 0.9, 1.0, "descent", plain, loss, 0, fallback)


@pytest.fixture
def report() -> Report:
    return Report(
        recipe=Recipe().to_dict(),
        calibration={"source": "3 texts", "sha256": "0", "windows": 2, "tokens": 12345},
        layers=[layer("a", 0.25, 1.0), layer("b", 0.75, 1.0, fold=None, alpha=0.0), layer("c", 0.0, 0.0, fallback="it was worse")],
        left_in_float={"lm_head": "outside the decoder's blocks"},
        seconds={"total": 2.0},
    )


def test_loss_ratio_is_the_mean_over_layers_that_lose_anything(report: Report) -> None:
    assert report.loss_ratio() == 0.5
    assert Report({}, {}).loss_ratio() == 1.0


def test_file_holds_everything_and_nothing_is_left_beside_it(report: Report, tmp_path: Path) -> None:
    path = report.save(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["report.json"] and path == tmp_path / "report.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["layers"][2]["fallback"] == "it was worse" and saved["layers"][0]["shape"] == [8, 16]
    assert saved["left_in_float"] == report.left_in_float


@pytest.mark.parametrize("losses", [(float("nan"), 1.0), (0.5, float("inf"))])
def test_a_layer_without_a_loss_is_an_error(losses: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="model.q gets or puts out NaN or infinity .* load it with dtype='bfloat16' or dtype='float32'"):
        layer("model.q", *losses)


def test_saving_again_replaces_the_file(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    report.layers = report.layers[:1]
    report.save(str(tmp_path))
    assert len(json.loads((tmp_path / "report.json").read_text())["layers"]) == 1


def test_a_report_that_cannot_be_written_leaves_the_old_one(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    report.machine["object"] = object()
    with pytest.raises(TypeError):
        report.save(tmp_path)
    assert "object" not in json.loads((tmp_path / "report.json").read_text())["machine"]


def test_summary_says_what_happened(report: Report) -> None:
    summary = report.summary()
    for part in ("3 layers quantized to 4 bits in 2.0 s", "12,345 tokens (3 texts)", "50% of plain rounding's", "c: it was worse"):
        assert part in summary
    assert "Smoothing scales help 2 of 3 layers; 1 have no place" in summary and "Left in float: lm_head." in summary
    report.recipe["scale"] = None
    assert "Smoothing" not in report.summary()


def test_summary_says_what_a_person_should_know(report: Report) -> None:
    report.layers[1].dead_channels, report.layers[2].dead_channels = 3, 5
    report.layers[0].bits = 8
    report.left_in_float = {f"tower.{i}": "outside the decoder's blocks" for i in range(20)}
    report.notes.append("vLLM refuses it")
    summary = report.summary()
    assert "3 layers quantized to 4 and 8 bits" in summary
    assert "2 layers have input channels that are zero for every calibration token (most: c, 5 of 16)" in summary
    assert "tower.7 and 12 more." in summary and "tower.8" not in summary
    assert "Note: vLLM refuses it." in summary
