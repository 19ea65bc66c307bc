"""Where a model keeps its blocks, and what in a block can be quantized."""

from __future__ import annotations

from typing import Any

from torch import nn

from awq_hf.experts import FUSED, holds_experts
from awq_hf.matrices import is_matrix, shape_of


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks and its name in the model: the ModuleList with most parameters, below `get_decoder()` where it has one."""
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    lists = [m for root in (decoder, model) for m in root.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks (nn.ModuleList) to quantize one after the other")
    below = [m for m in lists if m in set(decoder.modules())]
    blocks = max(below or lists, key=size)
    return next(name for name, module in model.named_modules() if module is blocks), blocks


def matrices_of(block: nn.Module) -> dict[str, nn.Module]:
    """The matrices of a block (see awq_hf.matrices), by their name in it."""
    return {name: module for name, module in block.named_modules() if is_matrix(module)}


def experts_of(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that hold the matrices of experts, by their name in it."""
    return {name: module for name, module in block.named_modules() if holds_experts(module)}


def routers_of(block: nn.Module) -> dict[str, nn.Module]:
    """Modules of a block that are no matrices (see awq_hf.matrices) but multiply by a weight [out, in]: routers."""
    found = {name: module for name, module in block.named_modules() if isinstance(getattr(module, "weight", None), nn.Parameter)}
    return {name: module for name, module in found.items() if module.weight.ndim == 2 and not is_matrix(module)}


def linear_routers(block: nn.Module) -> set[str]:
    """Matrices of a block that stand beside the experts and have one output for each of them."""
    experts = {name.rpartition(".")[0]: len(module.get_parameter(FUSED[1])) for name, module in experts_of(block).items()}
    beside = lambda name, parent: not parent or name.startswith(f"{parent}.")  # noqa: E731
    matrices = {name: shape_of(module)[0] for name, module in matrices_of(block).items()}
    return {name for name, rows in matrices.items() for parent, count in experts.items() if rows == count and beside(name, parent)}


def block_signature(block: nn.Module) -> tuple[Any, ...]:
    """What blocks have in common that share their folds: the class and the shapes of all parameters. Hashable."""
    return (type(block), *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()))
