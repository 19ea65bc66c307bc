"""Forwards of a block that stand still at the inputs of its Linears, until those have been quantized."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from awq_hf.calibration.stream import Call, input_hooks
from awq_hf.parallel import workers
from awq_hf.products import run


class PausedForwards:
    """The calls of one block, each stopped at the input of every named Linear, so that it can be quantized before it runs.

    Later Linears thus see what the quantized ones before them put out, and every call is computed once. Each call is a thread
    that waits most of the time; as many compute at once as there are workers. Use as a context manager, which ends them.
    """

    def __init__(
        self, block: nn.Module, calls: Sequence[Call], names: Sequence[str], routed: Collection[str] = (), kept: Collection[str] = ()
    ) -> None:
        """names: where to stop; routed: see `input_hooks`; kept: modules whose inputs `kept` is to be asked for."""
        self._block, self._names, self._routed, self._kept = block, names, routed, kept
        turns = threading.Semaphore(workers())
        self._forwards = [_Forward(partial(run, block, *args, **kwargs), turns) for args, kwargs in calls]

    def __enter__(self) -> PausedForwards:
        self._hooks = ExitStack()
        self._hooks.enter_context(input_hooks(self._block, [*dict.fromkeys([*self._names, *self._kept])], self._seen, self._routed))
        for forward in self._forwards:
            forward.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        for forward in self._forwards:
            forward.end()
        self._hooks.close()

    def _seen(self, name: str, x: Any) -> None:
        forward = _Forward.current()
        if name in self._kept:
            forward.kept[name] = x
        if name in self._names:
            forward.pause((name, x))

    def kept(self, name: str) -> list[Any]:
        """The input [tokens, channels] of the module `name`, which ran before the place where the calls stand; None for one at its end."""
        return [None if forward.done else forward.kept[name] for forward in self._forwards]

    def inputs(self, name: str) -> list[Any]:
        """The input [tokens, in] of the Linear `name` (see `input_hooks`) in every call; None where a call does not run it.

        Linears are asked for in the order in which they run.
        """
        self._advance()
        return [None if forward.done else self._at(forward, name) for forward in self._forwards]

    def _at(self, forward: _Forward, name: str) -> Any:
        reached, x = forward.reached
        if reached != name:
            raise RuntimeError(f"{reached} ran where {name} was expected: the block's order of execution changes between calls")
        return x

    def outputs(self) -> list[Any]:
        """Let every call run to its end; what the block returned for each."""
        while not all(forward.done for forward in self._forwards):
            self._advance()
        return [forward.reached for forward in self._forwards]

    def _advance(self) -> None:
        """Let every call go on to its next pause, or to its end."""
        going = [forward for forward in self._forwards if not forward.done]
        for forward in going:
            forward.resume()
        for forward in going:
            forward.wait()


class _Ended(Exception):
    """Unwinds a forward whose remaining part is not needed."""


class _Forward(threading.Thread):
    """A function that stands still where it calls `pause`, until it is resumed. It computes only while it holds a turn.

    reached: what it handed over at the last pause, or its result when it is done. kept: what it leaves for others to see until then.
    """

    def __init__(self, function: Callable[[], Any], turns: threading.Semaphore) -> None:
        super().__init__(name="awq_hf forward", daemon=True)
        self._function, self._turns = function, turns
        self._resumed: SimpleQueue[bool] = SimpleQueue()
        self._events: SimpleQueue[tuple[bool, Any, BaseException | None]] = SimpleQueue()
        self.done, self.reached = False, None  # type: tuple[bool, Any]
        self.kept: dict[str, Any] = {}

    @staticmethod
    def current() -> _Forward:
        thread = threading.current_thread()
        assert isinstance(thread, _Forward)
        return thread

    # In the thread

    def run(self) -> None:
        result, error = None, None
        try:
            self._wait_for_turn()
            with torch.no_grad():
                result = self._function()
        except BaseException as raised:  # handed over to whoever waits
            error = raised
        self.kept.clear()
        self._turns.release()
        self._events.put((True, result, error))

    def pause(self, value: Any) -> None:
        self._turns.release()
        self._events.put((False, value, None))
        del value  # a large tensor
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        goes_on = self._resumed.get()
        self._turns.acquire()
        if not goes_on:
            raise _Ended

    # Outside of it

    def resume(self) -> None:
        self.reached = None
        self._resumed.put(True)

    def wait(self) -> None:
        self.done, self.reached, error = self._events.get()
        if error is not None:
            raise error

    def end(self) -> None:
        if self.is_alive():
            self._resumed.put(False)
            self.join()
        self.reached = None
