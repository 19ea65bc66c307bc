"""The choice of layout and kernel, and layouts against the canonical one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_hf.kernels import dispatch, experts, jit
from awq_hf.kernels.dispatch import CANONICAL, LAYOUTS, Kernel, Layout, choose, choose_layout
from awq_hf.kernels.problem import Problem

pytestmark = pytest.mark.usefixtures("usual_kernels")

HALF = Problem(1, 64, 128, 2, torch.float16, "cuda")


def canonical(bits: int, n: int, k: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    codes = lambda columns: torch.randint(0, 2**bits, (n, columns), generator=generator, dtype=torch.uint8)  # noqa: E731
    return codes(k), torch.exp2(torch.randint(-6, 2, (n, groups), generator=generator)).half(), codes(groups)


@pytest.mark.parametrize("shape", [(128, 128, 2), (72, 96, 3), (80, 80, 1), (128, 256, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_undone_bit_for_bit_and_knows_its_rows(name: str, shape: tuple[int, int, int]) -> None:
    layout, (n, k, groups) = LAYOUTS[name], shape
    q, scales, zeros = canonical(4, *shape)
    problem = Problem(1, n, k, groups, torch.float32, "cpu")
    parts = layout.pack(q, scales, zeros, 4)
    assert len(parts) == len(layout.parts)
    for found, stored in zip(layout.unpack(parts, problem), (q, scales, zeros), strict=True):
        assert found.dtype == stored.dtype and torch.equal(found, stored)
    weight = ((q.view(n, groups, -1).float() - zeros[..., None].float()) * scales[..., None].float()).view(n, k)
    for rows in (slice(None), slice(0, 64), slice(64, n)):
        assert torch.equal(layout.rows(parts, rows, problem), weight[rows])


# The table, with entries of the test's own


def kernel(name: str, reason: str | None = None, tokens: float = 1e9) -> Kernel:
    return Kernel(name, lambda problem: reason, lambda x, parts, bias, problem: x, tokens)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A layout "a" for a GPU with three kernels: one for a token, one for up to 8, and one that never works."""
    kernels = (kernel("a-broken", "it is broken"), kernel("a-one", tokens=1), kernel("a-some", tokens=8))
    layout = CANONICAL._replace(name="a", kernels=kernels, devices=("cuda",))
    monkeypatch.setattr(dispatch, "LAYOUTS", {"a": layout, "canonical": CANONICAL})
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    return layout


def name_of(found: Kernel | None) -> str | None:
    return None if found is None else found.name


def test_the_number_of_tokens_chooses(table: Layout) -> None:
    names = [name_of(choose(Problem(m, 64, 128, 2, torch.float16), table)) for m in (1, 2, 8, 9)]
    assert names == ["a-one", "a-some", "a-some", None]


def test_a_forced_kernel_is_used_wherever_it_can_be(table: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name_of(choose(Problem(m, 64, 128, 2, torch.float16), table, "a-one")) for m in (1, 2, 9)]
    assert names == ["a-one"] * 3
    assert name_of(choose(HALF, table, "a-broken")) == "a-one"
    monkeypatch.setenv(dispatch.VARIABLE, "a-some")
    assert choose_layout(HALF) == (table, None)


def test_without_a_kernel_the_reason_is_given(table: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_layout(HALF) == (table, None)
    monkeypatch.setenv(dispatch.VARIABLE, "a-broken")
    assert choose_layout(HALF) == (CANONICAL, "it is broken")
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert choose_layout(HALF) == (CANONICAL, None)
    assert name_of(choose(HALF, CANONICAL, "reference")) is None


def test_a_name_that_no_kernel_has_is_refused(table: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cublas")
    with pytest.raises(ValueError, match="AWQ_HF_KERNEL=cublas: no kernel's name starts so; choose of a-broken, a-one, a-some, reference"):
        choose_layout(HALF)


def test_a_device_without_kernels_is_named() -> None:
    assert choose_layout(Problem(1, 64, 128, 2, torch.float16, "mps")) == (CANONICAL, "there are no kernels for mps")


@pytest.mark.skipif(jit.triton is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("version", "capability", "slower"),
    [("3.6.0", (9, 0), True), ("3.7.0+git1", (10, 0), True), ("3.6.0", (8, 9), False), ("3.7.1", (9, 0), False), ("3.10.0", (9, 0), False)],
)
def test_tensor_cores_are_left_alone_where_the_compiler_leaves_out_a_fence(
    version: str, capability: tuple[int, int], slower: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jit.triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for cached in (found := (jit.unfenced, choose)):
        cached.cache_clear()
    try:
        chosen = dispatch.by_tokens(HALF, dispatch.TRITON)
        assert chosen[1] == "triton-gemv"
        assert chosen[2] == ("triton-dequantize" if slower else "triton-gemm")
        assert (experts.supports(HALF) is None) is not slower
        assert caplog.text.count(f"triton {version} leaves out a fence that this GPU needs: update torch, to 2.13 or newer") == slower
    finally:
        for cached in found:
            cached.cache_clear()
