"""Bringing a loaded model's weights into the layouts that its kernels read."""

from __future__ import annotations

import logging
from typing import Any

from awq_hf import compat
from awq_hf.linear import AwqLinear

logger = logging.getLogger("awq_hf")

OFFLOADED = "its weights are kept elsewhere and fetched for every call, which leaves no time to rearrange them"


def prepare_kernels(model: Any) -> None:
    """Prepare every AwqLinear of a transformers model, in place; one warning for each reason why some are left to the slow reference,
    and for what a kernel does to results."""
    dtype = model.get_input_embeddings().weight.dtype
    slow: dict[str, list[str]] = {}
    cautions: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, AwqLinear):
            reason = OFFLOADED if compat.is_offloaded(module) else module.prepare(dtype)
            if reason is not None:
                slow.setdefault(reason, []).append(name)
            elif caution := module.caution():
                cautions.add(caution)
    for caution in sorted(cautions):
        logger.warning("%s", caution)
    for reason, names in slow.items():
        others = f" and {len(names) - 1} other" + "s" * (len(names) > 2) if len(names) > 1 else ""
        logger.warning("no kernel for %s%s, which the slow reference computes: %s", names[0], others, reason)
