"""The two CPU paths against numbers that are exact: torch's kernels (cpu), and the kernel in C++ (native).

Where results are compared bit for bit, scales are powers of two and inputs small integers, few of them nonzero, so that every sum is
exact in every dtype whatever its order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awq_hf.kernels import cpu, native
from awq_hf.kernels.problem import Problem

pytestmark = pytest.mark.usefixtures("usual_kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# out_features, in_features, columns of a group: whole and partial blocks of rows and columns
SHAPES = [(64, 128, 128), (70, 96, 32), (1, 192, 64), (130, 512, 256), (8, 100, 100), (33, 384, 128), (16, 512, 512)]


@pytest.fixture
def with_native(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Iterator[None]:
    """The C++ kernel, compiled when its source is new and kept in pytest's cache."""
    if torch.backends.cpu.get_cpu_capability() not in native.INSTRUCTIONS or not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("needs AVX-512 or AVX2, a C++ compiler and ninja")
    assert pytestconfig.cache is not None
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(pytestconfig.cache.mkdir("native")))
    monkeypatch.setenv(native.VARIABLE, "1")
    native.missing.cache_clear()
    assert native.missing() is None
    yield
    native.missing.cache_clear()


@pytest.fixture(params=["cpu", "native"])
def path(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu":
        return cpu
    request.getfixturevalue("with_native")
    return native


def random_weight(n: int, k: int, width: int, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, scales and zeros; exact: scales 1 and 2."""
    generator = torch.Generator().manual_seed(n + k)
    codes = lambda columns: torch.randint(0, 16, (n, columns), generator=generator, dtype=torch.uint8)  # noqa: E731
    scales = torch.rand(n, k // width, generator=generator) + 0.01
    return codes(k), (torch.exp2(scales.round()) if exact else scales).half(), codes(k // width)


def dense(q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float64 [out, in]"""
    grouped = q.view(*scales.shape, -1).double() - zeros[..., None].double()
    return (grouped * scales[..., None].double()).view(q.shape)


def packed(path: Any, weight: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    return path.pack(*weight)


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_numbers_come_out_exactly(path: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, k, width = shape
    weight = random_weight(*shape, exact=True)
    tensors, crossover = packed(path, weight), path.crossover(dtype)
    for m in (0, 1, 2, 5, 8, 9, crossover, crossover + 1):
        assert path.supports(Problem(m=m, n=n, k=k, groups=k // width, dtype=dtype, device="cpu")) is None
        generator = torch.Generator().manual_seed(m)
        draw: Any = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: B023, E731
        x = torch.zeros(m, k).scatter_(1, draw(0, k, m, 2), draw(1, 3, m, 2).float()).to(dtype)
        bias = draw(-4, 5, n).float()
        exact = x.double() @ dense(*weight).T
        with torch.inference_mode():
            for y, expected in ((path.linear(x, *tensors), exact), (path.linear(x, *tensors, bias), exact + bias)):
                assert y.dtype == dtype and y.is_contiguous() and torch.equal(y.double(), expected), f"{m} tokens"


# Relative rms error of the kernel and of the matmul. bfloat16 itself has 8 bits: 0.0017 by rounding one value; twice or thrice of that
# adds up where inputs, weights and result are rounded. Inputs are taken as they are given.
BOUNDS: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    ("cpu", torch.float32): (4e-3, 1e-6),
    ("cpu", torch.bfloat16): (4e-3, 3e-3),
    ("cpu", torch.float16): (4e-3, 3e-4),
    ("native", torch.float32): (9e-7, 1e-6),
    ("native", torch.bfloat16): (3e-3, 3e-3),
    ("native", torch.float16): (3e-4, 3e-4),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(path: Any, dtype: torch.dtype) -> None:
    weight = random_weight(256, 1024, 128)
    tensors = packed(path, weight)
    for m, bound in zip((path.crossover(dtype), path.crossover(dtype) + 1), BOUNDS[path.__name__.split(".")[-1], dtype], strict=True):
        x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(m)).to(dtype)
        error = relative_error(path.linear(x, *tensors), x.double() @ dense(*weight).T)
        assert bound / 10 < error < bound, f"{error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_weights_are_rounded_once(path: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = random_weight(*shape)
    tokens = max(shape[1], path.crossover(dtype) + 1)
    y = path.linear(torch.eye(tokens, shape[1], dtype=dtype), *packed(path, weight))
    assert torch.equal(y[: shape[1]].T, dense(*weight).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_the_cpp_kernel_multiplies_are_rounded_once(with_native: None, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = random_weight(*shape)
        words = packed(native, weight)
        for at in range(0, shape[1], 7):
            x = torch.nn.functional.one_hot(torch.arange(at, min(at + 7, shape[1])), shape[1]).to(dtype)
            assert torch.equal(native.linear(x, *words).T, dense(*weight).to(dtype)[:, at : at + 7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whatever_the_number_of_threads(path: Any, dtype: torch.dtype) -> None:
    tensors, threads = packed(path, random_weight(640, 1024, 128)), torch.get_num_threads()
    for m in (1, 6, path.crossover(dtype)):
        x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(m)).to(dtype)
        try:
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(path.linear(x, *tensors))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_cpp_kernel_runs_in_threads(with_native: None) -> None:
    """Without OpenMP at::parallel_for compiles to a plain loop."""
    calls = b"GOMP_parallel", b"__kmpc_fork_call"  # of GCC and of Clang
    assert any(call in native._library().read_bytes() for call in calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpp_kernel_gives_a_token_the_same_bits_whatever_its_company(with_native: None, dtype: torch.dtype) -> None:
    words = packed(native, random_weight(70, 512, 64))
    x = torch.randn(24, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    alone = torch.cat([native.linear(token[None], *words) for token in x])
    assert all(torch.equal(native.linear(x[:m], *words), alone[:m]) for m in range(1, 25))


def test_tokens_need_not_be_contiguous(path: Any) -> None:
    tensors = packed(path, random_weight(64, 128, 128, exact=True))
    x = torch.randint(0, 2, (128, 3)).T.float()
    assert torch.equal(path.linear(x, *tensors), path.linear(x.contiguous(), *tensors))


@given(st.integers(1, 200), st.integers(1, 5), st.sampled_from([32, 64, 96, 128, 256, 512]), st.booleans())
def test_packing_is_undone(n: int, groups: int, width: int, ragged: bool) -> None:
    columns, width = (width + 5, width + 5) if ragged else (groups * width, width)  # a group that is the whole row has any width
    weight = random_weight(n, columns, width)
    made = cpu.pack(*weight)
    assert all(tensor.is_contiguous() for tensor in made)
    assert all(torch.equal(a, b) for a, b in zip(cpu.unpack(made, columns), weight, strict=True))


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_orders_of_other_cpus(capability: str) -> None:
    code = """
import torch
from awq_hf.kernels import cpu
q = torch.randint(0, 16, (130, 256), dtype=torch.uint8)
scales, zeros = torch.rand(130, 2).half(), torch.randint(0, 16, (130, 2), dtype=torch.uint8)
weight = cpu.pack(q, scales, zeros)
assert torch.equal(cpu.unpack(weight, 256)[0], q)
exact = ((q.view(130, 2, -1) - zeros[..., None].double()) * scales[..., None].double()).view(130, 256)
for m in (2, 200):
    x = torch.randn(m, 256, dtype=torch.float64).bfloat16()
    y = x.double() @ exact.T
    assert (cpu.linear(x, *weight).double() - y).norm() < 0.01 * y.norm()
print(torch.backends.cpu.get_cpu_capability())
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in (capability.upper(), *(["NO AVX"] if capability == "default" else []))  # as torch 2.6 has it


REFUSED = [
    ({"device": "cuda"}, "not on cuda"),
    ({"bits": 8}, "4 bits, not 8"),
    ({"dtype": torch.float64}, "not float64"),
    ({"groups": 16}, "not of 16"),
    ({"groups": 3}, "256 columns are not divisible by 3 groups"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_what_is_refused(path: Any, change: dict[str, Any], reason: str) -> None:
    problem: dict[str, Any] = dict(m=1, n=64, k=256, groups=2, dtype=torch.float32, device="cpu", bits=4) | change
    assert reason in str(path.supports(Problem(**problem)))


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="not of 16"):
        cpu.pack(*random_weight(8, 64, 16))


def test_an_order_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", lambda q, tiles: convert(q.flip(0), tiles))
    cpu.order.cache_clear()
    assert "order that is not known" in str(cpu.supports(PROBLEM))
    monkeypatch.undo()
    cpu.order.cache_clear()
    assert cpu.supports(PROBLEM) is None


PROBLEM = Problem(m=1, n=64, k=128, groups=1, dtype=torch.float32, device="cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native.missing.cache_clear()
    yield monkeypatch
    native.missing.cache_clear()


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_compiled_unasked(fresh: pytest.MonkeyPatch, tmp_path: Path, value: str | None) -> None:
    fresh.delenv(native.VARIABLE, raising=False)
    if value is not None:
        fresh.setenv(native.VARIABLE, value)
    assert f"set {native.VARIABLE}=1" in str(native.supports(PROBLEM))
    assert not any(tmp_path.iterdir())


def test_for_other_cpus_nothing_is_compiled(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv(native.VARIABLE, "1")
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX-512 or AVX2" in str(native.supports(PROBLEM))
    assert not any(tmp_path.iterdir())


def test_a_compiler_that_fails_costs_speed_only(fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.setenv(native.VARIABLE, "1")
    fresh.setenv("CXX", "false")
    fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for _ in range(2):
        assert "could not be built" in str(native.supports(PROBLEM))
    assert len([r for r in caplog.records if "could not be built" in r.message]) == 1, "said once"
    assert not list(tmp_path.rglob("*.so"))
    assert cpu.supports(PROBLEM) is None
