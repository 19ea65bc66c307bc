"""benchmarks.peers without other programs: rows, tables, how a driver's result is read, and what happens when one fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the scripts are no part of the package

from benchmarks import peer_table, peers  # noqa: E402
from benchmarks.common import Subject  # noqa: E402
from benchmarks.peer_drivers.driver import Job, cpu_seconds, peak_bytes  # noqa: E402
from benchmarks.peer_table import OURS, PLAIN, PROGRAMS, Program  # noqa: E402

SHAPE = {"group size": 128}


def result(program: str, kl: float, bits: int = 4) -> dict[str, Any]:
    quality = {"KL": kl, "top-1": 0.9, "perplexity": 16.04}
    return {"program": program, "bits": bits, **SHAPE, **quality, "bits per weight": 4.156, "CPU s": 12.4, "MB": 700.2}


def test_a_row_replaces_the_same_programs_older_one() -> None:
    rows = [result(PLAIN, 0.03), result(OURS, 0.02), result(OURS, 0.05, bits=3)]
    again = peer_table.merged(rows, result(OURS, 0.01))
    assert [(r["program"], r["bits"], r["KL"]) for r in peer_table.in_order(again)] == [(PLAIN, 4, 0.03), (OURS, 4, 0.01), (OURS, 3, 0.05)]


def test_shares_are_of_plain_rounding_at_the_same_width_and_follow_it() -> None:
    rows = peer_table.with_shares(
        [result(PLAIN, 0.04), result(OURS, 0.01), result(OURS, 0.05, bits=3), {"program": "HQQ", "bits": 4, **SHAPE}]
    )
    assert [r.get("share") for r in rows] == [1, 0.25, None, None]
    assert [r.get("share") for r in peer_table.with_shares(peer_table.merged(rows, result(PLAIN, 0.02)))] == [0.5, None, None, 1]


def test_tables_have_a_line_for_every_program_and_say_what_failed() -> None:
    rows = [result(PLAIN, 0.04), result(OURS, 0.01), result(PLAIN, 0.2, bits=3), result("HQQ", 0.1, bits=3)]
    rows = peer_table.with_shares([*rows, {"program": "AutoAWQ", "bits": 4, **SHAPE, "failed": "no memory"}])
    lines = peer_table.table(rows).splitlines()
    assert lines[2] == "| plain rounding | 1.00 | 0.04 | 90.0 | 16.04 | 4.16 | 12 | 700 | 1.00 | 0.2 | 90.0 |"
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| awq-hf", "| AutoAWQ", "| HQQ"]
    assert [line.split("|")[2].strip() for line in lines[3:]] == ["0.25", "failed", ""]
    assert len({line.count("|") for line in lines}) == 1


def test_the_summary_has_a_packages_best_method_and_never_plain_rounding() -> None:
    methods = {PLAIN: 0.04, OURS: 0.05, "llm-compressor AWQ": 0.03, "llm-compressor GPTQ": 0.02, "AutoAWQ, bug fixed": 0.06}
    rows = [*(result(name, kl) for name, kl in methods.items()), result(PLAIN, 0.2, bits=3), result("HQQ", 0.1, bits=3)]
    lines = peer_table.summary({"a": peer_table.with_shares(rows), "b": []}).splitlines()
    assert lines[0] == "| program | a, 4 bits | a, 3 bits | b, 4 bits | b, 3 bits |"
    assert [line.rstrip("| ") for line in lines[2:]] == [
        "| awq-hf | 1.25",
        "| llm-compressor | 0.50",
        "| AutoAWQ | 1.50",
        "| HQQ |  | 0.50",
    ]


def test_a_table_is_replaced_between_its_marks_only(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- peers x -->\nold\n<!-- end -->\nbetween\n<!-- peers y -->\nother\n<!-- end -->\n")
    peer_table.replace(file, "peers x", r"| \1 |")
    assert file.read_text() == "before\n<!-- peers x -->\n| \\1 |\n<!-- end -->\nbetween\n<!-- peers y -->\nother\n<!-- end -->\n"
    with pytest.raises(ValueError, match="0 tables marked <!-- peers z -->"):
        peer_table.replace(file, "peers z", "")


def test_the_readmes_hold_what_the_results_say(tmp_path: Path) -> None:
    copies = {name: tmp_path / name for name in ("README.md", "benchmarks/README.md")}
    for name, copy in copies.items():
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    peer_table.update_tables(tmp_path)
    for name, copy in copies.items():
        assert copy.read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), (
            f"{name}: run python -m benchmarks.peers --tables"
        )


def test_every_program_has_a_driver_and_only_ours_needs_no_environment() -> None:
    assert len({p.name for p in PROGRAMS}) == len({(p.driver, p.method) for p in PROGRAMS}) == len(PROGRAMS)
    for program in PROGRAMS:
        assert (ROOT / "benchmarks" / "peer_drivers" / f"{program.driver}.py").exists()
    assert {p.name for p in PROGRAMS if p.driver == peers.OWN} == {PLAIN, OURS}
    assert peer_table.PACKAGES.keys() == {p.driver for p in PROGRAMS}


def test_a_job_crosses_into_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("model", 3, 64, "gptq", tmp_path)
    monkeypatch.setattr(sys, "argv", ["driver", str(job.write())])
    assert Job.read() == job
    with job.measured("pytest"):
        start = cpu_seconds()
        while cpu_seconds() == start:
            pass
    found = json.loads((tmp_path / "result.json").read_text())
    assert min(found["CPU s"], found["wall s"]) > 0 and found["MB before"] <= found["MB"] <= peak_bytes() / 1e6
    assert found["versions"].keys() == {"pytest", "torch", "transformers"}


def test_plain_rounding_from_its_driver_to_a_row(tmp_path: Path) -> None:
    bench = small(tmp_path)
    row = bench.row(PROGRAMS[0], 4)
    assert "failed" not in row, (next(tmp_path.glob("jobs/*/log"))).read_text()
    assert 0 < row["KL"] < 0.1 and row["logits apart"] < 1e-5 and row["top-1"] > 0.8
    assert row["bits per weight"] == 4 + 20 / 128
    folder = next((tmp_path / "jobs").iterdir())
    (folder / "log").write_text("kept")
    assert bench.row(PROGRAMS[0], 4) == row and (folder / "log").read_text() == "kept"  # what is finished is not run again
    logits = {"logits": torch.zeros(4, 64, 1024)}
    save_file(logits, folder / "logits.safetensors")
    with pytest.raises(RuntimeError, match="of their norm from the program's own"):
        bench.row(PROGRAMS[0], 4)


def test_a_program_that_fails_is_a_row_with_its_last_words_and_is_tried_again(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho working\necho no memory >&2\nexit 1\n")
    python.chmod(0o700)
    bench = small(tmp_path)
    bench.pythons["hqq"] = str(python)
    program = Program("HQQ", "hqq", "hqq", patch="none")
    assert bench.row(program, 4) == {"program": "HQQ", "bits": 4, "group size": 128, "patch": "none", "failed": "no memory"}
    python.write_text("#!/bin/sh\nexit 1\n")
    assert bench.row(program, 4)["failed"] == "no output"


def small(folder: Path) -> peers.Bench:
    """The demonstration model with little of its text."""
    subject = Subject.packaged()
    subject.dtype, subject.seq_len = "float32", 64
    subject.evaluation = subject.evaluation[: 64 * 8]
    return peers.Bench(subject, 128, {peers.OWN: sys.executable}, folder / "jobs")
