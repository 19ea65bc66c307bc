"""The block stream: what it feeds a block is exactly what the model itself feeds it, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq_hf.calibration.data import Batch, Windows
from awq_hf.calibration.stream import BlockStream, capture_inputs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, *, shift: Tensor) -> tuple[Tensor, str]:
        inner = torch.tanh(self.first(hidden + shift))
        if mask is not None:
            inner = inner * mask[..., None]
        return hidden + self.second(inner), "not a tensor"


class Decoder(nn.Module):
    """Between its blocks it does what a stream could not guess: a doubling, and an argument that differs from block to block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.few = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> Tensor:
        assert not use_cache
        hidden: Tensor = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            hidden = 2 * layer(hidden, attention_mask, shift=torch.tensor(float(i)))[0]
        return hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.vision = Decoder(), nn.ModuleList([nn.Linear(64, 64)])  # larger than the decoder's blocks

    def get_decoder(self) -> nn.Module:
        return self.model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def some_batches() -> list[Batch]:
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    return Windows(ids, torch.tensor([6, 4, 6]), "").batches(2, hold_out=False)


def calls_of(model: Model, batch: Batch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of every block during the model's own forward."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_every_block_gets_what_the_model_gives_it(model: Model) -> None:
    batches = some_batches()
    stream = BlockStream(model, model.model.layers, batches)
    expected = [calls_of(model, batch) for batch in batches]
    for index in range(3):
        calls = stream.calls(index)
        for batch_calls, (args, kwargs), batch in zip(expected, calls, batches, strict=True):
            (true_args, true_kwargs) = batch_calls[index]
            assert torch.equal(args[0], true_args[0]) and torch.equal(kwargs["shift"], true_kwargs["shift"])
            assert (args[1] is None) == (batch.mask is None) and (batch.mask is None or torch.equal(args[1], batch.mask))
        stream.advance(index, calls)
    assert stream.outputs is not None
    for output, batch in zip(stream.outputs, batches, strict=True):
        with torch.no_grad():
            assert torch.equal(2 * output[0], model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False))
        assert output[1] == "not a tensor" and not output[0].requires_grad


def test_forks_go_their_own_ways(model: Model) -> None:
    stream = BlockStream(model, model.model.layers, some_batches())
    stream.advance(0, stream.calls(0))
    fork = stream.fork()
    before = stream.calls(1)
    fork.advance(1, fork.calls(1))
    assert stream.outputs is not None and fork.outputs is not None
    assert not torch.equal(stream.outputs[0][0], fork.outputs[0][0])
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(before, stream.calls(1), strict=True))


def test_the_model_is_left_as_it_was(model: Model) -> None:
    own = model.model.layers[0].forward
    model.model.layers[0].forward = own  # as accelerate's hooks do
    stream = BlockStream(model, model.model.layers, some_batches())
    stream.advance(0, stream.calls(0))
    stream.calls(2)
    assert model.model.layers[0].__dict__["forward"] is own
    assert all("forward" not in block.__dict__ for block in list(model.model.layers)[1:])


def test_an_error_in_the_model_passes_through_and_leaves_nothing_behind(model: Model) -> None:
    batch = Batch(torch.tensor([[25, 26]]), None, held_out=False)  # beyond the vocabulary
    with pytest.raises(IndexError):
        BlockStream(model, model.model.layers, [batch]).calls(1)
    assert all("forward" not in block.__dict__ for block in model.model.layers)


def test_captured_inputs_are_flattened(model: Model) -> None:
    block = model.model.layers[1]
    assert isinstance(block, Block)
    hidden = torch.randn(2, 5, 8)
    ((inputs, output),) = capture_inputs(block, [((hidden,), {"shift": torch.tensor(1.0)})], ["second", "first"])
    assert torch.equal(inputs["first"], (hidden + 1).view(10, 8)) and inputs["second"].shape == (10, 12)
    assert torch.equal(output[0], block(hidden, shift=torch.tensor(1.0))[0])
    assert not block.first._forward_pre_hooks and not block.second._forward_pre_hooks


def test_a_linear_that_does_not_run_has_no_input(model: Model) -> None:
    call = ((torch.randn(1, 3, 8),), {"shift": torch.tensor(0.0)})
    ((inputs, output),) = capture_inputs(model.model.layers[0], [call], ["first", "unused"])
    assert list(inputs) == ["first"] and output is not None


def ran(model: Model) -> tuple[BlockStream, list[str]]:
    """A stream whose blocks have run, and what was done for that."""
    done: list[str] = []
    stream = BlockStream(model, model.model.layers, some_batches())
    stream.run(lambda index: done.append(f"begin {index}"), lambda index: done.append(f"end {index}"))
    return stream, done


def test_what_the_model_puts_out_is_its_own(model: Model) -> None:
    stream, done = ran(model)
    assert done == [f"{what} {index}" for index in range(3) for what in ("begin", "end")]
    for position, batch in enumerate(stream.batches):
        with torch.no_grad():
            expected = model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
        assert torch.equal(stream.result(position), expected)


def test_inputs_of_what_is_behind_the_blocks_end_the_forward_there(model: Model) -> None:
    head, behind, decoder = nn.Identity(), nn.Identity(), model.model.forward
    model.model.forward = lambda **inputs: behind(head(decoder(**inputs)))  # type: ignore[method-assign]
    stream, _ = ran(model)
    expected = [batch.real_tokens(stream.result(i).flatten(0, 1)) for i, batch in enumerate(stream.batches)]
    behind.register_forward_pre_hook(lambda *_: pytest.fail("the forward went on"))
    found = list(stream.inputs_of(head))
    assert "forward" not in head.__dict__
    assert all(torch.equal(x, other) and not x.requires_grad for x, other in zip(found, expected, strict=True))


def test_a_module_that_the_model_does_not_call_has_no_inputs(model: Model) -> None:
    with pytest.raises(RuntimeError, match="the model does not call its ModuleList"):
        list(ran(model)[0].inputs_of(model.vision))
