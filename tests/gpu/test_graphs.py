"""CUDA graphs and torch.compile: replays with other inputs give the bits that launches one by one give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from awq_hf.experts import AwqExperts
from tests.gpu import gpu
from tests.gpu.gpu import captured, linear, noise, weight

gpu.require()
pytestmark = pytest.mark.usefixtures("usual_kernels")

DTYPES = [torch.float16, torch.bfloat16]
TOKENS = [1, 8, 64, 256, 600]
EXPERTS, HIDDEN, INNER, TOP_K = 16, 256, 128, 2


class Gate(nn.Module):
    """What transformers' modules of experts say about their activation."""

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


def mixture(dtype: torch.dtype) -> AwqExperts:
    return AwqExperts(Gate(), gpu.experts(EXPERTS, 2 * INNER, HIDDEN, dtype), gpu.experts(EXPERTS, HIDDEN, INNER, dtype))


def routed(tokens: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a mixture; with seed 0 all tokens take the same experts."""
    x, scores = noise(tokens, HIDDEN, dtype=dtype, seed=seed), noise(tokens, EXPERTS, dtype=dtype, seed=seed + 100)
    share, ids = (scores if seed else scores[:1].expand_as(scores)).softmax(-1).topk(TOP_K)
    return x, ids, share


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", TOKENS)
@torch.no_grad()
def test_a_linear_in_a_graph(m: int, dtype: torch.dtype) -> None:
    module = linear(weight(1024, 1024), dtype, noise(1024, dtype=dtype))
    x = noise(m, 1024, dtype=dtype)
    graph, y = captured(lambda: module(x))
    for seed in range(4):
        x.copy_(noise(m, 1024, dtype=dtype, seed=seed))
        graph.replay()
        assert torch.equal(y, module(x)), seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@torch.no_grad()
def test_experts_in_a_graph_with_their_routing(tokens: int, dtype: torch.dtype) -> None:
    """Which expert gets how many tokens is decided on the GPU, anew at every replay."""
    module, inputs = mixture(dtype), routed(tokens, 1, dtype)
    graph, y = captured(lambda: module(*inputs))
    for seed in range(4):
        for kept, new in zip(inputs, routed(tokens, seed, dtype), strict=True):
            kept.copy_(new)
        graph.replay()
        assert torch.equal(y, module(*inputs)), seed


@torch.no_grad()
def test_experts_that_no_graph_holds_say_so() -> None:
    module = mixture(torch.float16)
    x, ids, share = routed(4, 1, torch.float32)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot hold"):
        captured(lambda: module(x, ids, share))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("m", [1, 8, 64, 600])
@torch.no_grad()
def test_a_compiled_block(m: int, mode: str | None) -> None:
    """fullgraph: nothing falls back to Python; CUDA graphs in the second mode, none of which is given up."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = nn.Sequential(linear(weight(1024, 512), torch.float16), nn.SiLU(), linear(weight(512, 1024), torch.float16))
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for seed in range(4):  # the first calls warm up and record
        x = noise(m, 512, dtype=torch.float16, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x).clone(), block(x), rtol=2e-3, atol=2e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("tokens", [1, 64])
@torch.no_grad()
def test_compiled_experts(tokens: int, mode: str | None) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = mixture(torch.float16)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for seed in range(4):
        inputs = routed(tokens, seed, torch.float16)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(*inputs).clone(), module(*inputs), rtol=2e-3, atol=2e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_a_compiled_linear_has_a_gradient() -> None:
    torch._dynamo.reset()
    module = linear(weight(264, 640), torch.float16)
    x, dy = noise(8, 640, dtype=torch.float16), noise(8, 264, dtype=torch.float16, seed=1)
    gradients: list[Tensor] = []
    for call in (module, torch.compile(module, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        call(leaf).backward(dy)
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
