"""The registered ops: torch's own checks of the registration, gradients, and the same numbers as the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from awq_hf.kernels import ops, reference, routing
from awq_hf.kernels.dispatch import CANONICAL, LAYOUTS

pytestmark = pytest.mark.usefixtures("usual_kernels")

# layout, bits, out_features, dtype, with bias; 64 columns in 2 groups
CASES = [
    ("canonical", 4, 24, torch.float32, True),
    ("canonical", 4, 8, torch.bfloat16, False),
    ("canonical", 3, 17, torch.float32, False),
    ("canonical", 8, 5, torch.float16, True),
    *((name, 4, 24, dtype, True) for name in LAYOUTS if name != "canonical" for dtype in (torch.float32, torch.bfloat16)),
]
Case = tuple[str, int, int, torch.dtype, bool]


def weight(bits: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    codes = lambda columns: torch.randint(0, 2**bits, (n_out, columns), generator=generator, dtype=torch.uint8)  # noqa: E731
    return codes(64), torch.rand(n_out, 2, generator=generator).half(), codes(2)


def arguments(case: Case, leading: tuple[int, ...] = (2, 3)) -> tuple[Any, ...]:
    layout, bits, n_out, dtype, with_bias = case
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(*leading, 64, generator=generator).to(dtype)
    bias = torch.randn(n_out, generator=generator) if with_bias else None
    return x, list(LAYOUTS[layout].pack(*weight(bits, n_out), bits)), bias, n_out, 2, bits, layout


@pytest.mark.parametrize("case", CASES)
def test_registration_passes_opcheck(case: Case) -> None:
    x, parts, bias, n_out, *how = arguments(case)
    results = [
        torch.library.opcheck(ops.linear, (x, parts, bias, n_out, *how)),
        torch.library.opcheck(ops.linear, (x.clone().requires_grad_(), parts, bias, n_out, *how)),
        torch.library.opcheck(ops.input_grad, (torch.randn(2, 3, n_out), parts, 64, *how)),
    ]
    assert all({*result.values()} == {"SUCCESS"} for result in results)


@pytest.mark.parametrize("case", CASES)
def test_op_is_the_reference(case: Case) -> None:
    x, parts, bias, n_out, groups, bits, layout = arguments(case)
    qweight, qzeros, scales = CANONICAL.pack(*weight(bits, n_out), bits)
    expected = reference.linear(x, qweight, qzeros, scales, bias, bits)
    y = ops.linear(x, parts, bias, n_out, groups, bits, layout)
    computed_in = torch.bfloat16 if layout == "cpu" else x.dtype
    tolerance = 0 if layout == "canonical" else 4 * torch.finfo(computed_in).eps * expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)])
@pytest.mark.parametrize("case", CASES)
def test_shapes_are_inferred_without_computing(case: Case, leading: tuple[int, ...]) -> None:
    x, parts, bias, *rest = arguments(case, leading)
    meta = lambda t: None if t is None else t.to("meta")  # noqa: E731
    inferred, real = ops.linear(meta(x), list(map(meta, parts)), meta(bias), *rest), ops.linear(x, parts, bias, *rest)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("case", [case for case in CASES if case[3] == torch.float32])
def test_gradients(case: Case) -> None:
    x, parts, bias, *rest = arguments((*case[:3], torch.float64, case[4]))
    x.requires_grad_()
    if bias is not None:
        bias = bias.double().requires_grad_()
    function = lambda x, bias: ops.linear(x, parts, bias, *rest)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: ops.linear(x, parts, None, *rest), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_input_gradient_of_a_half_sums_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row each, whose terms are 1: a sum in bfloat16 would stop at 256."""
    from awq_hf.kernels import chunked

    parts = LAYOUTS["canonical"].pack(
        torch.ones(32 * 320, 1, dtype=torch.uint8), torch.ones(32 * 320, 1), torch.zeros(32 * 320, 1).byte(), 4
    )
    monkeypatch.setattr(chunked, "CHUNK_WEIGHTS", 1)
    dy = torch.zeros(1, 32 * 320, dtype=dtype)
    dy[:, ::32] = 1
    assert ops.input_grad(dy, list(parts), 1, 1, 4, "canonical").tolist() == [[320.0]]


def test_an_output_may_be_changed_in_place() -> None:
    """Models add residuals so; autograd refuses it for an op's output that is a view."""
    x, *rest = arguments(CASES[0])
    y = ops.linear(x.requires_grad_(), *rest)
    y += 1
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("layout", ["canonical", "triton"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_experts(layout: str, with_bias: bool) -> None:
    """Sorted, multiplied by expert, and back: what a loop over tokens and their experts gives; one expert has no token."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(16, shape, generator=generator, dtype=torch.uint8)  # noqa: E731
    weights = [(draw(24, 64), torch.rand(24, 2, generator=generator).half(), draw(24, 2)) for _ in range(4)]
    parts = [torch.stack(part) for part in zip(*(LAYOUTS[layout].pack(*weight, 4) for weight in weights), strict=True)]
    bias = torch.randn(4, 24, generator=generator) if with_bias else None
    x, ids, share = torch.randn(5, 64, generator=generator), torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3], [0, 1]]), torch.rand(5, 2)
    order, offsets = routing.route(ids, 4)
    assert offsets.tolist() == [0, 3, 6, 6, 10]
    arguments = (x[order // 2], offsets, parts, bias, 24, 2, 4, layout)
    y = routing.combine(ops.experts_linear(*arguments), order, share)
    dense = [reference.scaled(*weight) for weight in weights]
    for t in range(5):
        terms = [share[t, i] * (x[t] @ dense[e].T + (0 if bias is None else bias[e])) for i, e in enumerate(ids[t].tolist())]
        torch.testing.assert_close(y[t], terms[0] + terms[1], rtol=1e-4, atol=1e-3)
    torch.library.opcheck(ops.experts_linear, arguments)
    x = arguments[0].detach().requires_grad_()
    dy = torch.randn(10, 24, generator=generator)
    ops.experts_linear(x, *arguments[1:]).backward(dy)
    expected = torch.cat([dy[a:b] @ dense[e] for e, (a, b) in enumerate(pairwise(offsets.tolist()))])
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-3)
    torch.library.opcheck(ops.experts_input_grad, (dy, offsets, parts, 64, 2, 4, layout))
    if bias is not None:
        bias.requires_grad_()
        ops.experts_linear(arguments[0], offsets, parts, bias, *arguments[4:]).backward(dy)
        sums = torch.stack([dy[a:b].sum(0) for a, b in pairwise(offsets.tolist())])
        torch.testing.assert_close(bias.grad, sums)
