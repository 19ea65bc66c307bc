"""Every touch point with transformers that is not its documented interface."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any

from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.utils import logging

__all__ = ["Conv1D", "after_saving", "forget_after_saving", "progress_bar", "register", "unregister"]

METHOD = "awq"
_originals: tuple[Any, Any] | None = None

progress_bar = logging.tqdm  # follows transformers' own switch for progress bars


def register(quantizer: type, config: type) -> None:
    """Take over quant_method "awq". transformers' register_* functions refuse a name that is taken, so the tables are written to."""
    global _originals
    if _originals is None:
        _originals = (auto.AUTO_QUANTIZER_MAPPING[METHOD], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD])
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config


def unregister() -> None:
    """Give quant_method "awq" back to transformers' own loader. Does nothing when it was not taken."""
    global _originals
    if _originals is not None:
        auto.AUTO_QUANTIZER_MAPPING[METHOD], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _originals
        _originals = None


def after_saving(model: Any, action: Callable[[Any, str], None]) -> None:
    """Have model.save_pretrained(directory) call action(model, directory) when it is done.

    There is no hook for it; a method bound to the instance is used, which copy.deepcopy binds to the copy.
    """

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        type(self).save_pretrained(self, save_directory, *args, **kwargs)
        action(self, os.fspath(save_directory))

    model.save_pretrained = types.MethodType(save_pretrained, model)


def forget_after_saving(model: Any) -> None:
    model.__dict__.pop("save_pretrained", None)
