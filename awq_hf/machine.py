"""Where something was run, as report.json and evaluation.json say it."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("awq-hf", "transformers", "torch")}


def machine(device: torch.device) -> dict[str, Any]:
    system = f"{platform.system()} {platform.machine()}"
    found: dict[str, Any] = {"processor": processor(), "platform": system, "threads": torch.get_num_threads()}
    return {**found, "device": torch.cuda.get_device_name(device)} if device.type == "cuda" else found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
