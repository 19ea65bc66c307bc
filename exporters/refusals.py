"""What a target cannot hold, said before anything is written."""

from __future__ import annotations

from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.modules import Modules


def check_quantized(checkpoint: Checkpoint, target: str) -> None:
    if not checkpoint.packed:
        raise ValueError(f"{checkpoint.label} is not quantized, and the target {target} holds quantized weights; run awq-hf quantize first")


def check_activations(checkpoint: Checkpoint, target: str) -> None:
    if names := checkpoint.activation_scales:
        raise ValueError(
            f"{names[0]} divides the outputs of an activation, which the target {target} has no place for; the target awq keeps it"
        )


def check_linears(checkpoint: Checkpoint, modules: Modules, target: str) -> None:
    if modules.transposed:
        raise transposed(min(modules.transposed), checkpoint.label, target)


def transposed(name: str, label: str, target: str) -> ValueError:
    return ValueError(
        f"{name} of {label} is a Conv1D, of which programs that read {target} know nothing; the targets awq and dense have it"
    )
