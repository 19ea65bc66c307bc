"""A float model that runs on texts with one block's weights in memory at a time: each block takes all of them, then the next is loaded.

What is between blocks is the model's own code (calibration/stream.py). Whether that, called so, computes what the model does is tested on
the first batch, which runs through the whole model as well; where it does not (blocks that leave something behind for later ones, or run
twice), the weights stay in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.blocks import find_blocks
from awq_hf.calibration.data import Batch
from awq_hf.calibration.stream import BlockStream, calling_order, model_inputs
from awq_hf.products import run
from awq_hf.streaming import InMemory

COMPARED = 64  # tokens of the first batch
SAME = 0.05  # relative difference of their logits: more than sums in another order make of bfloat16, and less than a mistake

logger = logging.getLogger("awq_hf")


class BlockByBlock:
    """change(name, block): is called with every block, by its full name, when its weights are there."""

    def __init__(self, model: Any, source: InMemory, change: Callable[[str, nn.Module], None] | None = None) -> None:
        """Raises ValueError for a model without blocks."""
        self.model, self.source, self.change = model, source, change
        self.prefix, self.blocks = find_blocks(model)
        self.stream: BlockStream | None = None  # that has run
        self.whole = False  # all weights are in memory, for good
        self._changed: set[int] = set()

    def run(self, batches: Sequence[Batch], what: str, progress: Any = None) -> None:
        """Get ready for `logits` of these batches; what has been done for the same ones is used again. what: runs, for messages."""
        if self.whole or (self.stream is not None and _same(self.stream.batches, batches)):
            return
        self.stream = None
        order, result = calling_order(self.model, self.blocks, batches[0], self._load, lambda index, _output: self._unload(index))
        if order == list(range(len(self.blocks))):
            expected = _logits(result)[-COMPARED:].clone()
            del result  # a vocabulary is large
            stream = BlockStream(self.model, self.blocks, batches)
            stream.run(self._load, self._unload, progress, what)
            if _close(_logits(stream.result(0))[-COMPARED:], expected):
                self.stream = stream
                return
        logger.warning("the blocks of %s do not run one by one, so that all of its weights are loaded", what)
        for index in range(len(self.blocks)):
            self._load(index)
        self.whole = True

    @torch.no_grad()
    def logits(self, position: int, batch: Batch) -> Tensor:
        """Of the batch at `position` of those that `run` was given, [windows * seq_len, vocabulary]."""
        return _logits(run(self.model, **model_inputs(self.model, batch)) if self.stream is None else self.stream.result(position))

    def _load(self, index: int) -> None:
        self.source.load(index)
        if self.change is not None and index not in self._changed:
            self.change(f"{self.prefix}.{index}", self.blocks[index])
            self._changed.add(index)

    def _unload(self, index: int) -> None:
        self.source.unload(index)
        if self.source.later is not None:
            self._changed.discard(index)


def _logits(result: Any) -> Tensor:
    logits: Tensor = result.logits
    return logits.flatten(0, 1)


def _close(one: Tensor, other: Tensor) -> bool:
    """Also where they are not finite: who reads logits says so."""
    return not float((one - other).float().norm()) > SAME * float(other.float().norm())


def _same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return [_tokens(batch) for batch in one] == [_tokens(batch) for batch in other]


def _tokens(batch: Batch) -> tuple[list[list[int]], list[list[int]] | None]:
    return batch.input_ids.tolist(), None if batch.mask is None else batch.mask.tolist()
