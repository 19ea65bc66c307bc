"""Whether a model leaves its weights to the Linears that hold them. Some read one themselves, and cannot run with integers in its place;
some write to theirs when they run, and what is saved would be changed again. Both show in one run of the float model, before any work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from awq_hf.matrices import shape_of
from awq_hf.wording import option


class StandIn(nn.Module):
    """Computes what `matrix` does, and has of its attributes those that an AwqLinear has."""

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.hidden = [matrix]  # in a list it is no part of the model
        self.out_features, self.in_features = shape_of(matrix)
        self.bias = matrix.bias
        self.missed: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.hidden[0](x)
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self.missed = name
            raise


class StandIns:
    """Stand-ins for the matrices of a block, while it runs."""

    def __init__(self) -> None:
        self.block, self.prefix = nn.Module(), ""
        self.at: dict[str, StandIn] = {}

    def put(self, block: nn.Module, prefix: str, names: Iterable[str]) -> None:
        """names: in the model, of any blocks'; those of this one begin with `prefix`."""
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        self.block, self.prefix, self.at = block, prefix, {name: StandIn(block.get_submodule(name)) for name in inside}
        for name, stand_in in self.at.items():
            block.set_submodule(name, stand_in)

    def take_back(self) -> None:
        """Have the matrices where they were. Does nothing when they are there."""
        for name, stand_in in self.at.items():
            self.block.set_submodule(name, stand_in.hidden[0])
        self.at = {}

    def explain(self) -> ValueError | None:
        """Why a block failed, if that may have come of what a stand-in has not."""
        missed = {name: stand_in.missed for name, stand_in in self.at.items() if stand_in.missed}
        if not missed:
            return None
        name, attribute = next(iter(missed.items()))
        return ValueError(
            f"{self.prefix}{name}: the model does not only call it, it reads its {attribute!r}, which a quantized one has not; leave it "
            f"in float: {option('modules_to_not_convert', [name.rpartition('.')[2]])}"
        )


Versions = dict[str, tuple[int, int]]


def versions_of(model: nn.Module) -> Versions:
    """For every parameter which tensor it is, and how often that was written to."""
    return {name: (id(p), -1 if p.is_inference() else p._version) for name, p in model.named_parameters()}


def check_unchanged(model: nn.Module, before: Versions, names: Iterable[str]) -> None:
    """Raise ValueError where the model wrote to the weight of one of the modules `names` while it ran, or replaced it."""
    now = versions_of(model)
    weights = (f"{name}.weight" for name in names)
    if changed := [name for name in weights if before.get(name) != now.get(name)]:
        raise ValueError(
            f"{type(model).__name__} changes {changed[0]} itself when it runs, as RWKV does in evaluation: saved and loaded, it would be "
            "changed again, so that it cannot be quantized. Where the model's config has an option against that (RWKV: rescale_every=0), "
            "set it"
        )
