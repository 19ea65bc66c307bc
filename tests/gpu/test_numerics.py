"""The kernels against the reference on a GPU, bit for bit: the tests that elsewhere run in Triton's interpreter."""

from __future__ import annotations

from tests.gpu import gpu
from tests.kernels.numerics import *  # noqa: F403

gpu.require()
