"""Where a model keeps its decoder blocks, and what in a block can be quantized."""

from __future__ import annotations

from torch import nn


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks and its name in the model: the ModuleList with most parameters below `get_decoder()`."""
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks (nn.ModuleList) to quantize one after the other")
    blocks = max(lists, key=size)
    return next(name for name, module in model.named_modules() if module is blocks), blocks


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a block, by their name in it. Subclasses are left out: their forward may be anything."""
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
