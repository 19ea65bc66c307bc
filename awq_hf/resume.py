"""Blocks that are finished are kept on disk, so that a run that broke can go on where it was.

A block's file holds what its quantization made of it: packed integers, and every other parameter as folding left it. The run that goes
on computes with just these, so its result is that of a run that nothing interrupted, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from awq_hf.affine import dequantize_weight
from awq_hf.block import BlockWork
from awq_hf.calibration.stream import Call
from awq_hf.linear import pack_weight, unpack_weight
from awq_hf.parallel import in_parallel
from awq_hf.products import run
from awq_hf.report import LayerReport, Report

RUN = "run.json"
PARTS = ("qweight", "qzeros", "scales")


class KeptBlocks:
    """The finished blocks of a run, in a directory of their own."""

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        """run: all that the result depends on but the weights. Raises ValueError for a directory that another run's blocks are in."""
        self.directory = directory
        self.run = run = json.loads(json.dumps(run))
        file = directory / RUN
        if not file.is_file():
            return
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); remove {directory} to begin anew") from error
        if differing := list(_differences(other, run)):
            raise ValueError(
                f"{directory} holds blocks of another run ({'; '.join(differing)}); repeat that run's options, or remove the directory to "
                "begin anew"
            )

    def save(self, index: int, digest: str, work: BlockWork, report: Report) -> None:
        """Keep a block that is rounded, but not yet replaced. digest: of what it was."""
        self._begin()
        file = self._file(index)
        partial = file.with_suffix(".partial")
        save_file(_state(work), partial, metadata={"digest": digest, "report": json.dumps(report.to_dict())})
        partial.replace(file)

    def _begin(self) -> None:
        """Write what run the directory is of, which nothing is written into before there is a block to keep."""
        file = self.directory / RUN
        if not file.is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(self.run, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)

    def restore(self, index: int, digest: str, work: BlockWork, report: Report) -> bool:
        """Bring a block, and the report, to where they were when it was saved; False if it is not there.

        Raises ValueError if it was made of other weights, or is damaged.
        """
        file = self._file(index)
        if not file.is_file():
            return False
        try:
            with safe_open(file, "pt") as opened:
                about, state = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); remove it, and what comes after it, to go on from there") from error
        if about["digest"] != digest:
            raise ValueError(f"{file} was made of other weights than {work.name} has now; remove {self.directory} to begin anew")
        _load(work, state)
        found = json.loads(about["report"])
        report.layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in found["layers"]]
        report.left_in_float, report.notes = found["left_in_float"], found["notes"]
        report.seconds = found["seconds"]
        work.layers = {layer.name: layer for layer in report.layers if layer.name.startswith(f"{work.name}.")}
        return True

    def _file(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """What is not the same in two descriptions of a run, each by its name: recipe.spec.bits was 4 and is 3."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield f"{name} was {was!r} and is {now!r}"


def digest_of(block: nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(block.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def run_again(work: BlockWork, calls: Sequence[Call]) -> list[Any]:
    """What a restored block puts out: its Linears hold the dequantized weights."""
    return in_parallel(lambda call: run(work.block, *call[0], **call[1]), calls)


def _state(work: BlockWork) -> dict[str, Tensor]:
    packed = {f"{name}.weight" for name in work.quantized}
    packed |= {f"{name}.{parameter}" for name, experts in work.experts.items() for parameter in experts.packed}
    found = {f"float.{name}": tensor for name, tensor in work.block.state_dict().items() if name not in packed}
    for name, weight in work.quantized.items():
        found |= {f"linear.{name}.{part}": tensor for part, tensor in pack_weight(weight).items()}
    for name, experts in work.experts.items():
        for parameter, weights in experts.packed.items():
            found |= {f"experts.{name}.{parameter}.{part}": torch.stack([weight[part] for weight in weights]) for part in PARTS}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def _load(work: BlockWork, state: dict[str, Tensor]) -> None:
    for name, tensor in work.block.state_dict().items():
        if (kept := state.get(f"float.{name}")) is not None:
            tensor.copy_(kept)
    for name, linear in work.linears.items():
        if f"linear.{name}.{PARTS[0]}" in state:
            packed = {part: state[f"linear.{name}.{part}"].to(linear.weight.device) for part in PARTS}
            work.quantized[name] = unpack_weight(**packed, spec=work.specs[name])
            linear.weight.data.copy_(dequantize_weight(work.quantized[name]))
    for name, experts in work.experts.items():
        for parameter, spec in experts.specs.items():
            stacked = [state[f"experts.{name}.{parameter}.{part}"] for part in PARTS]
            into = experts.module.get_parameter(parameter).data
            for expert, parts in enumerate(zip(*stacked, strict=True)):
                weight = {part: tensor.to(into.device) for part, tensor in zip(PARTS, parts, strict=True)}
                experts.packed[parameter].append(weight)
                into[expert].copy_(dequantize_weight(unpack_weight(**weight, spec=spec)))
