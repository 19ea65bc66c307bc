"""What a card says and does not say: figures are those of the JSON and the files, sections need facts, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from awq_hf.model_cards import is_generated, make_card
from awq_hf.model_cards.artifacts import find_artifacts
from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.gguf_header import read_header
from awq_hf.model_cards.metadata import card_data
from awq_hf.model_cards.missing import missing

from .conftest import (
    COMMIT,
    CONFIG,
    HIDDEN,
    awq,
    change,
    evaluation,
    report,
    row,
    table,
    text_of,
    write_checkpoint,
    write_gguf,
    write_json,
)


def test_quality_is_what_was_measured(full: Path) -> None:
    header, *rows = table(text_of(full), "Quality")
    assert header[1:] == ["Perplexity", "KL", "KL, 99%", "Same top-1"]
    measured = json.loads((full / "evaluation.json").read_text())["rows"]
    for cells, one in zip(rows, measured, strict=True):
        assert float(cells[1]) == pytest.approx(one["perplexity"], abs=6e-4)
        if one["kl"]:
            kl, error = cells[2].split(" ± ")
            assert float(kl) == pytest.approx(one["kl"], rel=6e-3) and float(error) == pytest.approx(one["kl_se"], rel=0.1)
            assert float(cells[3]) == pytest.approx(one["kl_99"], rel=6e-3)
            assert float(cells[4].rstrip("%")) / 100 == pytest.approx(one["top1"], abs=6e-4)
        else:
            assert cells[2:] == ["", "", ""]
    assert "**46%**" in text_of(full) and round(0.0133702 / 0.029022, 2) == 0.46


def test_files_are_those_that_are_there(full: Path) -> None:
    header, *rows = table(text_of(full), "Which file should I take?")
    assert header == ["", "Size", "Bits/weight", "KL", "For"]
    assert [cells[0].partition("<br>")[2] for cells in rows] == [
        "model.safetensors", "compressed-tensors/", "Tiny-Q6_K.gguf", "Tiny-Q4_K_M.gguf",
    ]  # fmt: skip
    assert [cells[3] for cells in rows] == ["0.0134", "0.0134", "0.00087", "0.00668"]
    size = (full / "model.safetensors").stat().st_size
    assert rows[0][1] == f"{size / 1e6:.2f} MB"
    assert rows[3][2] == "4.50"  # of its tensors
    assert "smallest" in rows[3][4] and "closest to the original" in rows[2][4]


@pytest.mark.parametrize(("bits", "expected"), [(4, 4 + 20 / 128), (3, 3 + 19 / 128), (8, 8 + 24 / 128)])
def test_bits_per_weight_counts_scales_and_zero_points(bits: int, expected: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, awq(bits))
    shapes = {f"model.layers.{i}.{part}": (HIDDEN, HIDDEN) for i in range(2) for part in ("self_attn.q_proj",)}
    if bits == 3:  # 3 bits have padding: without a report's shapes the number of weights is not known
        assert find_artifacts(tmp_path, shapes)[0].bits_per_weight is None
        shapes = {layer["name"]: (HIDDEN, HIDDEN) for layer in report()["layers"]}
    assert find_artifacts(tmp_path, shapes)[0].bits_per_weight == expected


def test_without_facts_no_sections(foreign: Path, awq_only: Path, full: Path) -> None:
    assert [*make_card(foreign)] == ["README.md"]
    for absent in (
        "## Quality",
        "KL",
        "Calibrated",
        "Took",
        "Versions",
        "reproduce",
        "images/",
        "model-index",
        "base_model",
        "license",
        "vllm serve",
    ):
        assert absent not in text_of(foreign), absent
    assert "model-index" not in text_of(awq_only) and "recipe.yaml" not in text_of(awq_only)
    assert set(make_card(awq_only)) == {"README.md", "images/loss-per-layer.png"}
    (full / "tokenizer_config.json").unlink()
    assert "### transformers" not in text_of(full) and "### vLLM" in text_of(full)


def test_figures_that_are_no_numbers_are_absent(full: Path) -> None:
    bad = {**row("awq-hf", ["."], 0.0, 0.0, 0.0), "kl": float("nan"), "kl_99": None, "top1": "high", "perplexity": float("inf")}
    write_json(full / "evaluation.json", evaluation(bad))
    text = text_of(full)
    assert table(text, "Quality")[3][1:] == ["", "", "", ""]
    assert "nan" not in text.lower().replace("finan", "") and " inf" not in text and "model-index" not in text


def test_perplexity_of_a_strange_text_is_no_result_of_the_model(full: Path) -> None:
    """Of the texts that were measured on, one is strange to the model: what the Hub lists has its KL and top-1 only."""
    strange = dict(text="far.txt", sha256="abc")
    rows = [row("original", [], 0.0, 4321.0, 1.0, **strange), row("awq-hf", ["."], 0.5, 3999.0, 0.5, **strange)]
    known = row("Tiny-Q6_K.gguf", ["Tiny-Q6_K.gguf"], 0.2, 400.0, 0.98)  # ten times the original's: a bad file, and not a strange text
    write_json(full / "evaluation.json", {**evaluation(known), "rows": [*evaluation(known)["rows"], *rows]})
    results = {result.metric_name: result.metric_value for result in card_data(gather(full)).eval_results or []}
    assert results == {
        "KL divergence to the original in nats": 0.5,
        "Same top-1 token as the original": 0.5,
        "Perplexity, Tiny-Q6_K.gguf": 400.0,
        "KL divergence to the original in nats, Tiny-Q6_K.gguf": 0.2,
        "Same top-1 token as the original, Tiny-Q6_K.gguf": 0.98,
    }
    text = text_of(full)
    assert text.count("Every perplexity is above 100") == 1 and "4321.000" in text
    assert text.index("`far.txt`") < text.index("Every perplexity is above 100")


def test_other_texts_are_other_tables(full: Path) -> None:
    other = row("awq-hf", ["."], 0.5, 9.0, 0.5, text="code.txt", sha256="abc")
    write_json(full / "evaluation.json", evaluation(row("Tiny-Q6_K.gguf", ["Tiny-Q6_K.gguf"], 0.001, 22.9, 0.99), other))
    text = text_of(full)
    quality = text.split("## Quality")[1].split("## How to run")[0]
    assert quality.count("| | Perplexity |") == 2 and quality.count("Measured on") == 2
    assert "With GGUF Q6" in quality  # only what was measured on the same text as plain rounding is compared with it
    results = card_data(gather(full, "a/b")).eval_results
    assert {(result.dataset_name, result.dataset_revision) for result in results or ()} == {
        ("code.txt", "abc"),
        ("held_out.txt", other_sha()),
    }


def other_sha() -> str:
    found: str = row("", [], 0, 0, 0)["sha256"]
    return found


def test_inherits_from_the_original(full: Path) -> None:
    metadata: dict[str, Any] = {
        "license": "other",
        "license_name": "acme",
        "license_link": "LICENSE",
        "language": ["en", False, 3],
        "tags": ["x", "gguf"],
    }
    base = {"name": "acme/Base", "revision": None, "local": False, "metadata": {**metadata, "pipeline_tag": "image-text-to-text"}}
    change(full / "report.json", base_model=base)
    data = card_data(gather(full)).to_dict()
    assert data["license_link"] == "https://huggingface.co/acme/Base/blob/main/LICENSE" and data["license_name"] == "acme"
    assert (data["language"], data["pipeline_tag"], data["base_model"]) == (["en", "no"], "image-text-to-text", "acme/Base")
    assert data["tags"] == ["awq", "compressed-tensors", "gguf", "4-bit", "x"]
    assert card_data(gather(full, base_model="acme/Other")).base_model == "acme/Other"


def test_a_local_original_is_no_link(awq_only: Path) -> None:
    text = text_of(awq_only)
    assert "my-finetune quantized" in text and "base_model" not in text and "license" not in text


def test_parts_of_a_gguf_file_are_one(gguf_only: Path) -> None:
    whole = gguf_only / "Tiny-Q4_K_M.gguf"
    shutil.copy(whole, gguf_only / "Big-Q4_K_M-00002-of-00002.gguf")
    whole.rename(gguf_only / "Big-Q4_K_M-00001-of-00002.gguf")
    assert "`Big-Q4_K_M-*`" in text_of(gguf_only) and "(2 files)" in text_of(gguf_only)


def test_gguf_headers_are_read_as_ggufs_own_reader_does(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("key.a", 1)
    writer.add_int64("key.b", -1)
    writer.add_bool("key.c", True)
    writer.add_string("key.d", "a")
    writer.add_float64("key.e", 0.5)
    writer.add_array("key.strings", ["a", "", "ccc"])
    writer.add_array("key.floats", [0.5, 1.0])
    writer.add_array("key.nested", [[1, 2], [3]])
    writer.add_description("made so")
    writer.add_tensor("blk.0.a.weight", np.zeros((4, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_tensor("output_norm.weight", np.zeros(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = [(t.name, t.tensor_type, int(t.n_elements), int(t.n_bytes)) for t in gguf.GGUFReader(path).tensors]
    assert [(t.name, t.kind, t.weights, t.nbytes) for t in read_header(path).tensors] == expected and len(expected) == 2
    assert read_header(path).description == "made so"
    whole = path.read_bytes()
    for end in range(0, whole.index(b"output_norm") + 30, 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"x\.gguf cannot be read as GGUF"):
            read_header(path)


def test_same_facts_same_bytes(full: Path) -> None:
    first, second = make_card(full, "a/b"), make_card(str(full), "a/b")
    assert first == second and set(first) == {"README.md", "images/loss-per-layer.png", "images/size-and-kl.png"}
    assert all(first[name].startswith(b"\x89PNG") for name in first if name.endswith(".png"))


def test_only_the_text_as_it_was_made_is_generated(full: Path) -> None:
    text = make_card(full)["README.md"].decode()
    assert is_generated(text) and is_generated(text.replace("\n", "\r\n")) and is_generated(text.rstrip())
    for edited in ("", "# Mine\n", text.replace("Tiny", "Tony", 1), text + "more", "more" + text, text.split("<!-- awq-hf")[0]):
        assert not is_generated(edited)


def test_refusals(tmp_path: Path, full: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        make_card(tmp_path)  # a folder of models is none
    with pytest.raises(ValueError, match="is not a directory"):
        make_card(tmp_path / "nothing")
    for option in ("repo_id", "base_model"):
        with pytest.raises(ValueError, match=f"{option}='a b' is not the id"):
            make_card(full, **{option: "a b"})
    for name, content in {"report.json": "[]", "evaluation.json": "{", "config.json": "1"}.items():
        kept = (full / name).read_text()
        (full / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            make_card(full)
        (full / name).write_text(kept)
    change(full / "evaluation.json", rows=[{"kl": 1}])
    with pytest.raises(ValueError, match="rows is not a list of objects with a name"):
        make_card(full)
    (full / "evaluation.json").unlink()
    (full / "Tiny-Q6_K.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"Tiny-Q6_K\.gguf cannot be read as GGUF"):
        make_card(full)


def test_a_float_model_has_no_card_unless_it_was_quantized_once(full: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "float" / "config.json", CONFIG)
    shutil.copy(full / "model.safetensors", tmp_path / "float")
    with pytest.raises(ValueError, match="float holds a float model, and nothing that is quantized"):
        make_card(tmp_path / "float")
    shutil.copy(full / "report.json", tmp_path / "float")  # a dense export has it: what was done to its weights
    assert "as bfloat16" in text_of(tmp_path / "float") and "Calibrated on 16,384 tokens" in text_of(tmp_path / "float")


def test_missing_facts_come_with_what_to_do(full: Path, foreign: Path) -> None:
    assert missing(gather(full)) == []
    assert [what for what, _ in missing(gather(foreign))] == [
        "which model of the Hub this was made from", "the licence, which no card of the original says", "what was done to the layers",
        "the quality of the checkpoint",
    ]  # fmt: skip
    write_json(full / "evaluation.json", evaluation(row("awq-hf", ["."], 0.01, 23.0, 0.9)))
    ((what, how),) = missing(gather(full))
    assert (
        what == "the quality of compressed-tensors, Tiny-Q6_K.gguf, Tiny-Q4_K_M.gguf"
        and how == f"awq-hf eval {full} --reference acme/Llama-2-Tiny@{COMMIT} --save"
    )


def test_gguf_files_alone(tmp_path: Path) -> None:
    """The mix that the file says it is, where its name does not; no advice to make an AWQ checkpoint."""
    write_gguf(tmp_path / "ft.gguf", gguf.GGMLQuantizationType.Q4_K, file_type=gguf.LlamaFileType.MOSTLY_Q4_K_M)
    assert "**GGUF Q4\\_K\\_M**<br>`ft.gguf`" in text_of(tmp_path)
    of_it = ["which model of the Hub this was made from", "the licence, which no card of the original says", "the quality of ft.gguf"]
    assert [what for what, _ in missing(gather(tmp_path))] == of_it
