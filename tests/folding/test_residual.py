"""What Linears' outputs are added to, on hand-written blocks: what must be found, and what must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from awq_hf.folding import BlockProbe, Residual, find_residuals

WIDTH = 12


class Block(nn.Module):
    """A norm, a branch of two Linears and a second one, wired by name."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring, self.norm, self.norm2 = wiring, nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, h: Tensor) -> Any:
        y = self.down(F.silu(self.up(self.norm(h))))
        match self.wiring:
            case "added":
                return h + y
            case "subtracted":
                return (h - y, None)
            case "with a factor":
                return h + 0.22 * y
            case "in place of the output":
                return y.add_(h)
            case "two in a row":
                h = h + y
                return h + 0.5 * self.other(self.norm2(h))
            case "norm of the sum":
                h = self.norm2(h + y)
                return self.norm(h + self.other(h))
            case "kept twice":
                return h + y, h - y
            case "in place of the stream":
                return h.add_(y)
            case "alone":
                return y
            case "norm of the output":
                return h + self.norm2(y)
            case "factor of each channel":
                return h + self.gate * y
            case "factor of each token":
                return h + torch.sigmoid(h[..., :1]) * y
            case "side by side":
                return h + y + self.other(self.norm(h))
            case "a little else":
                return h + y + 0.05 * y.square()
            case "other shape":
                return (h + y)[:, :-1]
            case "after the norm":
                return self.norm(h) + y
            case "its reader runs twice":
                stream = 2 * h
                self.norm2(stream + self.norm2(stream))
                return stream + self.other(h)
        raise AssertionError(self.wiring)


def found(wiring: str) -> dict[str, Residual]:
    torch.manual_seed(0)
    block = Block(wiring)
    for norm in (block.norm, block.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    names = ["up", "down", "other"]
    probe = BlockProbe(block, (torch.randn(2, 9, WIDTH),), {}, names)
    return find_residuals(probe, [name for name in names if name not in probe.not_run_once()])


@pytest.mark.parametrize(
    ("wiring", "expected"),
    [
        ("added", {"down": ("", 1.0)}),
        ("subtracted", {"down": ("", -1.0)}),
        ("with a factor", {"down": ("", 0.22)}),
        ("in place of the output", {"down": ("", 1.0)}),
        ("two in a row", {"down": ("", 1.0), "other": ("norm2", 0.5)}),
        ("norm of the sum", {"down": ("", 1.0), "other": ("other", 1.0)}),
        ("after the norm", {"down": ("up", 1.0)}),
        ("kept twice", {"down": ("", 1.0)}),
        ("in place of the stream", {}),
        ("alone", {}),
        ("norm of the output", {}),
        ("factor of each channel", {}),
        ("factor of each token", {}),
        ("side by side", {}),
        ("a little else", {}),
        ("other shape", {}),
        ("its reader runs twice", {}),
    ],
)
def test_what_an_output_is_added_to(wiring: str, expected: dict[str, tuple[str, float]]) -> None:
    residuals = found(wiring)
    assert {name: residual.source for name, residual in residuals.items()} == {name: source for name, (source, _) in expected.items()}
    for name, (_, factor) in expected.items():
        assert residuals[name].factor == pytest.approx(factor, rel=1e-5)


def test_the_block_and_its_hooks_are_left_alone() -> None:
    block = Block("added")
    probe = BlockProbe(block, (torch.randn(2, 9, WIDTH),), {}, ["up", "down"])
    find_residuals(probe, ["up", "down"])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for owner in (block, probe.block) for m in owner.modules())
