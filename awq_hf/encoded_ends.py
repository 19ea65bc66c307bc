"""The embedding and the head on their way to GGUF's blocks, before the blocks between them.

The head is a Linear that reads the last norm's output: importance and codes are chosen for the second moment of that, in the float model.
An embedding is read a row at a time, each by a token of its own: no column has an importance that a text could tell, so its type's plain
quantizer does it. One tensor that serves as both is chosen for the head's errors and plain ones of the embedding together,

    E|D x|^2 + TIED mean_j(E[x_j^2]) |D|^2,    D = W' - W

What the blocks get in the quantized stream is then what the stored embedding gives them. A vocabulary is large: rows are taken in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from awq_hf.blocks import find_blocks
from awq_hf.calibration.data import Batch
from awq_hf.calibration.stats import Moments
from awq_hf.calibration.stream import BlockStream
from awq_hf.encoded_layer import Encoded, EncodedLayer, JudgedBlocks, codes_together, decode, encode, judge_blocks, kind_of, prepare
from awq_hf.exporters.gguf.blocks.steps import KINDS
from awq_hf.recipe import Recipe
from awq_hf.report import Report
from awq_hf.rounding.gptq import Prepared, RoundingFailed
from awq_hf.spec import EncodedWeight
from awq_hf.streaming import InMemory

PIECE = 2**24  # weights that are worked on at once: 64 MiB as float32

# KL of the demonstration model's only matrix of this kind with 0, 0.1, 0.3 and 1, all else being float: Q6_K .000292 .000293 .000294
# .000304, Q4_K .0051 .0050 .0050 .0051, where the plain quantizer leaves .000404 and .0067.
TIED = 0.1

Progress = Any  # tqdm or a look-alike


def encode_ends(
    model: Any, kinds: Mapping[str, Type], recipe: Recipe, result: Encoded, source: InMemory, progress: Progress, batches: Sequence[Batch],
    report: Report,
) -> None:  # fmt: skip
    """Encode those of the two that have a type in `kinds`; the model holds the decoded weights from then on."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    if names.get(head) in kinds:
        stream = BlockStream(model, find_blocks(model)[1], batches)
        with report.timed("float stream"):
            stream.run(source.load, source.unload, progress, "the float model")
        _encode_head(model, names[head], kinds[names[head]], head.weight is embedding.weight, recipe, result, stream, report)
    if names.get(embedding) in kinds:
        with report.timed("encoding"):
            kind, weight = kinds[names[embedding]], embedding.weight.data
            parts = []
            for rows in _pieces(weight):
                parts.append(encode(weight[rows].to(torch.float32), kind, None))
                weight[rows] = decode(parts[-1], kind, weight.device).to(weight.dtype)
        result.weights[names[embedding]] = EncodedWeight(torch.cat(parts), kind.name, (weight.shape[0], weight.shape[1]))


def _encode_head(
    model: nn.Module, name: str, kind: Type, tied: bool, recipe: Recipe, result: Encoded, stream: BlockStream, report: Report
) -> None:
    head = model.get_submodule(name)
    train, held = Moments(), Moments()
    with report.timed("float stream"):
        for batch, x in zip(stream.batches, stream.inputs_of(head), strict=True):
            (held if batch.held_out else train).add(x)
    held = held if held.tokens else train
    importance = result.importance[name] = train.H.diagonal().clone().cpu()
    if tied:
        train, held = train.with_white_noise(TIED), held.with_white_noise(TIED)
    prepared = _prepared(train, kind, recipe, report, name)
    weight, parts = head.get_parameter("weight").data, []
    for rows in _pieces(weight):
        best = _encode_piece(weight[rows].to(torch.float32), kind, importance, train, held, prepared, report)
        weight[rows] = best.weight.to(weight.dtype)
        parts.append(best._replace(weight=best.weight[:0]))
    result.weights[name] = EncodedWeight(torch.cat([part.data for part in parts]), kind.name, (weight.shape[0], weight.shape[1]))
    report.layers.append(_line(name, weight, kind, parts, int((importance == 0).sum())))


def _prepared(train: Moments, kind: Type, recipe: Recipe, report: Report, name: str) -> Prepared | None:
    """What all rows share, to have their codes chosen together; None where they are not."""
    if kind not in KINDS or recipe.rounding == "nearest":
        return None
    with report.timed("rounding"):
        try:
            return prepare(train.H)
        except RoundingFailed as error:
            report.notes.append(f"{name}: {error}; codes were rounded one by one")
            return None


def _encode_piece(
    weight: Tensor, kind: Type, importance: Tensor, train: Moments, held: Moments, prepared: Prepared | None, report: Report
) -> JudgedBlocks:
    """weight: some rows, float32 [rows, in]."""
    with report.timed("encoding"):
        alone = [encode(weight, kind, by) for by in (None, importance)]
        candidates = {"importance": encode(weight, kind, train.H.diagonal())}
    if prepared is not None:
        with report.timed("rounding"):
            candidates["descent"] = codes_together(weight, candidates["importance"], kind, prepared)
    with report.timed("held-out check"):
        plain, by_importance = (decode(data, kind, weight.device) for data in alone)
        return judge_blocks((candidates, (0.0, None)), weight, kind, (plain, by_importance), held)


def _line(name: str, weight: Tensor, kind: Type, parts: list[JudgedBlocks], dead: int) -> EncodedLayer:
    energy = sum(part.energy for part in parts)
    return EncodedLayer(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        fold=None,
        alpha=0.0,
        family="not folded",
        clip=1.0,
        correction=0.0,
        rounding=" and ".join(dict.fromkeys(how for part in parts for how in part.rounding)),
        loss_plain=sum(part.plain for part in parts) / energy,
        loss=sum(part.loss for part in parts) / energy,
        loss_importance=sum(part.importance for part in parts) / energy,
        dead_channels=dead,
        **kind_of(kind),
    )


def _pieces(weight: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))
