"""Figures of every position from the logits of two models, and what they come to over a text.

KL at a position = sum over the vocabulary of p (log p - log q), p the reference's probabilities of the next token and q the model's.

Standard errors. Tokens of one window depend on each other, so windows are the independent units. For the mean m of N values in W
windows, with r_w the sum of (value - m) over window w:

    SE(m)^2 = W / (W - 1) * sum_w r_w^2 / N^2

This is the cluster-robust variance of a mean with its usual correction for few clusters (Cameron and Miller, A Practitioner's Guide to
Cluster-Robust Inference, 2015, doi:10.3368/jhr.50.2.317; for language models Miller, Adding Error Bars to Evals, arXiv 2411.00640).
That neighbouring windows share a topic is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from awq_hf.calibration.data import Batch
from awq_hf.wording import option

CHUNK = 2**21  # logits that are float64 at a time: small enough for a CPU's cache, large enough for a GPU
REFERENCE = "the reference"


def compare(name: str, ours: Tensor, theirs: Tensor | None, batch: Batch, first: int) -> Tensor:
    """Figures of every position, float64 [1 or 4, windows, seq_len] on the CPU; 0 at padding.

    They are: negative log-likelihood of the next token (0 at the last of a window) of the model, and with a reference: of the
    reference, KL(reference || model), and 1 where the most likely token is the same. ours, theirs: logits of the model and of the
    reference, [windows * seq_len, vocabulary]; first: the batch's first window, for messages.
    """
    if theirs is not None and theirs.shape[1] != ours.shape[1]:
        raise ValueError(
            f"{name} computes logits for {ours.shape[1]} tokens and the reference for {theirs.shape[1]}: they can be compared only with "
            "vocabularies of the same size, padding included"
        )
    real = real_positions(batch)
    predicts = real.clone()
    predicts[:, :-1] &= real[:, 1:]
    predicts[:, -1] = False
    following = batch.input_ids.roll(-1, 1).flatten()
    found = torch.zeros(1 if theirs is None else 4, real.numel(), dtype=torch.float64)
    for rows in real.flatten().nonzero()[:, 0].split(max(1, CHUNK // ours.shape[1])):
        log_q = _log_probabilities(ours, rows, name, batch, first)  # [rows, vocabulary]
        token = following[rows, None].to(log_q.device)
        found[0, rows] = -log_q.gather(1, token)[:, 0].cpu()
        if theirs is not None:
            log_p = _log_probabilities(theirs, rows, REFERENCE, batch, first).to(log_q.device)
            found[1, rows] = -log_p.gather(1, token)[:, 0].cpu()
            found[2, rows] = (log_p.exp() * (log_p - log_q)).sum(1).cpu()
            found[3, rows] = (log_p.argmax(1) == log_q.argmax(1)).double().cpu()
    found[:2, ~predicts.flatten()] = 0
    return found.view(-1, *real.shape)


def _log_probabilities(logits: Tensor, rows: Tensor, name: str, batch: Batch, first: int) -> Tensor:
    """float64: the rounding of float32 (1e-6) is as large as the divergence of a good 8-bit model, and makes it negative."""
    chosen = logits[rows.to(logits.device)]
    bad = ~chosen.isfinite().all(1)
    if bool(bad.any()):
        window, token = divmod(int(rows[bad.cpu()][0]), batch.input_ids.shape[1])
        raise ValueError(
            f"{name} computes logits that are not finite (window {first + window}, token {token}, both counted from 0): its weights are "
            f"damaged, or {str(chosen.dtype).removeprefix('torch.')} overflows; check the file, or try {option('dtype', 'float32')}"
        )
    if chosen.device.type == "mps":  # has no float64
        chosen = chosen.cpu()
    return chosen.double().log_softmax(1)


def real_positions(batch: Batch) -> Tensor:
    """bool [windows, seq_len]: not padding."""
    return torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool()


def perplexity(loss: Tensor, predictions: Tensor) -> float:
    return float((loss.sum() / predictions.sum()).exp())


def mean(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Mean of values and its standard error, from their sums in every window and how many they are (see the module)."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    average, windows = sums.sum() / counts.sum(), len(sums)
    if windows < 2:
        return float(average), None
    residuals = sums - average * counts
    return float(average), float((windows / (windows - 1) * residuals.square().sum()).sqrt() / counts.sum())


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Linear interpolation between order statistics. torch.quantile does the same, for up to 2^24 values."""
    ordered = values.sort().values
    found = []
    for share in shares:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        found.append(float(low + (high - low) * (place - math.floor(place))))
    return found
