"""Running a model block by block on the calibration windows.

To call block k, the model's own forward runs with the blocks before it stubbed out: block k - 1 answers with its
recorded output, and block k records its arguments and stops the forward. Masks, rotary tables and whatever else happens
between blocks are thus the model's own code, exact for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from awq_hf.calibration.data import Batch

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward whose remaining part is not needed."""


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    had = module.__dict__.get("forward")  # accelerate keeps its own forward there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if had is not None:
            module.forward = had


@dataclass
class BlockStream:
    """One pass of hidden states through the blocks: what every window looks like before the next block.

    Two of them run side by side: one through the float blocks, one through the quantized ones.
    """

    model: nn.Module
    blocks: nn.ModuleList
    batches: Sequence[Batch]
    outputs: list[Any] | None = None  # of the block before the next one, one entry a batch

    def fork(self) -> BlockStream:
        return BlockStream(self.model, self.blocks, self.batches, self.outputs)

    @torch.no_grad()
    def calls(self, index: int) -> list[Call]:
        """The arguments with which the model calls block `index`, one call a batch."""
        return [self._call(index, i, batch) for i, batch in enumerate(self.batches)]

    def _call(self, index: int, position: int, batch: Batch) -> Call:
        recorded: list[Call] = []

        def record(*args: Any, **kwargs: Any) -> None:
            recorded.append((args, kwargs))
            raise _Stop

        def stub(*_args: Any, **_kwargs: Any) -> Any:
            return self.outputs[position]  # type: ignore[index]

        with ExitStack() as replaced:
            for block in self.blocks[:index]:
                replaced.enter_context(_replaced_forward(block, stub))
            replaced.enter_context(_replaced_forward(self.blocks[index], record))
            device = next(p.device for p in self.model.parameters())
            mask = None if batch.mask is None else batch.mask.to(device)
            with suppress(_Stop):
                self.model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
        return recorded[0]

    @torch.no_grad()
    def advance(self, index: int, calls: Sequence[Call]) -> None:
        """Run block `index` on its calls and keep what it returns."""
        self.outputs = [self.blocks[index](*args, **kwargs) for args, kwargs in calls]


@contextmanager
def _hooks(block: nn.Module, names: Sequence[str], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call seen(name, input [tokens, in]) whenever one of the named Linears is about to run."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen(name, args[0].reshape(-1, args[0].shape[-1]))

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capture_inputs(block: nn.Module, call: Call, names: Sequence[str]) -> tuple[dict[str, Tensor], Any]:
    """The inputs of the named Linears during one call, [tokens, in] each, and what the block returned."""
    inputs: dict[str, Tensor] = {}
    with _hooks(block, names, inputs.__setitem__):
        output = block(*call[0], **call[1])
    return inputs, output


class PausedForwards:
    """The calls of one block, each stopped at the input of every named Linear, so that it can be quantized before it runs.

    Later Linears thus see what the quantized ones before them put out, and every call is computed once. Each call is a
    greenlet: a function that can be left in the middle and gone on with. Use as a context manager, for the hooks.
    """

    def __init__(self, block: nn.Module, calls: Sequence[Call], names: Sequence[str]) -> None:
        self._block, self._names = block, names
        self._main = greenlet.getcurrent()
        self._forwards = [greenlet.greenlet(lambda args=args, kwargs=kwargs: block(*args, **kwargs)) for args, kwargs in calls]
        self._reached: list[Any] = [None] * len(calls)  # (name, input) where the call is paused, or what it returned

    def __enter__(self) -> PausedForwards:
        self._context = ExitStack()
        self._context.enter_context(torch.no_grad())
        self._context.enter_context(_hooks(self._block, self._names, lambda name, x: self._main.switch((name, x))))
        return self

    def __exit__(self, *_exception: object) -> None:
        for forward in self._forwards:
            if not forward.dead:
                forward.throw()  # ends it
        self._context.close()

    def inputs(self, name: str) -> Iterator[Tensor | None]:
        """The input [tokens, in] of the Linear `name` in every call; None where a call does not run it.

        Linears are asked for in the order in which they run.
        """
        for i, forward in enumerate(self._forwards):
            if not forward.dead:
                self._reached[i] = forward.switch()
            yield None if forward.dead else self._at(i, name)

    def _at(self, i: int, name: str) -> Tensor:
        reached, x = self._reached[i]
        if reached != name:
            raise RuntimeError(f"{reached} ran where {name} was expected: the block's order of execution changes between calls")
        return x

    def outputs(self) -> list[Any]:
        """Let every call run to its end; what the block returned for each."""
        for i, forward in enumerate(self._forwards):
            while not forward.dead:
                self._reached[i] = forward.switch()
        return self._reached
