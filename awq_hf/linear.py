"""AwqLinear: the packed parameters of a quantized Linear and one op call; ScaledActivation: what some checkpoints need beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.kernels import layout, ops
from awq_hf.kernels.dispatch import CANONICAL, LAYOUTS, Layout, choose_layout, pack_canonical, unpack_canonical
from awq_hf.kernels.problem import Problem
from awq_hf.spec import QuantizedWeight, QuantSpec


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a checkpoint, shaped as in AwqLinear."""
    return dict(zip(CANONICAL.parts, pack_canonical(weight.q, weight.scales, weight.zero_points, weight.spec.bits), strict=True))


def unpack_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """The canonical weight. Inverse of `pack_weight`."""
    q, scales, zero_points = unpack_canonical((qweight, qzeros, scales), spec.bits)
    return QuantizedWeight(q=q, scales=scales, zero_points=zero_points, spec=spec)


class PackedModule(nn.Module):
    """What AwqLinear and the experts' weights share: packed parameters in the layout of a checkpoint, or in one that a kernel reads.

    After `prepare` qweight, qzeros and scales give way to what a kernel reads; the state dict remains the file. A subclass says how
    its parts look in another layout. matrices: how many of [out_features, in_features] it holds.
    """

    matrices = 1
    qweight: nn.Parameter
    qzeros: nn.Parameter
    scales: nn.Parameter
    bias: Any  # a Parameter or None
    _prepared_for: torch.dtype | None = None  # activations, since `prepare` was called
    _held_as: Mapping[str, torch.dtype] = {}  # the parts, since then

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.layout = CANONICAL.name
        self.groups = in_features // spec.group_width(in_features)

    def _empty(self, *experts: int, device: torch.device | str | None) -> None:
        """Register canonical parameters without values, each with the leading dimensions `experts`."""
        words = layout.words_per_row(self.out_features, self.spec.bits)
        shapes = {
            "qweight": ((self.in_features, words), torch.int32),
            "qzeros": ((self.groups, words), torch.int32),
            "scales": ((self.groups, self.out_features), torch.float16),
        }
        for name, (shape, dtype) in shapes.items():
            empty = torch.empty(*experts, *shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def _parts_in(self, wanted: Layout) -> Sequence[Tensor]:
        """The parts as `wanted` has them."""
        raise NotImplementedError

    def problem(self, tokens: int, dtype: torch.dtype) -> Problem:
        device = next(self.parameters()).device.type
        return Problem(tokens, self.out_features, self.in_features, self.groups, dtype, device, self.spec.bits, self.scales.dtype)

    def prepare(self, dtype: torch.dtype) -> str | None:
        """Bring the weight into the layout that a kernel of this device reads. dtype: of the activations.

        Returns why none can, or None; the reference then computes.
        """
        chosen, reason = choose_layout(self.problem(1, dtype))
        self._prepared_for = dtype
        self._bring_into(chosen)
        self._held_as = {name: part.dtype for name, part in zip(LAYOUTS[self.layout].parts, self._parts(), strict=True)}
        return reason

    def undo_casts(self) -> None:
        """Bring parts that were cast one by one back to what the kernel reads. From a wider dtype, as PEFT casts, nothing is lost."""
        for name, dtype in self._held_as.items():
            part = self._parameters[name]
            if part is not None and part.dtype != dtype:
                part.data = part.data.to(dtype)

    def caution(self) -> str | None:
        """What a user has to know of the results of the layout that was chosen, or None."""
        return LAYOUTS[self.layout].caution(self.problem(1, self._prepared_for or torch.float32))

    def _bring_into(self, wanted: Layout) -> None:
        if wanted.name != self.layout:
            self._hold(wanted, self._parts_in(wanted))

    def _parts(self) -> list[Tensor]:
        return [self._parameters[name] for name in LAYOUTS[self.layout].parts]  # type: ignore[misc]

    def _hold(self, held: Layout, parts: Sequence[Tensor]) -> None:
        for name in LAYOUTS[self.layout].parts:
            del self._parameters[name]
        rest, self._parameters = self._parameters, {}
        for name, part in zip(held.parts, parts, strict=True):
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self._parameters.update(rest)  # bias stays last
        self.layout = held.name

    @contextmanager
    def _canonical(self) -> Iterator[None]:
        """The canonical layout for a while, then the one that suits the device on which the weight is by then."""
        self._bring_into(CANONICAL)
        yield
        if self._prepared_for is not None:
            self.prepare(self._prepared_for)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        # model.to(torch.bfloat16) casts every floating parameter; a scale is part of the stored integers' meaning and keeps its dtype.
        with self._canonical():
            before = self.scales.data  # the Parameter itself is changed in place
            super()._apply(fn, recurse)
            if self.scales.dtype != before.dtype:
                self.scales = nn.Parameter(before.to(self.scales.device), requires_grad=False)
            if self._prepared_for is not None:  # a cast is one of the activations as well
                self._prepared_for = fn(before.new_empty(0, dtype=self._prepared_for)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.layout == CANONICAL.name:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination.update({prefix + name: part for name, part in zip(CANONICAL.parts, self._parts_in(CANONICAL), strict=True)})
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._canonical():
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={s.bits}, group_size={s.group_size}, symmetric={s.symmetric}, layout={self.layout}"
        )


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """What is quantized in `model`, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


class AwqLinear(PackedModule):
    """y = x W^T + b, W stored as packed integers.

    Parameters, named and shaped as AutoAWQ's gemm checkpoints have them, so that the state dict is the file:
    qweight int32 [in, out * bits / 32], qzeros int32 [groups, out * bits / 32], scales float16 [groups, out],
    bias [out] or None. Not an nn.Linear: code that reads `.weight` must not take packed words for a matrix.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        replaces: type[nn.Module] = nn.Linear,
    ) -> None:
        """replaces: the class of the module that this one stands in for, and that dequantizing brings back."""
        super().__init__(in_features, out_features, spec)
        self.replaces = replaces
        self._empty(device=device)
        if bias:
            empty = torch.empty(out_features, dtype=dtype or torch.get_default_dtype(), device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None, replaces: type[nn.Module] = nn.Linear) -> AwqLinear:
        """Pack a QuantizedWeight. `bias` [out] keeps its dtype."""
        out_features, in_features = weight.shape
        self = cls(in_features, out_features, weight.spec, device="meta", replaces=replaces)
        self._hold(CANONICAL, [*pack_weight(weight).values()])
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return self

    def to_quantized(self) -> QuantizedWeight:
        """The canonical weight, unpacked: the inverse of `from_quantized`."""
        q, scales, zero_points = LAYOUTS[self.layout].unpack(self._parts(), self.problem(1, torch.float32))
        return QuantizedWeight(q=q, scales=scales, zero_points=zero_points, spec=self.spec)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as a plain Linear holds it: [out, in] in `dtype`, rounded once from the exact float32 value."""
        rows = LAYOUTS[self.layout].rows(self._parts(), slice(None), self.problem(1, dtype))
        return rows.to(dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self._parts(), self.bias, self.out_features, self.groups, self.spec.bits, self.layout)

    def _parts_in(self, wanted: Layout) -> Sequence[Tensor]:
        weight = self.to_quantized()
        return wanted.pack(weight.q, weight.scales, weight.zero_points, self.spec.bits)


class ScaledActivation(nn.Module):
    """act(x) / scales: where AutoAWQ scaled the inputs of a Linear that follows an activation and no weight could take the scales up.

    scales: [channels], of the model's dtype, named as in AutoAWQ's checkpoints.
    """

    def __init__(self, act: nn.Module, channels: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(torch.empty(channels, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x)
        return y / self.scales.to(y.dtype)
