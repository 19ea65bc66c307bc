"""Exports that follow a quantization: what they are called, and what they will refuse, said before there is anything to export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from awq_hf import compat, renaming
from awq_hf.classes import empty_model, positions_of, read_config
from awq_hf.config import AwqConfig
from awq_hf.exporters.checkpoint import Checkpoint, Entry
from awq_hf.exporters.dense import DTYPES
from awq_hf.exporters.gptq import check_shape
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.exporters.refusals import transposed
from awq_hf.exporters.table import GGUF, TARGETS
from awq_hf.matrices import shape_of
from awq_hf.preflight import make_plan
from awq_hf.spec import QuantSpec

CHOICES = [name for name in (*TARGETS, GGUF) if name != "awq"]  # which is what a quantization writes


@dataclass(frozen=True)
class Target:
    """TARGET or TARGET:TYPE. type: of dense a dtype; of gguf what is made from the float weights, None for the codes of the checkpoint."""

    name: str
    type: str | None = None

    def __str__(self) -> str:
        return self.name if self.type is None else f"{self.name}:{self.type}"


def parse_targets(texts: Iterable[str]) -> list[Target]:
    """Raises ValueError for what does not exist, or is there twice."""
    targets: list[Target] = []
    for text in texts:
        name, _, kind = text.partition(":")
        if name == "awq":
            raise ValueError(f"--export {text}: AWQ is what OUT holds anyway; leave it out, or choose one of {', '.join(CHOICES)}")
        if name not in CHOICES:
            raise ValueError(f"--export {text}: there is no target {name!r}; choose one of {', '.join(CHOICES)}")
        if ":" in text:
            kind = _checked_type(name, kind)
        target = Target(name, kind or None)
        same = [other for other in targets if other == target or (name == other.name != GGUF)]
        if same:
            raise ValueError(f"--export {text}: {same[0]} is asked for already, and goes to the same place; leave one out")
        targets.append(target)
    return targets


def _checked_type(name: str, kind: str) -> str:
    if name == GGUF:
        from awq_hf.exporters.gguf.types import AUTO, check_name  # not above: most runs never need the gguf package

        found = check_name(kind)
        return "" if found == AUTO else found
    if name != "dense":
        raise ValueError(f"--export {name}:{kind}: {name} has no types, it holds the integers as they are; write --export {name}")
    if kind not in DTYPES:
        raise ValueError(f"--export dense:{kind}: {kind!r} is not known; choose one of {', '.join(DTYPES)}")
    return kind


def places(
    targets: Sequence[Target], model: str, location: Mapping[str, Any], config: AwqConfig, out: Path, trusted: bool = False
) -> list[Path]:
    """Where in `out` each goes: a folder of the target's name, or a GGUF file in the root. trusted: whether the model's code may run.

    Raises ValueError for an architecture, a tokenizer, shapes or widths that a target cannot hold. No weights are read; for GGUF they are
    downloaded.
    """
    if not targets:
        return []
    architecture = read_config(model, trusted, **location)
    empty = empty_model(architecture, getattr(architecture, "dtype", None), trusted)
    recipe = config.recipe(positions_of(architecture))
    specs = make_plan(empty, recipe).specs
    for target in targets:
        if target.name in ("compressed-tensors", "gptq"):
            _check_shapes(empty, specs, target.name, model)
    files = _gguf_files([target for target in targets if target.name == GGUF], model, location, empty, specs, out)
    found = [files[target] if target.name == GGUF else out / target.name for target in targets]
    if twice := [path.name for path in found if found.count(path) > 1]:
        raise ValueError(f"two exports would be called {twice[0]}; leave one out")
    return found


def _check_shapes(empty: Any, specs: Mapping[str, QuantSpec], target: str, model: str) -> None:
    for name, spec in specs.items():
        module = empty.get_submodule(name)
        if isinstance(module, compat.Conv1D):
            raise transposed(name, model, target)
        if target == "gptq":
            check_shape(name, shape_of(module), spec.bits)


def _gguf_files(
    targets: Sequence[Target], model: str, location: Mapping[str, Any], empty: Any, specs: Mapping[str, QuantSpec], out: Path
) -> dict[Target, Path]:
    if not targets:
        return {}
    from awq_hf.exporters.gguf.types import AUTO
    from awq_hf.exporters.gguf.writer import prepare

    original = open_checkpoint(model, **location)
    files = {}
    for target in targets:
        checkpoint = original if target.type else _as_quantized(original, empty, specs)
        files[target] = prepare(checkpoint, out, type=target.type or AUTO).target
    return files


@dataclass(frozen=True)
class _Ahead(Checkpoint):
    """A float checkpoint that says what it will hold when it is quantized. specs: by name of the tensor."""

    specs: Mapping[str, QuantSpec] = field(default_factory=dict)

    def names(self) -> list[Entry]:
        return [entry._replace(kind=self.specs.get(entry.name, entry.kind)) for entry in super().names()]


def _as_quantized(checkpoint: Checkpoint, empty: Any, specs: Mapping[str, QuantSpec]) -> _Ahead:
    resolve, known = renaming.resolver(empty), empty.state_dict()
    stored = {entry.name: resolve(entry.name, known)[0].removesuffix(".weight") for entry in checkpoint.names()}
    kinds = {name: specs[module] for name, module in stored.items() if module in specs}
    return _Ahead(**{part.name: getattr(checkpoint, part.name) for part in fields(Checkpoint)}, specs=kinds)
