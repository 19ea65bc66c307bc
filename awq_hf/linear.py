"""AwqLinear: the packed parameters of a quantized Linear and one op call; ScaledActivation: what some checkpoints need beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from awq_hf.kernels import layout, ops, reference
from awq_hf.spec import QuantizedWeight, QuantSpec


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a checkpoint, shaped as in AwqLinear."""
    pack = lambda codes: layout.pack(codes.T.contiguous(), weight.spec.bits)  # noqa: E731  [in or groups, words]
    return {"qweight": pack(weight.q), "qzeros": pack(weight.zero_points), "scales": weight.scales.T.contiguous()}


def unpack_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """The canonical weight. Inverse of `pack_weight`."""
    unpack = lambda words: layout.unpack(words, spec.bits, scales.shape[1]).T.contiguous()  # noqa: E731
    return QuantizedWeight(q=unpack(qweight), scales=scales.T.contiguous(), zero_points=unpack(qzeros), spec=spec)


class AwqLinear(nn.Module):
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
        super().__init__()
        self.replaces = replaces
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        groups = in_features // spec.group_width(in_features)
        words = layout.words_per_row(out_features, spec.bits)
        empty: Callable[..., Tensor] = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=device)  # noqa: E731
        self.qweight = nn.Parameter(empty(in_features, words, dtype=torch.int32), requires_grad=False)
        self.qzeros = nn.Parameter(empty(groups, words, dtype=torch.int32), requires_grad=False)
        self.scales = nn.Parameter(empty(groups, out_features, dtype=torch.float16), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(empty(out_features, dtype=dtype or torch.get_default_dtype()), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None, replaces: type[nn.Module] = nn.Linear) -> AwqLinear:
        """Pack a QuantizedWeight. `bias` [out] keeps its dtype."""
        out_features, in_features = weight.shape
        self = cls(in_features, out_features, weight.spec, device="meta", replaces=replaces)
        for part, tensor in pack_weight(weight).items():
            setattr(self, part, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return self

    def to_quantized(self) -> QuantizedWeight:
        """The canonical weight, unpacked: the inverse of `from_quantized`."""
        return unpack_weight(self.qweight, self.qzeros, self.scales, self.spec)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as a plain Linear holds it: [out, in] in `dtype`, rounded once from the exact float32 value."""
        return reference.dequantize(self.qweight, self.qzeros, self.scales, self.spec.bits).to(dtype).T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.qweight, self.qzeros, self.scales, self.bias, self.spec.bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AwqLinear:
        # model.to(torch.bfloat16) casts every floating parameter; a scale is part of the stored integers' meaning and keeps its dtype.
        before = self.scales.data  # the Parameter itself is changed in place
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = nn.Parameter(before.to(self.scales.device), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={s.bits}, group_size={s.group_size}, symmetric={s.symmetric}"
        )


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
