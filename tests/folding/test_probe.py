"""Fold discovery on hand-written blocks: what must be found, with which channels, and what must be refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from awq_hf.folding import BlockProbe, FoldPoint, discover
from awq_hf.folding.fold import divided_parameters, multiplied_weight
from awq_hf.folding.probe import verify

HIDDEN, HEAD, INNER = 16, 4, 24


class RmsNorm(nn.Module):
    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset, self.weight = offset, nn.Parameter(torch.rand(HIDDEN) + 0.5 - offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)


class Attention(nn.Module):
    """4 query heads on 2 key and value heads; `fused`: one projection with rows q, k, v, and one with rows gate, up."""

    def __init__(self, fused: bool = False, offset: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.norm, self.norm2 = RmsNorm(offset), RmsNorm(offset)
        sizes = {"qkv": HIDDEN + 4 * HEAD} if fused else {"q": HIDDEN, "k": 2 * HEAD, "v": 2 * HEAD}
        self.proj = nn.ModuleDict({name: nn.Linear(HIDDEN, size, bias) for name, size in sizes.items()})
        self.o = nn.Linear(HIDDEN, HIDDEN, bias)
        self.mlp = nn.ModuleDict(
            {name: nn.Linear(HIDDEN, 2 * INNER if fused else INNER) for name in (["both"] if fused else ["gate", "up"])}
        )
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, hidden: Tensor, *, scale: float) -> Tensor:
        x = self.norm(hidden)
        q, k, v = torch.cat([p(x) for p in self.proj.values()], -1).split([HIDDEN, 2 * HEAD, 2 * HEAD], -1)
        heads = lambda t, n: t.unflatten(-1, (n, HEAD)).transpose(1, 2)  # noqa: E731
        k, v = (heads(t, 2).repeat_interleave(2, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(heads(q, 4), k, v, is_causal=True, scale=scale)
        hidden = hidden + self.o(mixed.transpose(1, 2).flatten(2))
        x = self.norm2(hidden)
        gate, up = torch.cat([p(x) for p in self.mlp.values()], -1).chunk(2, -1)
        return hidden + self.down(F.silu(gate) * up)


GQA = torch.arange(2 * HEAD).view(2, HEAD).repeat_interleave(2, 0).flatten()  # channel of o -> channel of v
ALL, INNER_ALL = torch.arange(HIDDEN), torch.arange(INNER)


def probe_of(block: nn.Module, leave_out: tuple[str, ...] = (), **kwargs: Any) -> BlockProbe:
    names = [name for name, m in block.named_modules() if isinstance(m, nn.Linear) and name not in leave_out]
    return BlockProbe(block, (torch.randn(2, 9, HIDDEN),), kwargs, names)


def found(block: nn.Module, leave_out: tuple[str, ...] = (), **kwargs: Any) -> dict[str, tuple[str, tuple[str, ...], list[int]]]:
    folds = discover(probe_of(block, leave_out, **kwargs))
    return {f.producer: (f.gain, f.consumers, f.channel_map.tolist()) for f in folds}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_every_fold_of_an_attention_block(offset: float, bias: bool) -> None:
    gain = "weight+1" if offset else "weight"
    assert found(Attention(offset=offset, bias=bias), scale=0.5) == {
        "norm": (gain, ("proj.q", "proj.k", "proj.v"), ALL.tolist()),
        "proj.v": ("rows", ("o",), GQA.tolist()),
        "norm2": (gain, ("mlp.gate", "mlp.up"), ALL.tolist()),
        "mlp.up": ("rows", ("down",), INNER_ALL.tolist()),
    }


@pytest.mark.parametrize("bias", [False, True])
def test_fused_projections_fold_by_some_of_their_rows(bias: bool) -> None:
    assert found(Attention(fused=True, bias=bias), scale=0.5) == {
        "norm": ("weight", ("proj.qkv",), ALL.tolist()),
        "proj.qkv": ("rows", ("o",), (HIDDEN + 2 * HEAD + GQA).tolist()),
        "norm2": ("weight", ("mlp.both",), ALL.tolist()),
        "mlp.both": ("rows", ("down",), (INNER + INNER_ALL).tolist()),
    }


def carry_out(block: nn.Module, folds: list[FoldPoint], scales: list[Tensor]) -> nn.Module:
    block = copy.deepcopy(block)
    for fold, s in zip(folds, scales, strict=True):
        producer = block.get_submodule(fold.producer)
        for name, value in divided_parameters(fold, producer, s).items():
            producer.get_parameter(name).data.copy_(value)
        for name in fold.consumers:
            weight = block.get_submodule(name).get_parameter("weight")
            weight.data.copy_(multiplied_weight(weight.data, s[fold.channel_map]))
    return block


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_folds_leave_the_function(fused: bool) -> None:
    block, x = Attention(fused, bias=True), torch.randn(3, 7, HIDDEN)
    folds = discover(probe_of(block, scale=0.5))
    channels = [block.get_submodule(f.producer).get_parameter("weight").shape[0] for f in folds]
    scales = []
    for fold, n in zip(folds, channels, strict=True):
        s = torch.ones(n)  # rows that no consumer reads (q, k, gate) are not divided
        s[fold.channel_map.unique()] = torch.exp(torch.randn(len(fold.channel_map.unique())))
        scales.append(s)
    expected = block(x, scale=0.5)
    torch.testing.assert_close(carry_out(block, folds, scales)(x, scale=0.5), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        carry_out(block, folds, [s.log2().round().exp2() for s in scales])(x, scale=0.5), expected, rtol=1e-6, atol=1e-6
    )
    without_consumers = carry_out(block, [replace(f, consumers=()) for f in folds], scales)
    assert not torch.allclose(without_consumers(x, scale=0.5), expected, rtol=1e-2, atol=1e-2), "the comparison can fail"


def test_probing_leaves_the_block_alone_and_finds_the_same_in_half_precision() -> None:
    block = Attention().to(torch.bfloat16).train()
    before = copy.deepcopy(block.state_dict())
    probe = BlockProbe(block, (torch.randn(2, 9, HIDDEN).bfloat16(),), {"scale": 0.5}, ["proj.q", "proj.k", "proj.v", "o"])
    assert [(f.producer, f.consumers) for f in discover(probe)] == [("norm", ("proj.q", "proj.k", "proj.v")), ("proj.v", ("o",))]
    after = block.state_dict()
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == torch.bfloat16 for k in before) and block.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in block.modules())


def test_linears_that_read_one_tensor_are_a_group_in_order_of_execution() -> None:
    assert probe_of(Attention(), scale=0.5).input_groups() == [("proj.q", "proj.k", "proj.v"), ("o",), ("mlp.gate", "mlp.up"), ("down",)]


def test_a_consumer_that_may_not_be_scaled_is_noticed() -> None:
    assert "norm" not in found(Attention(), ("proj.k",), scale=0.5)
    assert "mlp.up" not in found(Attention(), ("down",), scale=0.5)


class Small(nn.Module):
    """A norm and three Linears, wired by name."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring, self.norm = wiring, nn.LayerNorm(HIDDEN)
        self.a, self.b, self.c = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)

    def forward(self, h: Tensor) -> Any:
        a, b, c, norm = self.a, self.b, self.c, self.norm
        x = norm(h)
        match self.wiring:
            case "residual of the norm":
                return x + a(x)
            case "norm is an output too":
                return a(x), x
            case "norm at the end":
                return norm(h + a(h))
            case "two tensors":
                return h + a(x) + b(x.clone())
            case "relu":
                return c(F.relu(a(x)))
            case "gelu":
                return c(F.gelu(a(x)))
            case "two consumers":
                v = a(x)
                return b(v) + c(v.clone())
            case "two orders":
                v = a(x)
                return b(v) + c(v.flip(-1))
            case "reversed":
                return c(a(x).flip(-1))
            case "bilinear":
                return c(a(x) * b(x))
            case "producer runs twice":
                return c(a(x)) + c(a(h))
            case "sum of two":
                return c(a(x) + b(x))
            case "fixed gain":
                return c(a(x) * torch.linspace(1, 2, HIDDEN))
        raise AssertionError(self.wiring)


