"""AwqExperts: the packed weights of a layer's experts in the place of the module that transformers fuses them into.

transformers keeps all experts of a layer in two parameters, gate_up_proj [experts, 2 I, H] and down_proj [experts, H, I], and computes
sum_e w_e down_e(gate(gate_up_e(x))) over the experts that a router chose for a token. Checkpoints hold one matrix for each expert.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.kernels import ops, routing
from awq_hf.kernels.chunked import by_expert
from awq_hf.kernels.dispatch import CANONICAL, LAYOUTS, Layout
from awq_hf.linear import PackedModule, pack_weight
from awq_hf.spec import QuantizedWeight, QuantSpec

FUSED = ("gate_up_proj", "down_proj")  # the parameters of transformers' experts; ours are modules of these names
# What is behind the name of a module of experts, where a matrix of each is meant -> the parameter, and which of its halves [2, out] it is.
PARTS: dict[str, tuple[str, int | None]] = {"gate_proj": (FUSED[0], 0), "up_proj": (FUSED[0], 1), "down_proj": (FUSED[1], None)}
TOLERANCE = 1e-5

Multiply = Callable[[Tensor, Tensor], Tensor]  # tokens sorted by expert, their offsets -> each times its expert's matrix


class ExpertWeights(PackedModule):
    """y[t] = x[t] W[e]^T for tokens sorted by expert: one matrix of every expert.

    qweight int32 [experts, in, out * bits / 32], qzeros int32 [experts, groups, out * bits / 32], scales float16 [experts, groups, out].
    """

    def __init__(
        self, experts: int, in_features: int, out_features: int, spec: QuantSpec, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_features, out_features, spec)
        self.matrices = experts
        self._empty(experts, device=device)
        self.register_parameter("bias", None)

    @classmethod
    def from_quantized(cls, weights: Sequence[QuantizedWeight]) -> ExpertWeights:
        """Pack one weight [out, in] for each expert, all of one spec."""
        return cls.from_packed([pack_weight(weight) for weight in weights], weights[0].spec)

    @classmethod
    def from_packed(cls, weights: Sequence[dict[str, Tensor]], spec: QuantSpec) -> ExpertWeights:
        """The same of what `linear.pack_weight` made of each."""
        in_features, out_features = len(weights[0]["qweight"]), weights[0]["scales"].shape[1]
        self = cls(len(weights), in_features, out_features, spec, device="meta")
        self._hold(CANONICAL, [torch.stack([weight[part] for weight in weights]) for part in CANONICAL.parts])
        return self

    def to_quantized(self, expert: int) -> QuantizedWeight:
        """The canonical weight of one expert, unpacked."""
        q, scales, zero_points = LAYOUTS[self.layout].unpack(self._parts_of(expert), self.problem(1, torch.float32))
        return QuantizedWeight(q=q, scales=scales, zero_points=zero_points, spec=self.spec)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[experts, out, in] in `dtype`, rounded once from the exact float32 value."""
        problem, rows = self.problem(1, dtype), LAYOUTS[self.layout].rows
        device = next(self.parameters()).device
        weight = torch.empty(self.matrices, self.out_features, self.in_features, dtype=dtype, device=device)
        for expert in range(self.matrices):
            weight[expert] = rows(self._parts_of(expert), slice(None), problem)
        return weight

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return ops.experts_linear(x, offsets, self._parts(), None, self.out_features, self.groups, self.spec.bits, self.layout)

    def _parts_of(self, expert: int) -> list[Tensor]:
        return [part[expert] for part in self._parts()]

    def _parts_in(self, wanted: Layout) -> Sequence[Tensor]:
        weights = map(self.to_quantized, range(self.matrices))
        parts = [wanted.pack(weight.q, weight.scales, weight.zero_points, self.spec.bits) for weight in weights]
        return [torch.stack(part) for part in zip(*parts, strict=True)]

    def extra_repr(self) -> str:
        return f"experts={self.matrices}, {super().extra_repr()}"


class AwqExperts(nn.Module):
    """The experts of a layer, called as the module was that it replaces: (hidden_states, top_k_index, top_k_weights)."""

    def __init__(self, replaces: nn.Module, gate_up_proj: ExpertWeights, down_proj: ExpertWeights) -> None:
        """replaces: transformers' module, whose gate is used and whose parameters are let go; see `reason_against`."""
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self._replaces = (_without_parameters(replaces),)  # in a tuple: it is no part of the model

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        (replaces,) = self._replaces
        experts = self.gate_up_proj.matrices
        return run_experts(hidden_states, top_k_index, top_k_weights, experts, self.gate_up_proj, replaces._apply_gate, self.down_proj)

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """The module that was replaced, holding dequantized weights in `dtype`."""
        module = _without_parameters(self._replaces[0])
        for name in FUSED:
            module.register_parameter(name, nn.Parameter(self.get_submodule(name).dequantize(dtype)))  # type: ignore[operator]
        return module


