"""The registered ops on a GPU: every kernel by name, sizes of real models, gradients, the same bits again, every GPU of a machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from awq_hf.affine import dequantize_weight
from awq_hf.kernels import dispatch, ops, routing
from tests.gpu import gpu
from tests.gpu.gpu import DEVICE, DEVICES, error, linear, noise, weight
from tests.kernels.test_ops import Case, arguments

gpu.require()
pytestmark = pytest.mark.usefixtures("usual_kernels")

DTYPES = [torch.float16, torch.bfloat16]
TOKENS = [1, 2, 8, 16, 17, 32, 64, 65, 256, 512, 513, 1030]  # both ends of the buckets, and all three kernels
SPECS = [(4, 32, False), (4, 64, True), (4, 128, False), (4, -1, False), (8, 128, False), (8, 32, True), (8, -1, True)]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # root mean square: a rounding of the output, and of W where it is dequantized


@pytest.mark.parametrize("kernel", ["", *(kernel.name for kernel in dispatch.TRITON.kernels)])
@pytest.mark.parametrize("bits, group, symmetric", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, bits: int, group: int, symmetric: bool, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kernel is asked for, and where it cannot do a number of tokens, another."""
    monkeypatch.setenv(dispatch.VARIABLE, kernel)
    stored, bias = weight(264, 640, bits, group, symmetric=symmetric), noise(264, dtype=torch.float32)
    module, dense = linear(stored, dtype, bias), dequantize_weight(stored).double().to(DEVICE)
    for m in TOKENS:
        x = noise(m, 640, dtype=dtype, seed=m)
        y = module(x)
        assert error(y, x.double() @ dense.T + bias.double()) < TOLERANCE[dtype], m
        assert all(torch.equal(y, module(x)) for _ in range(3)), f"bits change between calls of {m} tokens"


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_real_models(shape: tuple[int, int], dtype: torch.dtype) -> None:
    (n, k), stored = shape, weight(*shape)
    module, rows = linear(stored, dtype), torch.arange(0, n, n // 64)
    some = dequantize_weight(stored)[rows].double().to(DEVICE)
    for m in (1, 8, 64, 256, 4096):
        x = noise(m, k, dtype=dtype, seed=m)
        y = module(x)
        assert y.isfinite().all() and error(y[:, rows.to(DEVICE)], x.double() @ some.T) < TOLERANCE[dtype]
        assert torch.equal(y, module(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 8, 600])
def test_gradients(m: int, dtype: torch.dtype) -> None:
    stored = weight(264, 640)
    module, dense = linear(stored, dtype, noise(264, dtype=dtype)), dequantize_weight(stored).double().to(DEVICE)
    x, dy = noise(m, 640, dtype=dtype).requires_grad_(), noise(m, 264, dtype=dtype, seed=1)
    module(x).backward(dy)
    assert x.grad is not None and error(x.grad, dy.double() @ dense) < TOLERANCE[dtype]


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("offset", [1, 2, 4])  # values: no view of these is aligned to 16 bytes
def test_views_that_are_not_aligned_or_not_contiguous(offset: int, m: int) -> None:
    module = linear(weight(264, 640), torch.float16)
    x = noise(m, 640, dtype=torch.float16)
    shifted = torch.cat((x.new_zeros(offset), x.flatten()))[offset:].view(m, 640)
    wide = torch.cat((x.new_zeros(m, offset), x), 1)[:, offset:]
    assert torch.equal(module(shifted), module(x)) and torch.equal(module(wide), module(x))
    assert torch.equal(module(x.T.contiguous().T), module(x))
    assert module(x[:0]).shape == (0, 264) and module(x[None, :, None]).shape == (1, m, 1, 264)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 600])
def test_every_gpu_while_another_is_current(m: int, device: torch.device) -> None:
    stored, bias = weight(264, 640), noise(264, dtype=torch.float16)
    module = linear(stored, torch.float16, bias.to(device), device)
    x = noise(m, 640, dtype=torch.float16, device=device)
    y = module(x)
    assert y.device == device and torch.cuda.current_device() == 0
    torch.cuda.synchronize(device)
    expected = x.cpu().double() @ dequantize_weight(stored).double().T + bias.cpu().double()
    assert error(y.cpu(), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_experts(tokens: int, dtype: torch.dtype, bits: int) -> None:
    count, n, k = 16, 264, 640
    module = gpu.experts(count, n, k, dtype, bits)
    ids = torch.randint(count, (tokens, 2), generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    order, offsets = routing.route(ids, count)
    x, dy = noise(2 * tokens, k, dtype=dtype)[order].requires_grad_(), noise(2 * tokens, n, dtype=dtype, seed=1)
    y = module(x, offsets)
    y.backward(dy)
    expert = ids.flatten()[order]
    dense = module.dequantize(torch.float32).double()[expert]  # of each token
    assert error(y, torch.einsum("tk,tnk->tn", x.double(), dense)) < TOLERANCE[dtype]
    assert x.grad is not None and error(x.grad, torch.einsum("tn,tnk->tk", dy.double(), dense)) < TOLERANCE[dtype]
    assert all(torch.equal(y, module(x, offsets)) for _ in range(3))


def on_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [on_gpu(one) for one in value]
    return value.to(DEVICE) if isinstance(value, Tensor) else value


CASES: list[Case] = [("triton", 4, 24, dtype, bias) for dtype in (*DTYPES, torch.float32) for bias in (True, False)]


@pytest.mark.parametrize("case", [*CASES, ("canonical", 3, 17, torch.float16, True)])
def test_registration_passes_opcheck(case: Case) -> None:
    x, parts, bias, n_out, *how = map(on_gpu, arguments(case))
    dy, offsets = noise(6, n_out, dtype=x.dtype), torch.tensor([0, 4, 4, 6], dtype=torch.int32, device=DEVICE)
    stacked, biases = [torch.stack([part] * 3) for part in parts], None if bias is None else torch.stack([bias] * 3)
    results = [
        torch.library.opcheck(ops.linear, (x, parts, bias, n_out, *how)),
        torch.library.opcheck(ops.linear, (x.clone().requires_grad_(), parts, bias, n_out, *how)),
        torch.library.opcheck(ops.input_grad, (dy, parts, 64, *how)),
        torch.library.opcheck(ops.experts_linear, (x.flatten(0, 1), offsets, stacked, biases, n_out, *how)),
        torch.library.opcheck(ops.experts_input_grad, (dy, offsets, stacked, 64, *how)),
    ]
    assert all({*result.values()} == {"SUCCESS"} for result in results)
