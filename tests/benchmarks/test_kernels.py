"""benchmarks.kernels without a GPU: the arithmetic of its tables, how it judges a result, and that it refuses to measure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the scripts are no part of the package

from awq_hf.kernels import dispatch, tuning  # noqa: E402
from benchmarks import gpu, kernel_rivals, kernel_tuning, kernels  # noqa: E402
from benchmarks.kernel_rivals import Contender, Weight  # noqa: E402

DEVICE = kernels.Device(copy=4e12, peak={"bf16": 8e14})


def test_the_limit_is_memory_for_one_token_and_arithmetic_for_many() -> None:
    weight = 4096 * 4096 * (4 + 20 / 128) / 8
    assert kernels.limit(4096, 4096, 1, DEVICE.copy, DEVICE.peak["bf16"]) == ((weight + 2 * 2 * 4096) / 4e12, "memory")
    assert kernels.limit(4096, 4096, 4096, DEVICE.copy, DEVICE.peak["bf16"]) == (2 * 4096**3 / 8e14, "compute")


def test_a_row_has_times_ratios_and_blanks_for_what_was_left_out() -> None:
    row = kernels.row(1024, 4096, 2, "bf16", {"ours": 2e-6, "cuBLAS": 5e-6, "tinygemm": 3e-6}, ["tinygemm"], DEVICE)
    assert (row["out x in"], row["M"], row["ours us"], row["cuBLAS us"]) == ("1024 x 4096", 2, pytest.approx(2), pytest.approx(5))
    assert (row["x cuBLAS"], row["x tinygemm"]) == (pytest.approx(2.5), pytest.approx(1.5))
    assert row["share"] == pytest.approx(row["limit us"] / 2)
    assert row["gemlite us"] == row["x gemlite"] == row["AutoAWQ us"] == ""
    assert (row["bits change"], row["target"]) == ("tinygemm", "met")
    without = kernels.row(1024, 4096, 2, "bf16", {"cuBLAS": 5e-6}, [], DEVICE)
    assert without["ours us"] == without["share"] == without["x cuBLAS"] == without["target"] == ""
    assert without.keys() == row.keys()
    assert "gemlite us" not in kernels.readable([row, without])[0] and "M" in kernels.readable([row, without])[1]


def test_targets() -> None:
    missed = lambda n, k, m, least, **seconds: kernels.target(n, k, m, seconds, least)  # noqa: E731
    assert missed(4096, 4096, 1, 2.0, ours=4.0, cuBLAS=10.0) == "met"
    assert missed(4096, 4096, 1, 1.9, ours=4.0, cuBLAS=9.0) == "0.47 of the limit, not 0.5; 2.25 x cuBLAS, not 2.5"
    assert missed(28672, 8192, 1, 7.9, ours=10.0) == "0.79 of the limit, not 0.8"
    for m, wanted in ((16, 2.5), (17, 1.5), (64, 1.5), (128, 1.0), (1024, 0.8), (4096, 0.94)):
        assert missed(4096, 4096, m, 1.0, ours=1.0, cuBLAS=wanted) == "met"
        assert missed(4096, 4096, m, 1.0, ours=1.0, cuBLAS=wanted - 0.01).endswith(f"x cuBLAS, not {wanted:g}")
    assert missed(256, 256, 1, 1.0, ours=9.0, cuBLAS=1.0) == ""  # too small for a target
    assert missed(256, 256, 1, 1.0, ours=2.0, gemlite=1.0) == "0.50 x gemlite, not 1"


def test_kernels_one_by_one_say_what_a_wrong_crossover_costs() -> None:
    row = kernels.kernel_row(256, 512, 1, "bf16", {"a": 3e-6, "b": 2e-6}, [], ["a", "b", "c"], "a")
    assert (row["fastest"], row["chosen"], row["chosen / fastest"], row["c us"]) == ("b", "a", pytest.approx(1.5), "")


def test_results_are_judged_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cold_bytes", lambda: 1000)
    weight, x = Weight.random(64, 256, "cpu"), torch.randn(3, 256)
    dense = weight.dense()
    right = Contender("right", dense, torch.nn.functional.linear, 100)
    assert len(right.copies) == 10 and right.check(x, weight)
    assert right.copies[1].data_ptr() != dense.data_ptr() and torch.equal(right.copies[1], dense)
    unstable = Contender("unstable", dense, lambda x, w: x @ w.T * (1 + 1e-3 * torch.rand(1)), 1000)
    assert not unstable.check(x, weight)
    for wrong in (dense.roll(1, 0), dense * 1.03, dense * float("nan"), dense[:32]):
        with pytest.raises(ArithmeticError, match="wrong result"):
            Contender("wrong", wrong, torch.nn.functional.linear, 1000).check(x, weight)


def test_ours_runs_the_public_op_on_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cold_bytes", lambda: 1000)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    weight, x = Weight.random(64, 256, "cpu"), torch.randn(3, 256)
    assert kernel_rivals.ours(weight, torch.bfloat16).check(x.bfloat16(), weight)
    monkeypatch.setenv(dispatch.VARIABLE, dispatch.REFERENCE)
    with pytest.raises(RuntimeError, match=dispatch.VARIABLE):
        kernel_rivals.ours(weight, torch.bfloat16)


def test_candidates_hold_the_tables_own_configurations() -> None:
    for m in kernels.TOKENS:
        own = tuning.gemm_config(m)
        assert own in kernel_tuning.gemm_configs(m)
        for n, k in kernels.MODELS["Llama-3-8B"]:
            assert tuning.splits(m, n, k, own) in kernel_tuning.split_counts(m, n, k, own)
    for k in (256, 1024, 4096, 14336):
        assert tuning.gemv_config(4096, k) in kernel_tuning.gemv_configs(k) or k < 1024


def test_tuning_finds_the_best_and_what_is_best_for_all() -> None:
    tuner = kernel_tuning.Tuner([16])
    a, b, *_ = kernel_tuning.gemm_configs(16)
    own = tuning.gemm_config(16)
    for n, scale in ((4096, 1.0), (1024, 3.0)):
        table = own, tuning.splits(16, n, 4096, own)
        row = tuner._result("gemm", 16, n, 4096, {table: 4e-6 * scale, (a, 1): 3e-6 * scale, (b, 1): 9e-6 * scale, (b, 2): 2e-6 * scale})
        assert (row["table / best"], row["splits"], row["best us"]) == (pytest.approx(2), 2, pytest.approx(2 * scale))
    (best,) = tuner.summary()
    assert (best["line"], best["time / best of each shape"]) == ("M = 16", pytest.approx(1))
    assert best["configuration"] == kernel_tuning._text(b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    results = sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir())
    for script in ("benchmarks.kernels", "benchmarks.decode"):
        arguments = [sys.executable, "-m", script, *(["--device", "cuda"] if script == "benchmarks.decode" else [])]
        ran = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env)
        assert ran.returncode == 1 and ran.stdout == "" and "nothing was measured or written" in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir()) == results
