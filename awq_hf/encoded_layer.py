"""Matrices that share an input, from float weights to a GGUF type's blocks, and the verdict of the held-out slice on each of their rows.

K-quants start from the float weights and never from int4. The importance matrix is that of the smoothed model, E[x^2] / s^2; codes are
chosen together, on the scales that the quantizer found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf.affine import MIN_SCALE, Grid
from awq_hf.calibration.stats import Moments, OutputError, output_energy
from awq_hf.exporters.gguf.blocks.steps import KINDS, steps_of, with_codes
from awq_hf.exporters.gguf.encode import encode as encode_rows
from awq_hf.layer import Timed
from awq_hf.recipe import Recipe
from awq_hf.report import LayerReport, Report
from awq_hf.rounding.descent import codes_on_grid
from awq_hf.rounding.gptq import Prepared, RoundingFailed
from awq_hf.spec import EncodedWeight, QuantSpec
from awq_hf.transforms.awq_scale import Consumer
from awq_hf.transforms.correction import Corrected, corrected_target

JUDGED_ROWS = 256  # of a weight, that the target's own quantizer judges smoothing scales by

# Of the correlations of inputs, towards none: what codes are fitted to should hold for other text as well. KL of the demonstration model
# with 0.3, 0.5, 0.7 and 0.9: Q2_K .110 .107 .112 .122, Q3_K .0278 .0282 .0300 .0334, Q4_K .0074 .0072 .0074 .0084; calibrated on text of
# another kind .149 .138 .137 .142, .0349 .0361 .0368 .0399 and .0100 .0093 .0091 .0097. No other is better by more than 4 % anywhere.
SHRINKAGE = 0.5

# What resembles a type closely enough to leave the best few scales to its own quantizer.
PROXIES = {
    Type.Q2_K: QuantSpec(2, 16),
    Type.Q3_K: QuantSpec(3, 16, symmetric=True),
    Type.Q4_0: QuantSpec(4, 32, symmetric=True),
    Type.IQ4_NL: QuantSpec(4, 32, symmetric=True),
    Type.IQ4_XS: QuantSpec(4, 32, symmetric=True),
    Type.Q6_K: QuantSpec(8, 16, symmetric=True),
    Type.Q8_0: QuantSpec(8, 32, symmetric=True),
}
PROXY = QuantSpec(4, 32)


@dataclass
class Encoded:
    """weights: matrix -> its blocks, rows in the model's order. importance: matrix, or one part of all experts of a layer -> E[x^2] of the
    float model's inputs, [in] or [experts, in]; counts: of experts, the tokens that reached each, [experts].
    """

    weights: dict[str, EncodedWeight] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    report: Report | None = None


@dataclass
class EncodedLayer(LayerReport):
    """kind: the type; bits: of a code, rounded down from bits per weight. loss_plain: of the type's quantizer without importance;
    loss_importance: with the float model's. Both of the original weight.
    """

    kind: str = ""
    loss_importance: float = 0.0


def kind_of(kind: Type) -> dict[str, Any]:
    """What an EncodedLayer says of a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return {"kind": kind.name, "bits": 8 * size // block, "group_size": block}


def encode(rows: Tensor, kind: Type, importance: Tensor | None) -> Tensor:
    """rows: float32 [n, in]; importance: float32 [in]. Returns uint8 [n, bytes]."""
    return torch.from_numpy(encode_rows(rows.cpu(), kind, None if importance is None else importance.cpu()))


def decode(data: Tensor, kind: Type, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [n, bytes] -> float32 [n, in]."""
    return torch.from_numpy(gguf.dequantize(data.numpy(), kind)).to(device)


def judge_of(weight: Tensor, kind: Type) -> Consumer:
    """What judges smoothing scales of the inputs of a weight [out, in] that becomes `kind`: some of its rows, and their real rounding."""
    rows = torch.linspace(0, len(weight) - 1, min(JUDGED_ROWS, len(weight)), dtype=torch.float32, device=weight.device).long()
    return weight[rows].to(torch.float32), lambda some, energy: decode(encode(some, kind, energy), kind, some.device)


# How codes were found -> the blocks of a weight, uint8 [out, bytes]; the correction's strengths, as `Corrected` has them.
Found = tuple[dict[str, Tensor], tuple[float, float | None]]


def encode_together(
    weights: list[Tensor], kind: Type, recipe: Recipe, train: Moments, held: Moments, timed: Timed, note: Callable[[str], None]
) -> list[Found]:
    """Candidates for weights that share an input, each float32 [out, in], encoded as one matrix."""
    corrected = [Corrected(weight, 0.0, None) for weight in weights]
    if recipe.correction:
        with timed("correction"):
            corrected = [corrected_target(w, train, held) for w in weights]
    energy, together = train.H.diagonal(), torch.cat([each.target for each in corrected])
    with timed("encoding"):
        found = {"importance": encode(torch.cat(weights), kind, energy)}
        aimed = found["importance"]
        if any(each.strength or each.residual for each in corrected):
            aimed = found["corrected"] = encode(together, kind, energy)
    if kind in KINDS and recipe.rounding != "nearest":
        with timed("rounding"):
            try:
                found["descent"] = codes_together(together, aimed, kind, prepare(train.H))
            except RoundingFailed as error:
                note(f"{error}; codes were rounded one by one")
    sizes = [len(weight) for weight in weights]
    parts = zip(*(data.split(sizes) for data in found.values()), strict=True)
    return [(dict(zip(found, part, strict=True)), aim[1:]) for part, aim in zip(parts, corrected, strict=True)]


class JudgedBlocks(NamedTuple):
    """data: the blocks, uint8 [out, bytes]; weight: what they stand for, float32 [out, in]; rounding: how their codes were found.

    Errors on the held-out slice: plain: of the type's quantizer without importance; importance: with it; loss: its own; energy: of the
    output.
    """

    data: Tensor
    weight: Tensor
    rounding: list[str]
    correction: float
    residual: float | None
    plain: float
    importance: float
    loss: float
    energy: float


def judge_blocks(found: Found, weight: Tensor, kind: Type, alone: tuple[Tensor, Tensor], held: Moments) -> JudgedBlocks:
    """The best candidate of each row on the held-out slice; where all of them lose to the plain quantizer, that is one more.

    weight: folded, float32 [out, in]; alone: what the type's quantizer alone makes of the original weight, then folded: without importance,
    and with the float model's.
    """
    (candidates, (strength, residual)), error_of = found, OutputError(weight, held)
    loss_plain, loss_importance = (float(error_of(each).sum()) for each in alone)
    errors = torch.stack([error_of(decode(data, kind, weight.device)) for data in candidates.values()])  # [candidates, out]
    if float(errors.amin(0).sum()) > loss_plain:
        data = encode(weight, kind, None)
        candidates = {**candidates, "plain": data}
        errors = torch.cat([errors, error_of(decode(data, kind, weight.device))[None]])
    winner = errors.argmin(0)
    data = torch.stack(list(candidates.values()))[winner.cpu(), torch.arange(len(weight))]
    return JudgedBlocks(
        data=data,
        weight=decode(data, kind, weight.device),
        rounding=[how for i, how in enumerate(candidates) if bool((winner == i).any())],
        correction=strength,
        residual=residual,
        plain=loss_plain,
        importance=loss_importance,
        loss=float(errors.amin(0).sum()),
        energy=max(float(output_energy(weight, held).sum()), 1e-30),
    )


def prepare(H: Tensor) -> Prepared:  # noqa: N803
    """What `codes_together` needs to know of inputs with E[x x^T] = H. Raises RoundingFailed."""
    return Prepared.of(H, SHRINKAGE)


def codes_together(weight: Tensor, data: Tensor, kind: Type, inputs: Prepared) -> Tensor:
    """The blocks `data` of weight [out, in], with codes chosen by coordinate descent: uint8 [out, bytes]."""
    found = steps_of(data.numpy(), kind)
    steps, offsets = (torch.from_numpy(values).to(weight.device) for values in (found.steps, found.offsets))
    scales = torch.where(steps == 0, MIN_SCALE, steps)  # of sub-blocks that are constant, whatever their codes
    codes = codes_on_grid(weight, Grid(scales, offsets / scales, _Codes(found.top)), inputs)
    return torch.from_numpy(with_codes(data.numpy(), kind, codes.to(torch.uint8).cpu().numpy()))


@dataclass(frozen=True)
class _Codes:
    max_code: int
