"""The Triton kernels: numbers from the interpreter and from an executor of the compiled PTX, gates on compiled code and on launches; none
needs a GPU (tests/gpu does). Whether triton interprets is settled when it is imported, so that those which it interprets and those which it
compiles run in a process each, and the rest of the suite sees neither."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    environment["PYTHONPATH"] = os.pathsep.join((str(REPOSITORY), environment.get("PYTHONPATH", "")))
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("interpret, files", [("1", ["numerics.py"]), ("0", ["launched.py", "executed.py", "compiled.py"])])
def test_kernels(interpret: str, files: list[str], tmp_path: Path) -> None:
    arguments = ("-q", "-x", "--noconftest", "-p", "no:cacheprovider", *(str(HERE / file) for file in files))
    run = python("-m", "pytest", *arguments, TRITON_INTERPRET=interpret, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout + run.stderr


WITHOUT_TRITON = """
import sys, types
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from awq_hf.kernels import gemm, gemv, jit, tuning
problem = lambda **changed: tuning.Problem(**{**dict(m=1, n=64, k=384, groups=3, dtype=torch.float16), **changed})
print(gemm.supports(problem()), gemv.supports(problem()), sep="\\n")
weight = torch.zeros(8, 16, dtype=torch.int32), torch.ones(8, 1).half(), torch.zeros(8, 1, dtype=torch.uint8)
for kernel in (gemv.gemv, gemm.gemm):
    try:
        kernel(torch.ones(1, 128).half(), *weight)
    except ImportError as error:
        print(error)
jit.triton = types.SimpleNamespace(__version__="3.4.0")
print(gemm.supports(problem()))
jit.triton.__version__ = "3.9.0+git1234"  # the other reasons are given by the problem alone
print(gemm.supports(problem()), gemv.supports(problem(bits=8)), gemv.supports(problem(m=2)), sep="\\n")
"""
MISSING = "triton is not installed, and this kernel is written in it: pip install triton"
REFUSED: list[tuple[dict[str, object], str]] = [
    (dict(bits=3), "read 4 or 8 bits, not 3"),
    (dict(dtype=torch.float32), "takes float16 and bfloat16, not float32"),
    (dict(k=387), "takes in_features in multiples of 2, not 387"),
    (dict(n=12), "out_features in multiples of 8, not 12"),
    (dict(groups=8), "not of 48"),
    (dict(device="cpu"), "runs on a GPU, not on cpu"),
    (dict(m=1 << 20, n=1 << 12), "does not fit the kernel's 32-bit offsets"),
    (dict(n=1 << 26, k=1000, groups=1), "does not fit the kernel's 32-bit offsets"),  # with the last block's padding
    (dict(m=1 << 22, n=8, k=32, groups=1), "takes up to 2097152 tokens, not 4194304"),
]


def test_modules_import_without_triton_and_kernels_say_what_they_do_not_take() -> None:
    printed = "\n".join(
        f"print(gemm.supports(problem(**{changes!r})), gemv.supports(problem(**{changes!r})), sep='|')" for changes, _ in REFUSED
    )
    run = python("-c", WITHOUT_TRITON + printed)
    said = run.stdout.splitlines()
    missing, old, accepted, lines = said[:4], said[4], said[5:8], said[8:]
    assert missing == [MISSING] * 4, run.stderr
    assert old == "the kernel needs triton 3.5 or newer, not 3.4.0: update torch, to 2.9 or newer", run.stderr
    assert accepted == ["None", "None", "the kernel multiplies 1 token, not 2"], run.stderr
    assert len(lines) == len(REFUSED)
    for line, (changes, reason) in zip(lines, REFUSED, strict=True):
        gemm_reason, gemv_reason = line.split("|")
        assert reason in gemm_reason and (reason in gemv_reason or "m" in changes), line
