"""Float models in half precision on a CPU without instructions for it: where their products are computed, whatever this CPU has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from transformers.pytorch_utils import Conv1D

import awq_hf
from awq_hf.calibration.data import load_windows
from awq_hf.products import PRODUCTS, _InFloat32, fast_products, linear, run
from awq_hf.sensitivity import measure

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.kernels.products._has_bfloat16", lambda: False)


class NoSlowProducts(TorchDispatchMode):
    """Sees what is left of the ops within."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in PRODUCTS or args[0].dtype not in HALF, f"{func} in {args[0].dtype}"
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x).view(2, -1, 4, 4).transpose(1, 2)
        return torch.matmul(torch.matmul(q, q.transpose(2, 3)).softmax(-1), q)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x[..., :8], x, self.weight, beta=0.5, alpha=2)


class Grouped(nn.Module):
    """Experts as transformers computes them, with one that gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        ends = torch.tensor([3, 3, len(x) - 1, len(x)], dtype=torch.int32)
        if x.dtype == torch.float32:
            starts = [0, *ends.tolist()[:-1]]
            return torch.cat([x[a:b] @ w for a, b, w in zip(starts, ends.tolist(), self.weight, strict=True)])
        return torch._grouped_mm(x, self.weight, offs=ends)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(16, 8, bias=False),
    "Linear with a bias": lambda: nn.Linear(16, 8),
    "Conv1D": lambda: Conv1D(8, 16),
    "attention": Attention,
    "a product added to another": Added,
    "experts": Grouped,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [name for name in MODULES if name != "experts" or hasattr(torch, "_grouped_mm")])
def test_no_product_is_computed_in_half_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = MODULES[name]().to(dtype), torch.randn(2, 6, 16).to(dtype)
    with NoSlowProducts():
        y = run(module, x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), module.float()(x.float()), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_what_a_product_is_added_to_does_not_matter_with_a_factor_of_0(shape: tuple[int, ...]) -> None:
    """Models hand over memory that nothing was written to."""
    a, b = torch.randn(*shape, 4, 16).half(), torch.randn(*shape, 16, 5).half()
    into = torch.full((*shape, 4, 5), torch.nan).half()
    with _InFloat32():
        y = (torch.baddbmm if shape else torch.addmm)(into, a, b, beta=0, alpha=0.5)
    torch.testing.assert_close(y, (0.5 * (a.float() @ b.float())).half())


def test_gradients_are_computed_so_as_well() -> None:
    module, x = nn.Linear(16, 8).bfloat16(), torch.randn(6, 16).bfloat16().requires_grad_()
    with NoSlowProducts(), fast_products(module):
        module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is not None
    torch.testing.assert_close(x.grad, module.weight.detach().float().sum(0).expand(6, 16).bfloat16())


def test_a_bare_matrix() -> None:
    x, weight = torch.randn(5, 16).half(), torch.randn(8, 16).half()
    with NoSlowProducts():
        y = linear(x, weight)
    torch.testing.assert_close(y, (x.float() @ weight.float().T).half())


def test_other_models_are_left_alone() -> None:
    for module in (nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16, device="meta"), nn.Linear(4, 4).double()):
        assert isinstance(fast_products(module), nullcontext)


def test_all_of_a_float_model_runs_so_when_it_is_quantized_and_measured(
    tiny_llama: Callable[..., Any], small_config: Callable[..., Any], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every thread that runs a part of it."""
    seen, forward = [0], nn.Linear.forward

    def watched(self: nn.Linear, x: Tensor) -> Tensor:
        assert self.weight.dtype != torch.bfloat16 or isinstance(_get_current_dispatch_mode(), _InFloat32)
        seen[0] += self.weight.dtype == torch.bfloat16
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    model, reference = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    measure(model, load_windows(tokens, None, 42), ["model.layers.0.mlp.up_proj"])
    of_gradients = seen[0]
    awq_hf.quantize(model, small_config())
    of_quantizing = seen[0] - of_gradients
    awq_hf.evaluate(model, reference, tokens, seq_len=42)
    assert of_gradients and of_quantizing and seen[0] > of_gradients + of_quantizing
