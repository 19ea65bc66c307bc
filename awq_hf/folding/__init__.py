"""Smoothing scales and where they can be absorbed."""

from awq_hf.folding.fold import FoldPoint, Gain
from awq_hf.folding.probe import BlockProbe, discover

__all__ = ["BlockProbe", "FoldPoint", "Gain", "discover"]
