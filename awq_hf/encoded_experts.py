"""The experts of one layer on their way to GGUF's blocks: the statistics of expert_block.py, the search of encoded_layer.py.

All experts of a layer share one tensor of the file, and so a type, for each of gate, up and down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf.calibration.data import Batch
from awq_hf.calibration.stats import Moments
from awq_hf.encoded_layer import Encoded, EncodedLayer, JudgedBlocks, decode, encode, encode_together, judge_blocks, judge_of, kind_of
from awq_hf.expert_block import ExpertsWork, Matrix
from awq_hf.experts import FUSED, PARTS
from awq_hf.parallel import in_parallel
from awq_hf.products import linear
from awq_hf.report import LayerReport
from awq_hf.spec import EncodedWeight
from awq_hf.transforms.awq_scale import Consumer


def parts_of(parameter: str) -> list[str]:
    """Those of experts.PARTS that a fused parameter holds, in its order."""
    return [part for part, (fused, _) in PARTS.items() if fused == parameter]


class EncodedExperts(ExpertsWork):
    """The experts of a block. In the result they are called <module>.<part>.<number>."""

    def __init__(self, kinds: Mapping[str, Type], result: Encoded, *rest: Any) -> None:
        super().__init__(*rest)
        self.types = {part: kinds[f"{self.name}.{part}"] for part in PARTS}
        self.result = result
        self.importance: dict[str, Tensor] = {}  # parameter -> E[x^2] of each expert's input in the float model, [experts, in]

    def measure(self, batches: Sequence[Batch], x0s: Sequence[Tensor], routes: Sequence[Tensor]) -> None:
        """Importance as llama.cpp has it: of the tokens that the float model sends each expert, and of no others."""
        pairs = [(x0, chosen) for batch, x0, chosen in zip(batches, x0s, routes, strict=True) if not batch.held_out]
        gate: Any = self.module._apply_gate

        def sums(expert: int) -> tuple[Tensor, Tensor, int]:
            x = torch.cat([x0[(chosen == expert).any(1)] for x0, chosen in pairs])
            h = gate(linear(x.to(self.gate_up.dtype), self.gate_up[expert]))
            return x.to(torch.float32).square().sum(0), h.to(torch.float32).square().sum(0), len(x)

        *energies, counts = zip(*in_parallel(sums, range(len(self.gate_up))), strict=True)
        tokens = torch.tensor(counts)
        for parameter, energy in zip(FUSED, energies, strict=True):
            many = tokens[:, None].to(energy[0].device)
            # Of an expert that no token reached nothing is known: every column matters as much as another.
            mean = torch.where(many > 0, torch.stack(energy) / many.clamp(min=1), 1.0)
            self.importance[parameter] = mean
            for part in parts_of(parameter):
                self.result.importance[f"{self.name}.{part}"], self.result.counts[f"{self.name}.{part}"] = mean.cpu(), tokens

    # Smoothing scales

    def judges(self) -> list[Consumer]:
        """Of the scales of the experts' input: rows of gate and of up, spread over all experts."""
        halves = self.gate_up.unflatten(1, (2, -1)).transpose(0, 1)  # [2, experts, I, H]
        return [judge_of(rows.flatten(0, 1), self.types[part]) for part, rows in zip(PARTS, halves, strict=False)]

    def _judges_of_down(self, down: Tensor) -> list[Consumer]:
        return [judge_of(down, self.types[parts_of(FUSED[1])[0]])]

    # Rounding

    def _round(
        self, parameter: str, expert: int, into: Tensor, matrices: list[Matrix], train: Moments, held: Moments
    ) -> list[JudgedBlocks]:
        types, importance = [self.types[part] for part in parts_of(parameter)], self.importance[parameter][expert]
        weights = [matrix.folded(matrix.original) for matrix in matrices]
        note = lambda text: self.report.notes.append(f"{self.name}.{parameter}[{expert}]: {text}")  # noqa: E731
        found: list[Any] = [None] * len(weights)
        for kind in dict.fromkeys(types):
            which = [i for i, other in enumerate(types) if other is kind]
            together = encode_together([weights[i] for i in which], kind, self.recipe, train, held, self.report.timed, note)
            for i, candidates in zip(which, together, strict=True):
                found[i] = candidates
        with self.report.timed("held-out check"):
            judged = [
                judge_blocks(candidates, weight, kind, self._alone(matrix, kind, importance), held)
                for candidates, weight, kind, matrix in zip(found, weights, types, matrices, strict=True)
            ]
        for part, kind, best in zip(parts_of(parameter), types, judged, strict=True):
            shape = (best.weight.shape[0], best.weight.shape[1])
            self.result.weights[f"{self.name}.{part}.{expert}"] = EncodedWeight(best.data, kind.name, shape)
        into[expert].copy_(torch.cat([best.weight for best in judged]))
        return [best._replace(data=best.data[:0], weight=best.weight[:0]) for best in judged]  # `_lines` needs the numbers alone

    def _alone(self, matrix: Matrix, kind: Type, importance: Tensor) -> tuple[Tensor, Tensor]:
        """What the type's quantizer makes of a matrix by itself, and with the importance matrix."""
        original = matrix.original
        plain, by_importance = (decode(encode(original, kind, by), kind, original.device) for by in (None, importance))
        return matrix.folded(plain), matrix.folded(by_importance)

    def _lines(
        self, parameter: str, judged: list[list[JudgedBlocks]], share: Tensor, few: list[int], smoothed: Mapping[str, Any]
    ) -> list[LayerReport]:
        return [self._line(part, [expert[i] for expert in judged], share, few, smoothed) for i, part in enumerate(parts_of(parameter))]

    def _line(self, part: str, judged: list[JudgedBlocks], share: Tensor, few: list[int], smoothed: Mapping[str, Any]) -> EncodedLayer:
        """A line for a matrix of all experts; losses are weighted by the tokens that an expert gets."""
        (_, inner, hidden), down = self.gate_up.shape, PARTS[part][0] == FUSED[1]
        weighted = lambda of: sum(w * of(each) for w, each in zip(share.tolist(), judged, strict=True))  # noqa: E731
        energy = max(weighted(lambda each: each.energy), 1e-30)
        return EncodedLayer(
            name=f"{self.name}.{part}",
            shape=(hidden, inner // 2) if down else (inner // 2, hidden),
            **smoothed,
            clip=1.0,
            correction=fmean(each.correction for each in judged),
            rounding=" and ".join(dict.fromkeys(how for each in judged for how in each.rounding)),
            loss_plain=weighted(lambda each: each.plain) / energy,
            loss=weighted(lambda each: each.loss) / energy,
            loss_importance=weighted(lambda each: each.importance) / energy,
            experts=len(judged),
            few_tokens=few,
            **kind_of(self.types[part]),
        )
