"""The folds of a model, found with the weights of one block of each kind: no other block is read.

The same experiments as in a run, on random tokens in place of calibration text. A later block gets what an earlier one put
out, as if those between them were not there: folds are verified for any input that wakes the block's channels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from awq_hf.blocks import block_signature, experts_of, find_blocks, matrices_of, routers_of
from awq_hf.calibration.data import Batch
from awq_hf.calibration.stream import BlockStream
from awq_hf.classes import positions_of
from awq_hf.folding import BlockProbe, FoldPoint, discover
from awq_hf.matrices import as_linear
from awq_hf.parallel import one_thread_each
from awq_hf.pipeline import PROBE_TOKENS, Progress
from awq_hf.preflight import Plan
from awq_hf.streaming import load_float


@dataclass(frozen=True)
class BlockFolds:
    """What the probe of one block found. groups: Linears that share an input, in order of execution; not_run_once: others -> why they
    stay in float; seconds: the probe's time."""

    index: int
    groups: list[tuple[str, ...]]
    not_run_once: dict[str, str]
    folds: list[FoldPoint]
    seconds: float

    def producer_of(self, linear: str) -> str | None:
        return next((fold.producer for fold in self.folds if linear in fold.consumers), None)


def find_folds(
    directory: Path, empty: Any, plan: Plan, dtype: torch.dtype, device: str, progress: Progress | None
) -> tuple[dict[Any, BlockFolds], dict[int, str]]:
    """Probe one block of each signature. empty: the model on the meta device.

    Returns signature -> what was found, and block -> why its probe failed, which it may do when it needs what other blocks compute.
    """
    prefix, blocks = find_blocks(empty)
    first = {block_signature(block): i for i, block in reversed(list(enumerate(blocks)))}
    signatures = {i: signature for signature, i in sorted(first.items(), key=lambda item: item[1])}
    model, source = load_float(type(empty), directory, dtype=dtype, device_map=device)
    model.eval()
    stream = BlockStream(model, model.get_submodule(prefix), [_random_batch(model)])
    found, failed = {}, {}
    for index, signature in progress(signatures.items(), desc="Looking for folds", unit="block") if progress else signatures.items():
        source.load(index)
        try:
            with one_thread_each():  # as in a run
                found[signature] = _probe(stream, index, any(name.startswith(f"{prefix}.{index}.") for name in plan.experts))
        except Exception as error:  # raised by the model's own code
            failed[index] = f"{type(error).__name__}: {error}"
    return found, failed


def _random_batch(model: Any) -> Batch:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(PROBE_TOKENS, positions_of(model.config) or PROBE_TOKENS)
    return Batch(torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)), None, held_out=False)


def _probe(stream: BlockStream, index: int, with_experts: bool) -> BlockFolds:
    began, block = time.perf_counter(), stream.blocks[index]
    calls = stream.calls(index)
    matrices = matrices_of(block)
    for name, module in matrices.items():
        block.set_submodule(name, as_linear(module))  # as in a run
    probe = BlockProbe(block, *calls[0], matrices | (experts_of(block) | routers_of(block) if with_experts else {}))
    folds = discover(probe)
    stream.advance(index, calls)
    return BlockFolds(index, probe.groups_run_once(), probe.not_run_once(), folds, time.perf_counter() - began)
