"""Where something was run, as report.json and evaluation.json say it."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("awq-hf", "transformers", "torch")}


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"platform": platform.platform(), "threads": torch.get_num_threads()}
    return {**found, "device": torch.cuda.get_device_name(device)} if device.type == "cuda" else found
