"""Whether Triton is here, found out without importing it: that takes a while, and a CPU has no use for it."""

from __future__ import annotations

import importlib.util
import os

TRITON = importlib.util.find_spec("triton") is not None  # not everywhere torch is: macOS, Windows, CPU builds
MISSING = "triton is not installed, and this kernel is written in it: pip install triton"
# Triton's interpreter runs the kernels with numpy on the CPU; the variable is read when a kernel is defined.
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
