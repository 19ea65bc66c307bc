"""What storing a Linear in another type would do to the model's predictions, measured before anything is stored.

With delta y = (W_q - W) x, the error of a Linear's output, to second order (there is no first: KL is least where nothing changes),

    KL(model || changed model) ~ 1/2 E[(g . delta y)^2] ~ 1/2 sum_o E[g_o^2] E[delta y_o^2],    E[delta y_o^2] ~ sum_j dW_oj^2 E[x_j^2]

per token. g is the gradient, at that output, of the log-likelihood of labels drawn from the model's own predictions: E[g g^T] is then the
Fisher information, which is the Hessian of KL (Martens, New Insights and Perspectives on the Natural Gradient Method, JMLR 2020). That
errors of channels, of columns and of tokens go together is left out, as in K-FAC (Martens and Grosse, 2015). On the demonstration model
36 pairs of a tensor and a type, Q2_K to Q6_K, have a divergence of 0.84 to 1.49 times the predicted one, and mixes of 0.97 to 1.07 times.

An expert has its own E[x^2], of the tokens that it gets, and E[g^2] counts those alone; what a type does to all experts of a layer adds up.
That later routers choose other experts is not seen: in a random mixture of two layers the first one's experts have a divergence of 2.9 to
3.6 times the predicted one, the last one's of 1.1 to 1.3 times.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from awq_hf.blocks import find_blocks
from awq_hf.calibration.data import Windows
from awq_hf.experts import PARTS, holds_experts
from awq_hf.exporters.gguf.ggml import quantize
from awq_hf.fisher import Progress, Sums, half_of, measure_gradients, part_of
from awq_hf.matrices import as_linear, is_matrix, shape_of
from awq_hf.streaming import InMemory

ROWS = 256  # of a weight that are quantized to measure its error
EXPERT_ROWS = 8  # of every expert, where these are more

WIDE = (Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0)
NARROW = (Type.IQ4_NL, Type.Q4_0, Type.Q5_0, Type.Q5_1, Type.Q8_0)  # where K-quants' blocks of 256 do not divide the row


def candidates(in_features: int) -> list[Type]:
    """The types to choose from for rows of so many weights, smallest first; none where no blocks divide them."""
    return [*WIDE] if in_features % 256 == 0 else [*NARROW] if in_features % 32 == 0 else []


def measure(
    model: nn.Module,
    windows: Windows,
    names: Collection[str],
    kinds: Sequence[Type] | None = None,
    progress: Progress | None = None,
    source: InMemory | None = None,
) -> dict[str, dict[Type, float]]:
    """Linear -> type -> the KL divergence, in nats per token, that storing it in that type is predicted to cause; costs of several add up.

    model: a causal language model; it is left as it was. names: of matrices in its blocks (see matrices.py), of parts of fused experts
    there (<module>.gate_proj, up_proj or down_proj: of all experts together), and of its head, which is taken for itself, also where it
    shares the embedding's weight. kinds: of them, those whose blocks divide a row; default: candidates(). source: where the blocks' weights
    are, if they are not in memory. Two forward passes over all windows, and one backward (fisher.py). The labels' seed is fixed.

    Raises ValueError for names that are no matrices, that no type fits, or that no token reached.
    """
    modules = {name: _matrix(model, name) for name in names}
    wanted = {name: _kinds(name, _width(name, module), kinds) for name, module in modules.items()}
    found: dict[str, dict[Type, float]] = {}
    with closing(measure_gradients(model, windows, modules, source or InMemory(), progress)) as gathered:
        for sums in gathered:
            found |= {name: _costs(_weights(name, modules[name]), of, wanted[name]) for name, of in sums.items()}
    return {name: found[name] for name in names}


def _matrix(model: nn.Module, name: str) -> nn.Module:
    """The module of a Linear, or that of the experts that a name is a part of."""
    modules, (owner, _, part) = dict(model.named_modules()), name.rpartition(".")
    if owner in modules and part in PARTS and holds_experts(modules[owner]):
        return modules[owner]
    module = modules.get(name)
    if module is None or not is_matrix(module):
        raise ValueError(
            f"{name} is {'not there' if module is None else f'a {type(module).__name__}'}; only Linears of the model have a sensitivity"
        )
    if not name.startswith(f"{find_blocks(model)[0]}.") and module is not model.get_output_embeddings():  # type: ignore[operator]
        raise ValueError(f"{name} is neither in a block nor the head; sensitivity is measured of those")
    return module


def _weights(name: str, module: nn.Module) -> Tensor:
    """[matrices, out, in]: one matrix, or one of each expert."""
    if not holds_experts(module):
        return as_linear(module).weight.data[None]
    parameter, half = part_of(name)
    return half_of(module.get_parameter(parameter).data, half)


def _width(name: str, module: nn.Module) -> int:
    return module.get_parameter(part_of(name)[0]).shape[2] if holds_experts(module) else shape_of(module)[1]


def _kinds(name: str, in_features: int, kinds: Sequence[Type] | None) -> list[Type]:
    found = candidates(in_features) if kinds is None else [k for k in kinds if in_features % gguf.GGML_QUANT_SIZES[k][0] == 0]
    if not found:
        raise ValueError(f"{name} has rows of {in_features} weights, which no type's blocks divide; leave it in float16")
    return found


def _costs(weights: Tensor, sums: Sums, kinds: Sequence[Type]) -> dict[Type, float]:
    """weights: [matrices, out, in]. Of a sample of rows, and of all as far as their outputs matter as much."""
    matrices, out_features, _ = weights.shape
    total = matrices * out_features
    chosen = torch.linspace(0, total - 1, min(max(ROWS, EXPERT_ROWS * (matrices > 1) * matrices), total), dtype=torch.float32).long()
    owners, matters = chosen // out_features, sums.gradient.flatten().cpu()
    share = float(matters[chosen].sum() / matters.sum().clamp(min=torch.finfo(torch.float32).tiny))
    found = dict.fromkeys(kinds, 0.0)
    for matrix in owners.unique().tolist() if share else []:
        of = chosen[owners == matrix]
        rows = weights[matrix, (of % out_features).to(weights.device)].to(torch.float32).cpu()
        energy = sums.energy[matrix].cpu()
        for kind in kinds:
            changed = torch.from_numpy(gguf.dequantize(quantize(rows.numpy(), kind, energy.numpy()), kind))
            error = (changed - rows).square() @ energy  # [rows]
            found[kind] += float(error @ matters[of]) / 2 / share
    return found
