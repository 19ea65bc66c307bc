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

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from awq_hf.calibration.data import Batch, Windows
from awq_hf.calibration.stream import model_inputs, replaced_forward
from awq_hf.experts import FUSED, holds_experts
from awq_hf.exporters.gguf.ggml import quantize
from awq_hf.matrices import as_linear, is_matrix, shape_of

Progress = Callable[..., Any]  # tqdm or a look-alike

ROWS = 256  # of a weight that are quantized to measure its error
EXPERT_ROWS = 8  # of every expert, where these are more
WINDOWS = 2  # that run at once: their activations are all kept for the gradients
SEED = 0

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
) -> dict[str, dict[Type, float]]:
    """Linear -> type -> the KL divergence, in nats per token, that storing it in that type is predicted to cause; costs of several add up.

    model: a causal language model; it is left as it was. names: of matrices in it (see matrices.py), and of parts of fused experts
    (<module>.gate_proj, up_proj or down_proj: of all experts together); lm_head is taken for itself, also where it shares the
    embedding's weight. kinds: of them, those whose blocks divide a row; default: candidates(). A forward and a backward
    pass over all windows; in memory are the activations of WINDOWS of them. The labels' seed is fixed.

    Raises ValueError for names that are no matrices, that no type fits, or that no token reached.
    """
    modules = {name: _matrix(model, name) for name in names}
    wanted = {name: _kinds(name, _width(name, module), kinds) for name, module in modules.items()}
    gathered = _gather(model, windows, modules, progress)
    bar = progress(modules, desc="Measuring types", unit="tensor") if progress else modules
    return {name: _costs(_weights(name, modules[name]), gathered[name], wanted[name]) for name in bar}


def _matrix(model: nn.Module, name: str) -> nn.Module:
    """The module of a Linear, or that of the experts that a name is a part of."""
    modules, (owner, _, part) = dict(model.named_modules()), name.rpartition(".")
    if owner in modules and part in _PARTS and holds_experts(modules[owner]):
        return modules[owner]
    module = modules.get(name)
    if module is None or not is_matrix(module):
        raise ValueError(
            f"{name} is {'not there' if module is None else f'a {type(module).__name__}'}; only Linears of the model have a sensitivity"
        )
    return module


# What is behind the name of a module of experts -> the parameter, and which of its halves [2, out] it is, if it has any.
_PARTS: dict[str, tuple[str, int | None]] = {"gate_proj": (FUSED[0], 0), "up_proj": (FUSED[0], 1), "down_proj": (FUSED[1], None)}


def _part(name: str) -> tuple[str, int | None]:
    return _PARTS[name.rpartition(".")[2]]


def _half(rows: Tensor, half: int | None) -> Tensor:
    """[experts, 2 out, ...] -> [experts, out, ...]"""
    return rows if half is None else rows.unflatten(1, (2, -1))[:, half]


def _weights(name: str, module: nn.Module) -> Tensor:
    """[matrices, out, in]: one matrix, or one of each expert."""
    if not holds_experts(module):
        return as_linear(module).weight.data[None]
    parameter, half = _part(name)
    return _half(module.get_parameter(parameter).data, half)


def _width(name: str, module: nn.Module) -> int:
    return module.get_parameter(_part(name)[0]).shape[2] if holds_experts(module) else shape_of(module)[1]


def _kinds(name: str, in_features: int, kinds: Sequence[Type] | None) -> list[Type]:
    found = candidates(in_features) if kinds is None else [k for k in kinds if in_features % gguf.GGML_QUANT_SIZES[k][0] == 0]
    if not found:
        raise ValueError(f"{name} has rows of {in_features} weights, which no type's blocks divide; leave it in float16")
    return found


# First: what goes into the Linears, and what their outputs matter


