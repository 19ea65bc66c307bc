"""What tests of exporters share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import awq_hf


@pytest.fixture(scope="session")
def plain(small_config: Callable[..., Any]) -> Callable[..., Any]:
    """plain(model, **options): quantized in place, quickly."""
    quickest = {"scale": False, "clip": False, "correction": False, "rounding": "nearest", "stream": "float", "samples": 2}
    return lambda model, **options: awq_hf.quantize(model, small_config(**{**quickest, **options}))
