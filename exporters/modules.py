"""Which modules are quantized and which are not, by their names on disk and in memory: what skip lists are written from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from awq_hf import compat, renaming
from awq_hf.classes import empty_model
from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.linear import AwqLinear, PackedModule
from awq_hf.matrices import is_matrix
from awq_hf.spec import QuantSpec


@dataclass(frozen=True)
class Modules:
    """quantized: name on disk -> name in memory, which differs where transformers renames or fuses while loading.

    in_float: other modules that hold matrices (Linears, routers, experts; embeddings aside), by their names in memory; stored_in_float:
    the same by their names on disk, where they have a matrix of their own there, which a tied head has not.
    transposed: quantized modules, on disk, whose original weight is [in, out] (Conv1D). experts: whether some are experts that
    transformers fuses.
    """

    quantized: dict[str, str]
    in_float: list[str]
    stored_in_float: list[str]
    transposed: frozenset[str]
    experts: bool = False

    def both_names(self, owner: str) -> list[str]:
        return list(dict.fromkeys((owner, self.quantized[owner])))

    def left_out(self) -> list[str]:
        """Everything that is left in float, by both names."""
        return list(dict.fromkeys([*self.in_float, *self.stored_in_float]))


def find_modules(checkpoint: Checkpoint) -> Modules:
    """An architecture that transformers cannot build has the names on disk only."""
    model = checkpoint.model if checkpoint.model is not None else _empty(checkpoint)
    entries = [entry for entry in checkpoint.names() if entry.name.endswith(".weight") and len(entry.shape) == 2]
    matrices = [entry.name.removesuffix(".weight") for entry in entries if not isinstance(entry.kind, QuantSpec)]
    if model is None:
        return Modules({owner: owner for owner in checkpoint.packed}, matrices, matrices, frozenset())
    in_memory, parameter_of = _resolvers(model)
    quantized = {owner: in_memory(owner) or parameter_of(owner) or owner for owner in checkpoint.packed}
    fused = {parameter_of(owner).rpartition(".")[0] for owner in checkpoint.packed}  # modules of experts, of which the file has one by one
    modules = dict(model.named_modules())
    stored = [name for name in matrices if not isinstance(modules.get(in_memory(name) or name), nn.Embedding)]
    taken = set(quantized.values())
    in_float = [name for name, module in modules.items() if name not in taken | fused and _holds_a_matrix(name, module)]
    transposed = frozenset(owner for owner, name in quantized.items() if _kind(modules.get(name)) is compat.Conv1D)
    return Modules(quantized, in_float, stored, transposed, bool(fused - {""}))


def _empty(checkpoint: Checkpoint) -> Any:
    try:
        return empty_model(checkpoint.config, checkpoint.dtype)
    except Exception:  # of code that is not here, or of a config that it does not take: the names on disk have to do
        return None


def _resolvers(model: Any) -> tuple[Callable[[str], str | None], Callable[[str], str]]:
    """Name of a module on disk -> its name in memory, None where it is fused with others, or not there; and -> the parameter it is fused
    into, "" where it is not."""
    known = model.state_dict() | {f"{name}.weight": None for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    resolve = renaming.resolver(model)

    def in_memory(owner: str) -> str | None:
        name, conversion = resolve(f"{owner}.weight", known)
        return name.removesuffix(".weight") if conversion is None and name in known else None

    def parameter_of(owner: str) -> str:
        name, conversion = resolve(f"{owner}.weight", known)
        return "" if conversion is None else name

    return in_memory, parameter_of


def _holds_a_matrix(name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, PackedModule)):
        return False
    in_a_block = any(part.isdigit() for part in name.split("."))
    return isinstance(module, nn.Linear) or is_matrix(module) or (in_a_block and any(p.ndim > 1 for p in module.parameters(recurse=False)))


def _kind(module: nn.Module | None) -> type | None:
    return module.replaces if isinstance(module, AwqLinear) else type(module)
