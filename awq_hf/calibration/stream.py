"""Running a model block by block on the calibration windows.

To call block k, the model's own forward runs with the blocks before it stubbed out: block k - 1 answers with its
recorded output, and block k records its arguments and stops the forward. Masks, rotary tables and whatever else happens
between blocks are thus the model's own code, exact for every architecture.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.calibration.data import Batch
from awq_hf.parallel import in_parallel
from awq_hf.products import run

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward whose remaining part is not needed."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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
    last: list[Call] | None = None  # the calls of that block

    def fork(self) -> BlockStream:
        return BlockStream(self.model, self.blocks, self.batches, self.outputs, self.last)

    @torch.no_grad()
    def calls(self, index: int) -> list[Call]:
        """The arguments with which the model calls block `index`, one call a batch."""
        calls = [self.call_after(self._put_out(position), index, position) for position in range(len(self.batches))]
        for call, before in zip(calls, self.last or (), strict=self.last is not None):
            _carry_on(call, before)
        self.last = calls
        return calls

    def call_after(self, output: Any, index: int, position: int) -> Call:
        """The arguments with which the model calls block `index` for a batch, when the block before it put out `output`."""
        recorded: list[Call] = []

        def record(*args: Any, **kwargs: Any) -> None:
            recorded.append((args, kwargs))
            raise _Stop

        with self._stubbed(index, output), replaced_forward(self.blocks[index], record), suppress(_Stop):
            run(self.model, **model_inputs(self.model, self.batches[position]))
        return recorded[0]

    def run(
        self, begin: Callable[[int], None], end: Callable[[int], None], progress: Callable[..., Any] | None = None, what: str = ""
    ) -> None:
        """Run all blocks. begin, end: called before and after each, with its number; what: runs, for the progress bar."""
        numbers = range(len(self.blocks))
        for index in progress(numbers, desc=f"Running {what}", unit="block") if progress else numbers:
            begin(index)
            self.advance(index, self.calls(index))
            end(index)
        self.last = None

    @contextmanager
    def _stubbed(self, count: int, output: Any) -> Iterator[None]:
        """With the first `count` blocks out of the way: they answer with what the last of them put out."""

        def stub(*_args: Any, **_kwargs: Any) -> Any:
            return output

        with ExitStack() as replaced:
            for block in self.blocks[:count]:
                replaced.enter_context(replaced_forward(block, stub))
            yield

    def _put_out(self, position: int) -> Any:
        return None if self.outputs is None else self.outputs[position]

    @torch.no_grad()
    def result(self, position: int) -> Any:
        """What the model puts out for a batch, when all blocks have run."""
        return self.result_after(self._put_out(position), position)

    def result_after(self, output: Any, position: int) -> Any:
        """The same when the last block put out `output`."""
        with self._stubbed(len(self.blocks), output):
            return run(self.model, **model_inputs(self.model, self.batches[position]))

    def inputs_of(self, module: nn.Module) -> Iterator[Tensor]:
        """What the model hands to a module that it calls once, behind the blocks, the head: [tokens, in] of each batch, without padding.

        All blocks have run.
        """

        def stop(x: Tensor) -> None:
            raise _Stop(x)

        for position, batch in enumerate(self.batches):
            try:
                with replaced_forward(module, stop):
                    self.result(position)
            except _Stop as stopped:
                yield batch.real_tokens(stopped.args[0].flatten(0, -2))
            else:
                raise RuntimeError(f"the model does not call its {type(module).__name__}")

    def advance(self, index: int, calls: Sequence[Call]) -> None:
        """Run block `index` on its calls and keep what it returns."""
        self.outputs = in_parallel(lambda call: run(self.blocks[index], *call[0], **call[1]), calls)


def _carry_on(call: Call, before: Call) -> None:
    """Blocks may hand each other more than their output in a mapping (keys and values that later ones share): carry it along."""
    for name, value in call[1].items():
        if isinstance(value, MutableMapping) and isinstance(before[1].get(name), Mapping):
            value.update(before[1][name])


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The model's arguments for a batch. Encoders know no cache."""
    device = next((p.device for p in model.parameters() if not p.is_meta), batch.input_ids.device)  # meta: kept elsewhere until it runs
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": None if batch.mask is None else batch.mask.to(device),
    }
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inputs["use_cache"] = False
    return inputs


@torch.no_grad()
def calling_order(
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, begins: Callable[[int], None], ends: Callable[[int, Any], None]
) -> tuple[list[int], Any]:
    """The numbers of the blocks in the order in which the model calls them, and what it puts out. begins: called before each, with its
    number; ends: after it, with what it puts out as well."""
    order: list[int] = []

    def begin(index: int) -> None:
        order.append(index)
        begins(index)

    handles = [block.register_forward_pre_hook(lambda *_, index=index: begin(index)) for index, block in enumerate(blocks)]
    handles += [
        block.register_forward_hook(lambda _block, _args, output, index=index: ends(index, output)) for index, block in enumerate(blocks)
    ]
    try:
        result = run(model, **model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return order, result


@contextmanager
def input_hooks(block: nn.Module, names: Sequence[str], seen: Callable[[str, Any], None], routed: Collection[str] = ()) -> Iterator[None]:
    """Call seen(name, input [tokens, in]) whenever one of the named Linears is about to run.

    routed: those of them that are experts, for which it is (input, the experts of each token [tokens, k]).
    """

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            x = values[0].reshape(-1, values[0].shape[-1])
            if name in routed:
                x = (x, next(value for value in values[1:] if not value.is_floating_point()))
            seen(name, x)

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def capture_inputs(
    block: nn.Module, calls: Sequence[Call], names: Sequence[str], routed: Collection[str] = ()
) -> list[tuple[dict[str, Any], Any]]:
    """For each call: the inputs of the named Linears, [tokens, in] each (see `input_hooks`), and what the block returned."""
    current = threading.local()  # calls run side by side and share the hooks

    def one(call: Call) -> tuple[dict[str, Any], Any]:
        current.inputs = {}
        output = run(block, *call[0], **call[1])
        return current.inputs, output

    with input_hooks(block, names, lambda name, x: current.inputs.__setitem__(name, x), routed):
        return in_parallel(one, calls)
