"""The registered op: torch's own checks of the registration, and the same numbers as the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from awq_hf.kernels import ops, reference
from awq_hf.kernels.layout import pack


def arguments(bits: int, n_out: int, dtype: torch.dtype, bias: bool, leading: tuple[int, ...] = (2, 3)) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(bits)
    codes = lambda rows: torch.randint(0, 2**bits, (rows, n_out), generator=generator, dtype=torch.uint8)  # noqa: E731
    x = torch.randn(*leading, 32, generator=generator).to(dtype)
    scales = torch.rand(2, n_out, generator=generator).half()
    return x, pack(codes(32), bits), pack(codes(2), bits), scales, torch.randn(n_out, generator=generator) if bias else None, bits


CASES = [(4, 24, torch.float32, True), (4, 8, torch.bfloat16, False), (3, 17, torch.float32, False), (8, 5, torch.float16, True)]


@pytest.mark.parametrize("case", CASES)
def test_registration_passes_opcheck(case: tuple[int, int, torch.dtype, bool]) -> None:
    torch.library.opcheck(torch.ops.awq_hf.linear.default, arguments(*case))


@pytest.mark.parametrize("case", CASES)
def test_op_is_the_reference(case: tuple[int, int, torch.dtype, bool]) -> None:
    args = arguments(*case)
    result: Tensor = ops.linear(*args)
    assert torch.equal(result, reference.linear(*args))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)])
@pytest.mark.parametrize("case", CASES)
def test_shapes_are_inferred_without_computing(case: tuple[int, int, torch.dtype, bool], leading: tuple[int, ...]) -> None:
    args = arguments(*case, leading)
    on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    inferred, real = ops.linear(*on_meta), ops.linear(*args)
    assert (inferred.shape, inferred.dtype, inferred.stride()) == (real.shape, real.dtype, real.stride())
