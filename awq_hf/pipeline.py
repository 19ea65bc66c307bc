"""The block loop: one block after the other is probed, searched, rounded and replaced."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq_hf import unfinished
from awq_hf.block import BlockWork
from awq_hf.blocks import find_blocks
from awq_hf.calibration.data import Batch, Windows
from awq_hf.calibration.stream import BlockStream, calling_order
from awq_hf.freed import give_back
from awq_hf.machine import machine, versions
from awq_hf.parallel import one_thread_each
from awq_hf.preflight import Plan, check_calls, check_hidden_states, check_in_memory, check_weights, make_plan
from awq_hf.recipe import Recipe
from awq_hf.report import Report
from awq_hf.resume import KeptBlocks, digest_of, run_again
from awq_hf.streaming import InMemory
from awq_hf.untouched import StandIns, check_unchanged, versions_of

PROBE_TOKENS = 96  # of the first window: enough for every ReLU channel of a small block to wake up

Progress = Callable[..., Any]  # tqdm or a look-alike
MakeWork = Callable[..., BlockWork]  # takes BlockWork's arguments


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    windows: Windows,
    progress: Progress | None = None,
    keep_in: Path | None = None,
    source: InMemory | None = None,
) -> Report:
    """Replace the Linears of the model's decoder blocks by AwqLinear, in place; returns what happened to each.

    windows: calibration windows, already sampled. keep_in: a directory for finished blocks; those of an earlier run are taken from there,
    and it stays (awq_hf/resume.py). source: where the blocks' weights are, if they are not in memory. Raises ValueError before any work
    when a layer's shape does not fit, or weights are missing or damaged.
    """
    plan = make_plan(model, recipe)
    about = {"recipe": recipe.to_dict(), "calibration": _describe(windows), "versions": versions(), "model": type(model).__name__}
    kept = None if keep_in is None else KeptBlocks(keep_in, about)
    return BlockLoop(model, recipe, plan, windows, progress, kept=kept, source=source or InMemory()).run()


@dataclass
class BlockLoop:
    """The work on all blocks of a model. make_work: BlockWork, or what does something else with a block. kept: finished blocks of an
    earlier run. source: where the blocks' weights are. between: is called with the float model, whose embedding has been read for the float
    stream, and not yet for the quantized one.

    Who runs this says that the model is whole again (awq_hf/unfinished.py), when all that belongs to it is done.
    """

    model: nn.Module
    recipe: Recipe
    plan: Plan
    windows: Windows
    progress: Progress | None = None
    make_work: MakeWork = BlockWork
    kept: KeptBlocks | None = None
    source: InMemory = field(default_factory=InMemory)
    between: Callable[[Sequence[Batch], Report], None] | None = None

    def run(self) -> Report:
        """Do the work, and say what happened."""
        began, cpu_began = time.perf_counter(), time.process_time()
        self.report = Report(recipe=self.recipe.to_dict(), calibration=_describe(self.windows))
        self.report.left_in_float.update(self.plan.left_in_float)
        self.report.notes += self.windows.notes
        training = {name: module.training for name, module in self.model.named_modules()}  # by name: modules hold weights
        self.model.eval()
        try:
            with one_thread_each():
                self._run_blocks()
        finally:
            for name, module in self.model.named_modules():
                module.training = training.get(name, training[""])  # those that are new as the model
        self.report.notes += _few_tokens(self.report)
        _close(self.report, began, cpu_began, self.model)
        return self.report

    def _run_blocks(self) -> None:
        windows = self.windows
        self.prefix, self.blocks = find_blocks(self.model)
        self.batches = windows.batches(self.recipe.batch_size)
        probe_batch = Windows(windows.input_ids[:1, :PROBE_TOKENS], windows.lengths[:1].clamp(max=PROBE_TOKENS), "").batches(1, False)
        self._look_through(probe_batch[0])
        self.probe_stream = BlockStream(self.model, self.blocks, probe_batch)
        self.float_stream = BlockStream(self.model, self.blocks, self.batches)
        self.quantized_stream = self.float_stream.fork()
        self.known_folds: dict[Any, Any] = {}
        unfinished.begin(self.model)
        numbers = range(len(self.blocks))
        bar: Any = self.progress(numbers, desc="Quantizing", unit="block") if self.progress else numbers
        for index in bar:
            work = self._run_block(index)
            if self.progress:
                bar.set_postfix_str(work.loss_line())
            large = work.large
            del work  # with the float weights, and what it captured
            if large:
                give_back()

    def _look_through(self, batch: Batch) -> None:
        """Run the float model once, and raise ValueError for what would end the work in its middle: weights, what is computed with them,
        what else is done with them, or the order of the blocks."""
        stand_ins = StandIns()

        def begin(index: int) -> None:
            self.source.load(index)
            check_weights(self.model, self.plan, f"{self.prefix}.{index}")
            stand_ins.put(self.blocks[index], f"{self.prefix}.{index}.", self.plan.specs)

        def end(index: int, output: Any) -> None:
            stand_ins.take_back()
            self.source.unload(index)
            check_hidden_states(output, f"{self.prefix}.{index}")

        check_in_memory(self.model, self.source.later)
        before = versions_of(self.model)
        try:
            order, _ = calling_order(self.model, self.blocks, batch, begin, end)
        except (AttributeError, TypeError) as error:
            raise stand_ins.explain() or error from error
        finally:
            stand_ins.take_back()
        check_calls(order, self.prefix, self.blocks)
        check_unchanged(self.model, before, self.plan.specs)

    def _run_block(self, index: int) -> BlockWork:
        recipe, report, kept = self.recipe, self.report, self.kept
        self.source.load(index)
        digest = "" if kept is None else digest_of(self.blocks[index])
        work = self.make_work(
            f"{self.prefix}.{index}", self.blocks[index], recipe, self.plan.specs, self.batches, report, self.plan.experts
        )
        with report.timed("fold discovery"):
            probe_calls = self.probe_stream.calls(index)
            work.discover_folds(probe_calls[0], self.known_folds)
            self.probe_stream.advance(index, probe_calls)
        with report.timed("float stream"):
            float_calls = self.float_stream.calls(index)
        if index == 0 and self.between is not None:
            self.between(self.batches, report)
        with report.timed("float stream"):
            quantized_calls = self.quantized_stream.calls(index) if recipe.stream == "quantized" else []
            self.float_stream.outputs = work.run_float(float_calls)
        if kept is not None and kept.restore(index, digest, work, report):
            self.quantized_stream.outputs = run_again(work, quantized_calls)
        else:
            work.choose_scales()
            self.quantized_stream.outputs = work.round_groups(quantized_calls)
            if kept is not None:
                kept.save(index, digest, work, report)
        with report.timed("packing"):
            work.replace(probe_calls[0])
        return work


def _few_tokens(report: Report) -> list[str]:
    """What a person should know of experts that calibration hardly reached."""
    layers = [layer for layer in report.layers if layer.few_tokens and layer.name.endswith(("gate_up_proj", "gate_proj"))]
    if not layers:
        return []
    worst, few = max(layers, key=lambda layer: len(layer.few_tokens)), sum(len(layer.few_tokens) for layer in layers)
    return [
        f"{few} experts in {len(layers)} layers were sent fewer calibration tokens than a row of theirs has weights (most: "
        f"{worst.name.rpartition('.')[0]}, {len(worst.few_tokens)} of {worst.experts}) and were fitted to other tokens of their layer as "
        "well: more or other calibration text may reach them"
    ]


def _describe(windows: Windows) -> dict[str, Any]:
    return {"source": windows.source, "sha256": windows.sha256(), "windows": len(windows.input_ids), "tokens": windows.tokens}


def _close(report: Report, began: float, cpu_began: float, model: nn.Module) -> None:
    report.seconds["total"] = time.perf_counter() - began
    report.seconds["total, of all cores"] = time.process_time() - cpu_began
    report.versions = versions()
    report.peak_memory_bytes["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = next(model.parameters()).device
    report.machine = machine(device)
    if device.type == "cuda":
        report.peak_memory_bytes["device"] = torch.cuda.max_memory_allocated(device)