IDENTITY = ALL.tolist()
NORM_A = {"norm": ("weight", ("a",), IDENTITY)}


@pytest.mark.parametrize(
    ("wiring", "expected"),
    [
        ("residual of the norm", {}),
        ("norm is an output too", {}),
        ("norm at the end", {}),
        ("two tensors", {"norm": ("weight", ("a", "b"), IDENTITY)}),
        ("relu", {**NORM_A, "a": ("rows", ("c",), IDENTITY)}),
        ("gelu", NORM_A),
        ("two consumers", {**NORM_A, "a": ("rows", ("b", "c"), IDENTITY)}),
        ("two orders", NORM_A),
        ("reversed", {**NORM_A, "a": ("rows", ("c",), IDENTITY[::-1])}),
        ("bilinear", {"norm": ("weight", ("a", "b"), IDENTITY), "a": ("rows", ("c",), IDENTITY)}),
        ("producer runs twice", {}),
        ("sum of two", {"norm": ("weight", ("a", "b"), IDENTITY)}),
        ("fixed gain", {**NORM_A, "a": ("rows", ("c",), IDENTITY)}),
    ],
)
def test_small_blocks(wiring: str, expected: dict[str, Any]) -> None:
    assert found(Small(wiring)) == expected


def test_channels_that_a_relu_keeps_dead_are_filled_in() -> None:
    block = Small("relu")
    block.a.bias.data[[2, 7, 15]] = -100
    assert found(block)["a"] == ("rows", ("c",), IDENTITY)
    block.a.bias.data[:] = -100
    assert "a" not in found(block), "nothing is known about a producer whose every channel is dead"


def test_verification_refuses_a_wrong_map_and_a_missing_consumer() -> None:
    block = Attention()
    probe = probe_of(block, scale=0.5)
    right = FoldPoint("proj.v", "rows", GQA, ("o",))
    assert verify(probe, [right]) and verify(probe, [])
    assert not verify(probe, [FoldPoint("proj.v", "rows", GQA.flip(0), ("o",))])
    assert not verify(probe, [FoldPoint("norm", "weight", ALL, ("proj.q", "proj.v"))])
    assert not verify(probe, [FoldPoint("norm", "weight+1", ALL, ("proj.q", "proj.k", "proj.v"))])
    assert not verify(probe, [right, FoldPoint("norm2", "weight", ALL, ("mlp.gate",))])
