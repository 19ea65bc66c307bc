"""Smoothing scales and where they can be absorbed; what Linears' outputs are added to."""

from awq_hf.folding.fold import FoldPoint, Gain
from awq_hf.folding.probe import BlockProbe, discover
from awq_hf.folding.residual import Residual, find_residuals

__all__ = ["BlockProbe", "FoldPoint", "Gain", "Residual", "discover", "find_residuals"]