def run_experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: int, gate_up: Multiply, gate: Callable[[Tensor], Tensor], down: Multiply
) -> Tensor:
    """What a layer's experts compute. x: [tokens, H]; top_k_index, top_k_weights: [tokens, k]; gate: [.., 2 I] -> [.., I]."""
    order, offsets = routing.route(top_k_index, experts)
    y = down(gate(gate_up(x[order // top_k_index.shape[1]], offsets)), offsets)
    return routing.combine(y, order, top_k_weights).to(x.dtype)


def _without_parameters(module: nn.Module) -> Any:
    bare = copy.copy(module)
    bare._parameters = dict.fromkeys(module._parameters)
    return bare


def joins_words(out_features: int, bits: int) -> bool:
    """Whether packed rows of `out_features` codes fill their words, so that another matrix's can follow."""
    return out_features * bits % 32 == 0


# Which modules AwqExperts can stand in for


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of all experts of a layer in one parameter, in whatever arrangement."""
    return any(name == FUSED[1] and parameter.ndim == 3 for name, parameter in module.named_parameters(recurse=False))


def reason_against(module: nn.Module) -> str | None:
    """Why AwqExperts cannot take the place of a module that holds experts, or None. No weight is read."""
    kind = type(module).__name__
    if not hasattr(module, "_apply_gate"):
        return f"{kind} does not follow transformers' interface of experts"
    if (names := sorted(name for name, _ in module.named_parameters())) != sorted(FUSED):
        return f"{kind} holds {', '.join(names)}, where gate_up_proj and down_proj are understood"
    (experts, rows, hidden), (_, out, inner) = (module.get_parameter(name).shape for name in FUSED)
    if (rows, out, len(module.get_parameter("down_proj"))) != (2 * inner, hidden, experts):
        return f"{kind} keeps its weights in another arrangement than [experts, out, in]"
    return _tried(_Alike(module, experts, hidden, inner))


def gate_is_linear_in_up(module: nn.Module) -> bool:
    """Whether dividing up's outputs divides what goes into down, channel by channel: not where the gate clamps them, for example."""
    gate: Any = module._apply_gate
    with torch.device("cpu"), torch.no_grad():
        x = 30 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        scales = torch.exp2(torch.arange(16, dtype=torch.float32) % 5 - 2)  # powers of two, which multiply exactly
        try:
            return torch.equal(gate(torch.cat([x[:, :16], x[:, 16:] * scales], 1)), gate(x) * scales)
        except Exception:  # of the model's own code
            return False


class _Alike:
    """A module of experts; equal to all whose class and settings are the same, which are tried once."""

    def __init__(self, module: nn.Module, *sizes: int) -> None:
        self.module, self.sizes = _without_parameters(module), sizes  # which is kept as long as the verdict
        plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        self.key = (type(module), str(getattr(module, "act_fn", None)), sizes, tuple(sorted(plain.items())))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self.key == other.key


@functools.lru_cache(maxsize=64)
def _tried(alike: _Alike) -> str | None:
    """Compare a small one of random weights with `run_experts`: a gate that is interleaved or clamped elsewhere shows here.

    In float32: while transformers builds a model, the default is the model's dtype.
    """
    kind = type(alike.module).__name__
    with torch.device("cpu"), torch.no_grad():
        small = _small(alike)
        generator = torch.Generator().manual_seed(0)
        for name in FUSED:
            parameter = small.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
        (experts, rows, hidden), out = small.gate_up_proj.shape, small.down_proj.shape[1]
        x = torch.randn(7, hidden, generator=generator, dtype=torch.float32)
        index = torch.rand(7, experts, generator=generator, dtype=torch.float32).argsort(1)[:, :2]
        share = torch.rand(index.shape, generator=generator, dtype=torch.float32)
        gate_up: Multiply = lambda some, offsets: by_expert(some, offsets, rows, lambda x, e: x @ small.gate_up_proj[e].T)  # noqa: E731
        down: Multiply = lambda some, offsets: by_expert(some, offsets, out, lambda x, e: x @ small.down_proj[e].T)  # noqa: E731
        try:
            theirs = inspect.unwrap(type(small).forward)(small, x, index, share)
            ours = run_experts(x, index, share, experts, gate_up, small._apply_gate, down)
        except Exception as error:  # of the model's own code
            return f"{kind} cannot be tried by itself ({type(error).__name__}: {error})"
        if theirs.shape != ours.shape or not float((theirs - ours).norm()) <= TOLERANCE * float(theirs.norm()):
            return f"{kind} computes something else with its weights than gate, up and down"
    return None


def _small(alike: _Alike) -> Any:
    """A copy of a module with few and small experts; with its own sizes where they cannot be told apart by their values."""
    experts, hidden, inner = alike.sizes
    wanted = {experts: 3, hidden: 32, inner: 16, 2 * inner: 32}
    if len(wanted) < 4:
        wanted = {size: size for size in wanted}
    small = _without_parameters(alike.module)
    for name, value in vars(alike.module).items():
        if type(value) is int and value in wanted:
            setattr(small, name, wanted[value])
    small.gate_up_proj = nn.Parameter(torch.empty(wanted[experts], wanted[2 * inner], wanted[hidden], dtype=torch.float32))
    small.down_proj = nn.Parameter(torch.empty(wanted[experts], wanted[hidden], wanted[inner], dtype=torch.float32))
    return small
