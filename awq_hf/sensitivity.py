"""What storing a Linear in another type would do to the model's predictions, measured before anything is stored.

With delta y = (W_q - W) x, the error of a Linear's output, to second order (there is no first: KL is least where nothing changes),

    KL(model || changed model) ~ 1/2 E[(g . delta y)^2] ~ 1/2 sum_o E[g_o^2] E[delta y_o^2],    E[delta y_o^2] ~ sum_j dW_oj^2 E[x_j^2]

per token. g is the gradient, at that output, of the log-likelihood of labels drawn from the model's own predictions: E[g g^T] is then the
Fisher information, which is the Hessian of KL (Martens, New Insights and Perspectives on the Natural Gradient Method, JMLR 2020). That
errors of channels, of columns and of tokens go together is left out, as in K-FAC (Martens and Grosse, 2015). On the demonstration model
36 pairs of a tensor and a type, Q2_K to Q6_K, have a divergence of 0.84 to 1.49 times the predicted one, and mixes of 0.97 to 1.07 times.
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
from awq_hf.calibration.stream import model_inputs
from awq_hf.exporters.gguf.ggml import quantize
from awq_hf.matrices import as_linear, is_matrix, shape_of

Progress = Callable[..., Any]  # tqdm or a look-alike

ROWS = 256  # of a weight that are quantized to measure its error
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

    model: a causal language model; it is left as it was. names: of matrices in it (see matrices.py); lm_head is taken for itself, also
    where it shares the embedding's weight. kinds: of them, those whose blocks divide a row; default: candidates(). A forward and a backward
    pass over all windows; in memory are the activations of WINDOWS of them. The labels' seed is fixed.

    Raises ValueError for names that are no matrices, that no type fits, or that no token reached.
    """
    modules = {name: _matrix(model, name) for name in names}
    wanted = {name: _kinds(name, shape_of(module)[1], kinds) for name, module in modules.items()}
    gathered = _gather(model, windows, modules, progress)
    bar = progress(modules, desc="Measuring types", unit="tensor") if progress else modules
    return {name: _costs(as_linear(modules[name]).weight.data, gathered[name], wanted[name]) for name in bar}


def _matrix(model: nn.Module, name: str) -> nn.Module:
    module = dict(model.named_modules()).get(name)
    if module is None or not is_matrix(module):
        raise ValueError(
            f"{name} is {'not there' if module is None else f'a {type(module).__name__}'}; only Linears of the model have a sensitivity"
        )
    return module


def _kinds(name: str, in_features: int, kinds: Sequence[Type] | None) -> list[Type]:
    found = candidates(in_features) if kinds is None else [k for k in kinds if in_features % gguf.GGML_QUANT_SIZES[k][0] == 0]
    if not found:
        raise ValueError(f"{name} has rows of {in_features} weights, which no type's blocks divide; leave it in float16")
    return found


# First: what goes into the Linears, and what their outputs matter


@dataclass
class _Sums:
    """Over tokens: x^2 of the input, [in], of how many; and g^2 of the output, [out]."""

    tokens: int
    energy: Tensor
    gradient: Tensor


def _gather(model: nn.Module, windows: Windows, modules: Mapping[str, nn.Module], progress: Progress | None) -> dict[str, _Sums]:
    """Means: energy over the tokens that reached the Linear, gradient over all tokens."""
    found = {name: _sums_of(module) for name, module in modules.items()}
    generator = torch.Generator().manual_seed(SEED)
    batches = windows.batches(WINDOWS, hold_out=False)
    with _frozen(model), torch.enable_grad():
        for batch in progress(batches, desc="Measuring gradients", unit="batch") if progress else batches:
            with ExitStack() as hooks:
                for name, module in modules.items():
                    hooks.callback(module.register_forward_hook(_hook(found[name], batch)).remove)
                _likelihood_of_own_labels(model, batch, generator).backward()
    for name, sums in found.items():
        if not sums.tokens:
            raise ValueError(f"no calibration token reached {name}; calibrate on more text, or leave it out")
        sums.energy /= sums.tokens
        sums.gradient /= windows.tokens
    return found


def _sums_of(module: nn.Module) -> _Sums:
    (out_features, in_features), device = shape_of(module), module.get_parameter("weight").device
    return _Sums(0, torch.zeros(in_features, device=device), torch.zeros(out_features, device=device))


def _hook(sums: _Sums, batch: Batch) -> Callable[..., Tensor]:
    def add_gradient(g: Tensor) -> None:
        sums.gradient += g.to(torch.float32).flatten(0, -2).square().sum(0)  # padding's is 0: it is no part of the likelihood

    def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        if len(x) == batch.input_ids.numel():  # else it is what was sent to an expert
            x = batch.real_tokens(x)
        sums.tokens += len(x)
        sums.energy += x.to(torch.float32).square().sum(0)
        if not y.requires_grad:  # gradients are wanted from here on; the copy may be changed in place
            y = y.detach().requires_grad_()
            y.register_hook(add_gradient)
            return y.clone()
        y.register_hook(add_gradient)
        return y

    return hook


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


def _costs(weight: Tensor, sums: _Sums, kinds: Sequence[Type]) -> dict[Type, float]:
    """weight: [out, in]. Of a sample of rows, and of all as far as their outputs matter as much."""
    chosen = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device).long()
    rows, energy = weight[chosen].to(torch.float32).cpu(), sums.energy.cpu()
    matters = sums.gradient[chosen].cpu()
    share = float(matters.sum() / sums.gradient.sum().clamp(min=torch.finfo(torch.float32).tiny))
    found = {}
    for kind in kinds:
        changed = torch.from_numpy(gguf.dequantize(quantize(rows.numpy(), kind, energy.numpy()), kind))
        error = (changed - rows).square() @ energy  # [rows]
        found[kind] = float(error @ matters) / 2 / share if share else 0.0
    return found
