"""Paused forwards: each call is computed once, with the weights that are in place when it gets there."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from awq_hf.calibration.paused import PausedForwards, _Forward
from awq_hf.calibration.stream import capture_inputs
from awq_hf.parallel import one_thread_each


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, *, shift: Tensor) -> tuple[Tensor, str]:
        inner = torch.tanh(self.first(hidden + shift))
        if mask is not None:
            inner = inner * mask[..., None]
        return hidden + self.second(inner), "not a tensor"


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def test_paused_forwards_see_the_weights_that_were_put_in_meanwhile(block: Block) -> None:
    hidden, shift = [torch.randn(2, 5, 8) for _ in range(3)], {"shift": torch.tensor(1.0)}
    ran: list[str] = []
    handle = block.first.register_forward_hook(lambda *_: ran.append("first"))
    with PausedForwards(block, [((h,), shift) for h in hidden], ["first", "second"]) as forwards:
        first = forwards.inputs("first")
        assert all(x is not None and torch.equal(x, (h + 1).view(10, 8)) for x, h in zip(first, hidden, strict=True)) and not ran
        with torch.no_grad():
            block.first.weight.mul_(2)
        second = forwards.inputs("second")
        with torch.no_grad():
            block.second.weight.mul_(3)
        outputs = forwards.outputs()
    assert len(ran) == 3, "every call is computed once"
    handle.remove()
    for h, x, output in zip(hidden, second, outputs, strict=True):
        ((expected, whole),) = capture_inputs(block, [((h,), shift)], ["second"])
        assert x is not None and torch.equal(x, expected["second"]) and torch.equal(output[0], whole[0])
    assert not block.first._forward_pre_hooks and not block.second._forward_pre_hooks


def test_inputs_of_modules_that_ran_before_are_kept_until_the_call_ends(block: Block) -> None:
    hidden, shift = [torch.randn(2, 5, 8) for _ in range(3)], {"shift": torch.tensor(1.0)}
    with PausedForwards(block, [((h,), shift) for h in hidden], ["second"], kept=["", "first", "second"]) as forwards:
        second = forwards.inputs("second")
        for name, expected in (("", hidden), ("first", [h + 1 for h in hidden]), ("second", second)):
            assert all(torch.equal(x, e.view(10, -1)) for x, e in zip(forwards.kept(name), expected, strict=True))
        with pytest.raises(KeyError):
            forwards.kept("unused")
        forwards.outputs()
        assert forwards.kept("first") == [None] * 3
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_paused_forwards_end_with_an_error(block: Block) -> None:
    calls = [((torch.randn(1, 2, 8),), {"shift": torch.tensor(0.0)}) for _ in range(2)]
    with pytest.raises(KeyError), PausedForwards(block, calls, ["first", "second"]) as forwards:
        forwards.inputs("first")
        raise KeyError
    assert not any(linear._forward_pre_hooks for linear in block.modules())
    assert not any(isinstance(thread, _Forward) for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="first ran where second was expected"), PausedForwards(block, calls, ["first"]) as forwards:
        forwards.inputs("second")


def test_paused_forwards_skip_what_does_not_run(block: Block) -> None:
    calls = [((torch.randn(1, 2, 8),), {"shift": torch.tensor(0.0)})]
    with PausedForwards(block, calls, ["unused"]) as forwards:
        assert forwards.inputs("unused") == [None]
        assert len(forwards.outputs()) == 1


def test_an_error_in_a_forward_is_raised_and_ends_the_others(block: Block) -> None:
    calls = [((torch.randn(1, 2, 8),), {"shift": torch.tensor(0.0)}), ((torch.randn(1, 2, 9),), {"shift": torch.tensor(0.0)})] * 2
    with pytest.raises(RuntimeError, match="mat1 and mat2"), PausedForwards(block, calls, ["second"]) as forwards:
        forwards.inputs("second")
    assert not any(isinstance(thread, _Forward) for thread in threading.enumerate())


def test_as_many_forwards_compute_at_once_as_there_are_workers(block: Block) -> None:
    """All can wait at once; while one computes, no more than the workers do."""
    computing, most, lock = 0, 0, threading.Lock()

    def enters(*_: object) -> None:
        nonlocal computing, most
        with lock:
            computing, most = computing + 1, max(most, computing + 1)
        threading.Event().wait(0.01)
        with lock:
            computing -= 1

    handle = block.register_forward_pre_hook(enters)
    calls = [((torch.randn(1, 2, 8),), {"shift": torch.tensor(0.0)}) for _ in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread_each(), PausedForwards(block, calls, ["first"]) as forwards:
            assert all(x is not None for x in forwards.inputs("first"))
    finally:
        torch.set_num_threads(before)
        handle.remove()
    assert 2 <= most <= 3
