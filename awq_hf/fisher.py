"""What goes into the matrices of a model, and how much their outputs matter to its predictions, with one block's weights and activations in
memory at a time.

The blocks run one by one on all windows, and what each puts out is kept. Then, from the last to the first, each runs once more on what the
one before it put out, with gradients: those at its inputs are those at the outputs of the one before (Chen et al., Training Deep Nets with
Sublinear Memory Cost, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.blocks import find_blocks
from awq_hf.calibration.data import Batch, Windows
from awq_hf.calibration.stream import BlockStream, replaced_forward
from awq_hf.experts import FUSED, PARTS, holds_experts
from awq_hf.matrices import shape_of
from awq_hf.products import fast_products
from awq_hf.streaming import InMemory

Progress = Callable[..., Any]  # tqdm or a look-alike

WINDOWS = 2  # that run at once
SEED = 0  # of the labels


def part_of(name: str) -> tuple[str, int | None]:
    return PARTS[name.rpartition(".")[2]]


def half_of(rows: Tensor, half: int | None) -> Tensor:
    """[experts, 2 out, ...] -> [experts, out, ...]"""
    return rows if half is None else rows.unflatten(1, (2, -1))[:, half]


@dataclass
class Sums:
    """Over tokens: x^2 of the input, [matrices, in], of how many, [matrices]; and g^2 of the output, [matrices, out]."""

    tokens: Tensor
    energy: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, matrices: int, out_features: int, in_features: int, device: torch.device) -> Sums:
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

    def means(self, tokens: int) -> Sums:
        """Energy over the tokens that reached a matrix, gradient over all."""
        return Sums(self.tokens, self.energy / self.tokens.clamp(min=1)[:, None], self.gradient / tokens)


def measure_gradients(
    model: nn.Module, windows: Windows, modules: Mapping[str, nn.Module], source: InMemory, progress: Progress | None = None
) -> Generator[dict[str, Sums]]:
    """Means of the matrices of the head, then of the last block, and so on to the first that has any; its weights are in memory meanwhile.

    modules: name -> the matrix, or the experts that it is a part of: in blocks, or the head. g is the gradient of the log-likelihood of
    labels drawn from the model's own predictions.
    """
    prefix, blocks = find_blocks(model)
    within = [{name: module for name, module in modules.items() if name.startswith(f"{prefix}.{i}.")} for i in range(len(blocks))]
    behind = {name: module for name, module in modules.items() if not name.startswith(f"{prefix}.")}
    with _frozen(model):
        backward = _Backward(BlockStream(model, blocks, windows.batches(WINDOWS, hold_out=False)), source)
        backward.run_blocks(progress)
        watch = _Watch(behind)
        backward.through_head(watch)
        yield watch.means(windows.tokens)
        first = next((index for index, names in enumerate(within) if names), len(blocks))
        numbers = range(len(blocks) - 1, first - 1, -1)
        for index in progress(numbers, desc="Measuring types", unit="block") if progress else numbers:
            source.load(index)
            blocks[index].requires_grad_(False)
            watch = _Watch(within[index])
            backward.through_block(index, watch)
            yield watch.means(windows.tokens)
            source.unload(index)


class _Backward:
    """Gradients on their way from the head to the first block."""

    def __init__(self, stream: BlockStream, source: InMemory) -> None:
        self.stream, self.source = stream, source
        self.put_out: list[list[Any]] = []  # by each block that is still to come, for each batch
        self.gradients: list[Tensor | None] = []  # at what the next block puts out, for each batch

    def run_blocks(self, progress: Progress | None) -> None:
        def keep(index: int) -> None:
            if any(isinstance(value, MutableMapping) and value for call in self.stream.last or () for value in call[1].values()):
                raise ValueError("the blocks of this model hand each other more than hidden states, and gradients are not taken of that")
            assert self.stream.outputs is not None
            self.put_out.append(self.stream.outputs)
            self.source.unload(index)

        self.stream.run(self.source.load, keep, progress, "the float model")

    def through_head(self, watch: _Watch) -> None:
        generator = torch.Generator().manual_seed(SEED)
        for position, batch in enumerate(self.stream.batches):
            leaf, output = _with_leaf(self.put_out[-1][position])
            with torch.enable_grad(), fast_products(self.stream.model), watch.on(batch):
                _likelihood_of_own_labels(self.stream.result_after(output, position).logits, batch, generator).backward()
            self.gradients.append(leaf.grad)

    def through_block(self, index: int, watch: _Watch) -> None:
        self.put_out.pop()
        for position, batch in enumerate(self.stream.batches):
            leaf, output = _with_leaf(self.put_out[-1][position]) if index else (None, None)
            with torch.enable_grad(), fast_products(self.stream.blocks[index]), watch.on(batch):
                args, kwargs = self.stream.call_after(output, index, position)
                y = _hidden(self.stream.blocks[index](*args, **kwargs))
                if y.requires_grad:
                    y.backward(self.gradients[position])
            self.gradients[position] = None if leaf is None else leaf.grad


def _hidden(output: Any) -> Tensor:
    """The hidden states among what a block puts out."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _with_leaf(output: Any) -> tuple[Tensor, Any]:
    """The hidden states of what a block put out, to gather gradients; and the output with a copy of them, which may be changed in place."""
    leaf = _hidden(output).detach().requires_grad_()
    with torch.enable_grad():
        return leaf, leaf.clone() if isinstance(output, Tensor) else (leaf.clone(), *output[1:])


class _Watch:
    """Sums of matrices, taken while they run."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """modules: whose weights are in memory."""
        self.modules = modules
        self.linears = {
            name: Sums.of(1, *shape_of(module), module.get_parameter("weight").device)
            for name, module in modules.items()
            if not holds_experts(module)
        }
        fused = [module for module in modules.values() if holds_experts(module)]
        self.experts = {module: {parameter: _sums_of(module, parameter) for parameter in FUSED} for module in fused}

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        with ExitStack() as watched:
            for name, sums in self.linears.items():
                watched.callback(self.modules[name].register_forward_hook(_hook(sums, batch)).remove)
            for module, of_experts in self.experts.items():
                watched.enter_context(replaced_forward(module, _experts_forward(module, of_experts, batch)))
            yield

    def means(self, tokens: int) -> dict[str, Sums]:
        """tokens: of all windows. Raises ValueError for what no token reached."""
        found = {}
        for name, module in self.modules.items():
            if holds_experts(module):
                parameter, half = part_of(name)
                of_both = self.experts[module][parameter]
                sums = Sums(of_both.tokens, of_both.energy, half_of(of_both.gradient, half))
            else:
                sums = self.linears[name]
            if not sums.tokens.any():
                raise ValueError(f"no calibration token reached {name}; calibrate on more text, or leave it out")
            found[name] = sums.means(tokens)
        return found


def _sums_of(experts: nn.Module, parameter: str) -> Sums:
    weight = experts.get_parameter(parameter)
    matrices, out_features, in_features = weight.shape
    return Sums.of(matrices, out_features, in_features, weight.device)


def _hook(sums: Sums, batch: Batch) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        if len(x) == batch.input_ids.numel():  # else it is what was sent to an expert
            x = batch.real_tokens(x)
        return sums.add(0, x, y)

    return hook


def _experts_forward(module: Any, sums: Mapping[str, Sums], batch: Batch) -> Callable[..., Tensor]:
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


def _likelihood_of_own_labels(logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Sum over real tokens of log p(label), label drawn from p. logits: [windows, seq_len, vocabulary]"""
    log_p = batch.real_tokens(logits.flatten(0, 1)).to(torch.float32).log_softmax(1)
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
