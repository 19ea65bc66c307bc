"""How good a model is on a text it was not calibrated on: perplexity, and agreement with a reference model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.calibration.data import Batch, Windows, load_windows


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean negative log-likelihood of the next token.

    kl: mean over positions of KL(reference || model) in nats; top1: share of positions where both models' most likely next token is
    the same; both None without a reference. tokens: positions evaluated; text, sha256: the evaluation text and a digest of its tokens.
    """

    perplexity: float
    kl: float | None
    top1: float | None
    reference_perplexity: float | None
    tokens: int
    seq_len: int
    text: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Sums:
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    predictions: int = 0
    positions: int = 0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reference: nn.Module | None = None,
    texts: str | os.PathLike[str] | Sequence[str] | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Any = None,
) -> Evaluation:
    """Compare `model` with `reference` on windows of `texts` (a file, strings, or token tensors), batch by batch.

    Windows follow each other without overlap. Only one batch of logits is in memory. Raises ValueError without a text.
    """
    if texts is None:
        raise ValueError("texts is missing: give a text file, a list of strings or of token tensors that calibration did not see")
    windows = load_windows(texts, tokenizer, seq_len, role="evaluation")
    for each in (model, reference):
        if isinstance(each, nn.Module) and hasattr(each, "get_input_embeddings"):
            windows.check_token_ids(each.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if max_tokens is not None:
        count = max(1, max_tokens // seq_len)
        windows = Windows(windows.input_ids[:count], windows.lengths[:count], windows.source)
    batches = windows.batches(batch_size, hold_out=False)
    sums = _Sums()
    for batch in progress(batches, desc="Evaluating", unit="batch") if progress else batches:
        _add(sums, batch, _logits(model, batch), None if reference is None else _logits(reference, batch))
    if not sums.predictions:
        raise ValueError(f"the evaluation text ({windows.source}) is shorter than two tokens")
    with_reference = reference is not None
    return Evaluation(
        perplexity=math.exp(sums.loss / sums.predictions),
        kl=sums.kl / sums.positions if with_reference else None,
        top1=sums.agreed / sums.positions if with_reference else None,
        reference_perplexity=math.exp(sums.reference_loss / sums.predictions) if with_reference else None,
        tokens=sums.positions,
        seq_len=seq_len,
        text=windows.source,
        sha256=windows.sha256(),
    )


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """float32 log-probabilities [windows, seq_len, vocabulary] on the CPU's or the model's device."""
    device = next(model.parameters()).device
    mask = None if batch.mask is None else batch.mask.to(device)
    logits = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits
    return logits.to(torch.float32).log_softmax(-1)


def _add(sums: _Sums, batch: Batch, log_p: Tensor, reference: Tensor | None) -> None:
    mask = torch.ones_like(batch.input_ids) if batch.mask is None else batch.mask
    real = mask.bool().to(log_p.device)
    predicted = real[:, 1:]
    following = batch.input_ids.to(log_p.device)[:, 1:, None]  # [windows, seq_len - 1, 1]
    sums.loss -= float((log_p[:, :-1].gather(-1, following)[..., 0] * predicted).sum(dtype=torch.float64))
    sums.predictions += int(predicted.sum())
    sums.positions += int(real.sum())
    if reference is None:
        return
    reference = reference.to(log_p.device)
    sums.reference_loss -= float((reference[:, :-1].gather(-1, following)[..., 0] * predicted).sum(dtype=torch.float64))
    kl = (reference.exp() * (reference - log_p)).sum(-1)  # [windows, seq_len]
    sums.kl += float((kl * real).sum(dtype=torch.float64))
    sums.agreed += int(((log_p.argmax(-1) == reference.argmax(-1)) & real).sum())
