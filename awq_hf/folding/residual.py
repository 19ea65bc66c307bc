"""What a Linear's output is added to: found by experiment, like folds, on one forward of the block.

The inputs of all modules are watched. The output y of a Linear is added to r, an input that was there before the Linear ran, if a later
input or an output of the block is

    t = r + c y

number by number, with one factor c for all of them. Nothing else is asked, so that blocks whose norm comes first or last and models that
multiply what a branch puts out (Granite) are all one; where a norm or a gate lies in between, or where branches run side by side and more
than one of them is added, no such r is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awq_hf.folding.probe import BlockProbe

SHARE = 1e-3  # of each token's c y, that t - r may differ from it: float32 rounds t, and what is not a sum is off by its whole share


@dataclass(frozen=True)
class Residual:
    """The first input of the module `source`, "" for the block itself, which a Linear's output times `factor` is added to."""

    source: str
    factor: float


@dataclass(frozen=True)
class _Seen:
    """A tensor at the time when a module got it (source), or the block put it out (None). values: a copy, [tokens, channels]."""

    source: str | None
    tensor: Tensor
    values: Tensor

    @classmethod
    def of(cls, source: str | None, tensor: Tensor) -> _Seen:
        return cls(source, tensor, tensor.reshape(-1, tensor.shape[-1]).clone())

    @property
    def was_kept(self) -> bool:
        """Whether nothing else has been written into it since."""
        return torch.equal(self.tensor.reshape(self.values.shape), self.values)


def find_residuals(probe: BlockProbe, names: Iterable[str]) -> dict[str, Residual]:
    """Linear -> what its output is added to, for those of the named Linears where that is found. Each of them runs once."""
    seen, places, outputs = _watched_forward(probe, list(names))
    times = [each.source for each in seen]
    found = {}
    for name, y in outputs.items():
        began, ended = places[name]
        earlier, later = ([each for each in part if each.values.shape == y.shape] for part in (seen[:began], seen[ended:]))
        earlier = [each for each in earlier if each.was_kept and times.count(each.source) == 1]
        sums = ((r.source, _factor(t.values - r.values, y)) for t in later for r in earlier)
        match = next(((source, factor) for source, factor in sums if source is not None and factor is not None), None)
        if match is not None:
            found[name] = Residual(*match)
    return found


def _watched_forward(probe: BlockProbe, names: list[str]) -> tuple[list[_Seen], dict[str, tuple[int, int]], dict[str, Tensor]]:
    """What was seen, in order; Linear -> how many of these when it began, its own input included, and when it ended; what it put out."""
    seen: list[_Seen] = []
    places: dict[str, tuple[int, int]] = {}
    outputs: dict[str, Tensor] = {}

    def on_input(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = next(iter((*args, *kwargs.values())), None)
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
                seen.append(_Seen.of(name, value))
            places[name] = (len(seen), 0)

        return hook

    def on_output(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: Any, _args: Any, output: Tensor) -> None:
            places[name] = (places[name][0], len(seen))
            outputs[name] = output.reshape(-1, output.shape[-1]).clone()

        return hook

    modules = dict(probe.block.named_modules())
    handles = [module.register_forward_pre_hook(on_input(name), with_kwargs=True) for name, module in modules.items()]
    handles += [modules[name].register_forward_hook(on_output(name)) for name in names]
    try:
        seen += [_Seen.of(None, tensor) for tensor in probe.run().output if tensor.ndim > 1]
    finally:
        for handle in handles:
            handle.remove()
    return seen, places, outputs


def _factor(difference: Tensor, y: Tensor) -> float | None:
    """c where difference = c y for every token, [tokens, channels], and c is not 0."""
    energy = float(y.square().sum(dtype=torch.float64))
    c = float((difference * y).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
    close = (difference - c * y).norm(dim=1) <= SHARE * abs(c) * y.norm(dim=1)
    return c if c and bool(close.all()) else None
