"""What each part of the method is worth: KL to the float model on held-out text, as a share of plain rounding's.

python -m benchmarks.ablation                                            the demonstration model
python -m benchmarks.ablation --model DIR --text FILE --group-size 32    another one

--only VARIANT ... measures these rows, and keeps the others as results/ has them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from awq_hf import pipeline
from awq_hf.affine import choose_grid, fake_quantize
from awq_hf.block import BlockWork
from awq_hf.calibration.stream import Call
from awq_hf.folding import FoldPoint
from awq_hf.transforms.awq_scale import Loss
from benchmarks.common import Subject, publish, quiet, read

NEAREST: dict[str, Any] = dict(rounding="nearest", correction=False, stream="float")
PLAIN, DEFAULT = "plain rounding", "scale + clip + descent + correction + residual (default)"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: dict(scale=False, clip=False, **NEAREST),
    "scale": dict(clip=False, **NEAREST),
    "scale, module-output loss": dict(clip=False, **NEAREST),
    "clip": dict(scale=False, **NEAREST),
    "scale + clip": NEAREST,
    "scale + clip, module-output loss": NEAREST,
    "clip + GPTQ, float stream": dict(scale=False, rounding="gptq", correction=False, stream="float"),
    "scale + clip + GPTQ, float stream": dict(rounding="gptq", correction=False, stream="float"),
    "scale + clip + GPTQ": dict(rounding="gptq", correction=False),
    "scale + clip + descent": dict(correction=False),
    "scale + clip + GPTQ + correction": dict(rounding="gptq", residual=False),
    "clip + descent + correction": dict(scale=False, residual=False),
    "scale + descent + correction": dict(clip=False, residual=False),
    "scale + clip + descent + correction, no shrinkage": dict(shrinkage=0.0, residual=False),
    "scale + clip + descent + correction": dict(residual=False),
    DEFAULT: {},
}


class ModuleOutputWork(BlockWork):
    """Searches scales with the loss of the paper's code: the output of the module around the consumers (attention, MLP)."""

    def run_float(self, calls: Sequence[Call]) -> list[Any]:
        self.calls = calls[:2]
        return super().run_float(calls)

    def _scale_loss(self, fold: FoldPoint) -> Loss:
        parent = fold.consumers[0].rpartition(".")[0] if len(fold.consumers) > 1 else fold.consumers[0]
        module = self.block.get_submodule(parent)
        recorded = [self._parent_call(module, call) for call in self.calls]
        wanted = [module(*args, **kwargs) for args, kwargs in recorded]

        @torch.no_grad()
        def loss(scales: Tensor) -> float:
            kept = {name: self.linears[name].weight.data for name in fold.consumers}
            for name, weight in kept.items():
                smoothed = weight.float() * scales
                rounded = fake_quantize(smoothed, choose_grid(smoothed, self.specs[name])) / scales
                self.linears[name].weight.data = rounded.to(weight.dtype)
            error = sum(
                float((_first(module(*args, **kwargs)).float() - _first(out).float()).pow(2).sum())
                for (args, kwargs), out in zip(recorded, wanted, strict=True)
            )
            for name, weight in kept.items():
                self.linears[name].weight.data = weight
            return error

        return loss

    @torch.no_grad()
    def _parent_call(self, module: nn.Module, call: Call) -> Call:
        recorded: list[Call] = []
        handle = module.register_forward_pre_hook(lambda _m, args, kwargs: recorded.append((args, kwargs)), with_kwargs=True)
        self.block(*call[0], **call[1])
        handle.remove()
        return recorded[0]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    quiet()
    subject = Subject.from_directory(options.model, options.text) if options.model else Subject.packaged()
    original = subject.load()
    cases = [(4, options.group_size), (3, options.group_size), (2, min(64, options.group_size))]
    result = f"ablation_{subject.name}"
    rows = {} if len(options.only) == len(VARIANTS) else {row["variant"]: row for row in read(result)}
    plain: dict[tuple[int, int], float] = {}
    for name in dict.fromkeys([PLAIN, *options.only]):
        variant = VARIANTS[name]
        loop = functools.partial(pipeline.BlockLoop, make_work=ModuleOutputWork if "module-output" in name else BlockWork)
        row: dict[str, Any] = {"variant": name}
        for bits, group_size in cases:
            with mock.patch.object(pipeline, "BlockLoop", loop):
                model = subject.load(subject.config(bits=bits, group_size=group_size, **variant))
            kl = subject.measure(model, original).kl
            assert kl is not None
            row[f"{bits} bits g{group_size}"] = kl / plain.setdefault((bits, group_size), kl)
        row["seconds"] = model.awq_report.seconds["total"]
        rows[name] = row
        print(row, flush=True)
    title = f"{subject.name}: KL as a share of plain rounding's, 64 x 256 calibration tokens"
    publish(result, title, [rows[name] for name in VARIANTS if name in rows])


if __name__ == "__main__":
    main()
