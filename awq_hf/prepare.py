"""Bringing a loaded model's weights into the layouts that its kernels read."""

from __future__ import annotations

import logging
from typing import Any

from awq_hf import compat
from awq_hf.freed import drop_file_pages, give_back
from awq_hf.linear import packed_modules

logger = logging.getLogger("awq_hf")

LARGE = 1 << 20  # weights whose rearranging leaves enough memory behind to be worth giving back
OFFLOADED = "its weights are kept elsewhere and fetched for every call, which leaves no time to rearrange them"


def prepare_kernels(model: Any) -> None:
    """Prepare every packed module of a transformers model, in place; one warning for each reason why some are left to the slow reference,
    and for what a kernel does to results."""
    dtype = model.get_input_embeddings().weight.dtype
    slow: dict[str, list[str]] = {}
    cautions: set[str] = set()
    modules = packed_modules(model).items()
    # The largest first: what rearranging it takes for a moment is on top of the least.
    size = lambda module: module.matrices * module.in_features * module.out_features  # noqa: E731
    for name, module in sorted(modules, key=lambda item: -size(item[1])):
        stored = list(module.parameters())
        reason = OFFLOADED if compat.is_offloaded(module) else module.prepare(dtype)
        kept = {id(parameter) for parameter in module.parameters()}
        for parameter in stored:
            if id(parameter) not in kept:
                drop_file_pages(parameter)
        if size(module) > LARGE:
            give_back()
        if reason is not None:
            slow.setdefault(reason, []).append(name)
        elif caution := module.caution():
            cautions.add(caution)
    for caution in sorted(cautions):
        logger.warning("%s", caution)
    for reason, names in slow.items():
        others = f" and {len(names) - 1} other" + "s" * (len(names) > 2) if len(names) > 1 else ""
        logger.warning("no kernel for %s%s, which the slow reference computes: %s", names[0], others, reason)