@dataclass
class _Sums:
    """Over tokens: x^2 of the input, [matrices, in], of how many, [matrices]; and g^2 of the output, [matrices, out]."""

    tokens: Tensor
    energy: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, matrices: int, out_features: int, in_features: int, device: torch.device) -> _Sums:
        zeros = lambda *shape: torch.zeros(matrices, *shape, dtype=torch.float32, device=device)  # noqa: E731
        return cls(zeros(), zeros(in_features), zeros(out_features))

    def add(self, matrix: int, x: Tensor, y: Tensor) -> Tensor:
        """Count in what goes into a matrix, [tokens, in]; and what becomes of `y`, which is put out: to be gone on with."""

        def add_gradient(g: Tensor) -> None:
            self.gradient[matrix] += g.to(torch.float32).flatten(0, -2).square().sum(0)  # padding's is 0: it is no part of the likelihood

        self.tokens[matrix] += len(x)
        self.energy[matrix] += x.detach().to(torch.float32).square().sum(0)
        if not y.requires_grad:  # gradients are wanted from here on; the copy may be changed in place
            y = y.detach().requires_grad_()
            y.register_hook(add_gradient)
            return y.clone()
        y.register_hook(add_gradient)
        return y


def _gather(model: nn.Module, windows: Windows, modules: Mapping[str, nn.Module], progress: Progress | None) -> dict[str, _Sums]:
    """Means: energy over the tokens that reached a matrix, gradient over all tokens."""
    linears = {name: module for name, module in modules.items() if not holds_experts(module)}
    found = {name: _Sums.of(1, *shape_of(module), module.get_parameter("weight").device) for name, module in linears.items()}
    fused = [module for module in modules.values() if holds_experts(module)]
    experts = {module: {parameter: _sums_of(module, parameter) for parameter in FUSED} for module in fused}
    generator = torch.Generator().manual_seed(SEED)
    batches = windows.batches(WINDOWS, hold_out=False)
    with _frozen(model), torch.enable_grad():
        for batch in progress(batches, desc="Measuring gradients", unit="batch") if progress else batches:
            with ExitStack() as watched:
                for name, module in linears.items():
                    watched.callback(module.register_forward_hook(_hook(found[name], batch)).remove)
                for module, sums in experts.items():
                    watched.enter_context(replaced_forward(module, _experts_forward(module, sums, batch)))
                _likelihood_of_own_labels(model, batch, generator).backward()
    for name, module in modules.items():
        if holds_experts(module):
            parameter, half = _part(name)
            of_both = experts[module][parameter]
            found[name] = _Sums(of_both.tokens, of_both.energy.clone(), _half(of_both.gradient, half).clone())
        total = found[name]
        if not total.tokens.any():
            raise ValueError(f"no calibration token reached {name}; calibrate on more text, or leave it out")
        total.energy /= total.tokens.clamp(min=1)[:, None]
        total.gradient /= windows.tokens
    return found


def _sums_of(experts: nn.Module, parameter: str) -> _Sums:
    weight = experts.get_parameter(parameter)
    matrices, out_features, in_features = weight.shape
    return _Sums.of(matrices, out_features, in_features, weight.device)


def _hook(sums: _Sums, batch: Batch) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        if len(x) == batch.input_ids.numel():  # else it is what was sent to an expert
            x = batch.real_tokens(x)
        return sums.add(0, x, y)

    return hook


def _experts_forward(module: Any, sums: Mapping[str, _Sums], batch: Batch) -> Callable[..., Tensor]:
    """What the experts of a layer compute (see experts.py), with every matrix watched."""

    def watched(parameter: str, expert: int, x: Tensor, real: Tensor) -> Tensor:
        return sums[parameter].add(expert, x[real], x @ module.get_parameter(parameter)[expert].T)

    def forward(x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        real = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        real[batch.real_tokens(torch.arange(len(x), device=x.device))] = True
        y = torch.zeros_like(x)
        for expert in range(len(module.get_parameter(FUSED[0]))):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                h = module._apply_gate(watched(FUSED[0], expert, x[tokens], real[tokens]))
                put_out = watched(FUSED[1], expert, h, real[tokens]) * shares[tokens, place, None]
                y = y.index_add(0, tokens, put_out.to(y.dtype))
        return y

    return forward


def _likelihood_of_own_labels(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Sum over real tokens of log p(label), label drawn from p."""
    logits = batch.real_tokens(model(**model_inputs(model, batch)).logits.flatten(0, 1))
    log_p = logits.to(torch.float32).log_softmax(1)
    labels = log_p.detach().exp().cpu().multinomial(1, generator=generator)
    return log_p.gather(1, labels.to(log_p.device)).sum()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients of parameters; everything gets its own state back."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


# Then: what types do to weights


def _costs(weights: Tensor, sums: _Sums, kinds: Sequence[Type]) -> dict[Type, float]:
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
