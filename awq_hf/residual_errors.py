"""What the residual stream of a block lacks where its Linears' outputs are added: d = (r0 - r) / factor, in every batch.

r0 is the residual stream of the float model, r of the model as quantized so far, both of them where the output is added to it
(folding/residual.py). A Linear that puts out its float output plus d leaves no error behind, whatever the layers before it did.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awq_hf.calibration.data import Batch
from awq_hf.calibration.paused import PausedForwards
from awq_hf.folding import BlockProbe, find_residuals


class ResidualErrors:
    """Of some Linears of one block, none at first."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self._found: dict[str, tuple[str, float]] = {}  # Linear -> module whose input is the residual stream, factor
        self._float: dict[str, list[Tensor]] = {}  # Linear -> r0 of each batch, [tokens, out]

    def find(self, probe: BlockProbe, names: Iterable[str], experts: Collection[str] = ()) -> None:
        """Look for what the named Linears' outputs are added to. experts: modules of them, whose inputs are captured with their routes."""
        found = find_residuals(probe, names).items()
        self._found = {name: (residual.source, residual.factor) for name, residual in found if residual.source not in experts}

    @property
    def sources(self) -> list[str]:
        """Modules whose inputs are to be kept in both streams."""
        return [source for source, _ in self._found.values()]

    def keep_float(self, inputs: Sequence[Mapping[str, Any]]) -> None:
        """inputs: of the modules in the float block, for each batch, padding included. Where a source does not always run, it is no use."""
        self._found = {name: found for name, found in self._found.items() if all(found[0] in each for each in inputs)}
        for name, (source, _) in self._found.items():
            self._float[name] = [batch.real_tokens(each[source]) for batch, each in zip(self.batches, inputs, strict=True)]

    def before(self, name: str, forwards: PausedForwards) -> Iterator[Tensor | None]:
        """d of each batch, float32 [tokens, out], while the calls stand before the Linear `name`; None where nothing was found for it.

        To be asked for once: the float stream's part is let go.
        """
        if name not in self._found:
            yield from [None] * len(self.batches)
            return
        (source, factor), r0s = self._found[name], self._float.pop(name)
        for batch, r0, r in zip(self.batches, r0s, forwards.kept(source), strict=True):
            yield None if r is None else (r0.to(torch.float32) - batch.real_tokens(r).to(torch.float32)) / factor
