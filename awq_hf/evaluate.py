"""How good models are on a text they were not calibrated on: perplexity, and how far they are from a reference model.

KL at a position = sum over the vocabulary of p (log p - log q), p the reference's probabilities of the next token and q the model's.

Standard errors. Tokens of one window depend on each other, so windows are the independent units. For the mean m of N values in W
windows, with r_w the sum of (value - m) over window w:

    SE(m)^2 = W / (W - 1) * sum_w r_w^2 / N^2

This is the cluster-robust variance of a mean with its usual correction for few clusters (Cameron and Miller, A Practitioner's Guide to
Cluster-Robust Inference, 2015, doi:10.3368/jhr.50.2.317; for language models Miller, Adding Error Bars to Evals, arXiv 2411.00640).
Losses are compared in pairs, token by token: what both models find hard cancels. That neighbouring windows share a topic is not counted.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq_hf.block_by_block import BlockByBlock
from awq_hf.calibration.checks import FEW
from awq_hf.calibration.data import Batch, Windows, load_windows
from awq_hf.calibration.stream import model_inputs
from awq_hf.classes import positions_of
from awq_hf.wording import option

Texts = str | os.PathLike[str] | Sequence[str] | Sequence[Tensor] | None
Model = nn.Module | BlockByBlock
Source = Model | Callable[[], Model]

CHUNK = 2**21  # logits that are float64 at a time: small enough for a CPU's cache, large enough for a GPU
REFERENCE = "the reference"

logger = logging.getLogger("awq_hf")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured; fields that need a reference are None without one, standard errors (_se) also with fewer than 2 windows.

    perplexity: exp of the mean negative log-likelihood of the next token in nats; reference_perplexity: the reference's.
    loss_difference: mean negative log-likelihood of the next token less the reference's, in nats.
    kl, kl_median, kl_99, kl_999: mean, median, 99 % and 99.9 % quantile over positions of KL(reference || model) in nats. Quantiles
    interpolate linearly between positions.
    top1: share of positions where both models' most likely next token is the same.
    tokens: positions evaluated, in windows of seq_len; text, sha256: the evaluation text's name and a digest of its tokens.
    """

    perplexity: float
    reference_perplexity: float | None = None
    loss_difference: float | None = None
    loss_difference_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    kl_999: float | None = None
    top1: float | None = None
    tokens: int
    seq_len: int
    text: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    reference: nn.Module | None = None,
    texts: Texts = None,
    tokenizer: Any = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Any = None,
) -> Evaluation:
    """Compare `model` with `reference` on windows of `texts`: a UTF-8 text file, strings, 1-D tensors of token ids, or None.

    None is the held-out text that comes with the package.

    Windows of seq_len tokens follow each other without overlap; max_tokens // seq_len of them (at least one) are used. In memory is
    one batch of logits of both models, in the models' dtype; log-probabilities and sums are float64. Standard errors take windows
    as the independent units (see the module). tokenizer: not needed for token ids. progress: like tqdm.

    Raises ValueError for a text that cannot be used, for a model it does not fit, for vocabularies of different size (also where one
    of them is only padded: what the padding's probabilities should be compared with is unknown), and for logits that are not finite.
    """
    name = "the model"
    return evaluate_many({name: model}, reference, texts, tokenizer, seq_len, max_tokens, batch_size, progress)[name]


def evaluate_many(
    models: Mapping[str, Source],
    reference: Source | None = None,
    texts: Texts = None,
    tokenizer: Any = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Any = None,
) -> dict[str, Evaluation]:
    """evaluate() for several models by name, on the same tokens.

    Models and the reference are modules, or functions that load one. What a function loads is released before the next is called,
    so that the reference and one model are in memory at a time. The reference's logits would not fit there: it is run again, batch
    by batch, for every model. The text is read and checked before anything is loaded.

    A model may also be one whose blocks run one by one (block_by_block.py): its hidden states before the head are what is in memory, and
    are computed once.
    """
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{option(name, value)} leaves nothing to evaluate; give at least 1")
    windows = load_windows(texts, tokenizer, seq_len, role="evaluation")
    if max_tokens is not None:
        count = max(1, max_tokens // seq_len)
        windows = Windows(windows.input_ids[:count], windows.lengths[:count], windows.source)
    if max_tokens is None and windows.tokens < FEW:
        logger.warning(
            "the text (%s) has only %d tokens; figures of fewer than %d say little: give more", windows.source, windows.tokens, FEW
        )
    original = None if reference is None else _ready(REFERENCE, reference, windows)
    results = {}
    for name, source in models.items():
        results[name] = _evaluate(name, _ready(name, source, windows), original, windows, batch_size, progress)
        if not isinstance(source, Model):
            gc.collect()  # models hold references to themselves
    return results


def check_same_tokens(tokenizers: Mapping[str, Any], texts: Texts, seq_len: int = 512) -> None:
    """Raise ValueError naming two models whose tokenizers split the texts differently: position by position they cannot be compared."""
    digests = {name: load_windows(texts, tokenizer, seq_len, role="evaluation").sha256() for name, tokenizer in tokenizers.items()}
    first, *others = digests
    for name in others:
        if digests[name] != digests[first]:
            raise ValueError(
                f"the tokenizers of {first} and {name} split the text into different tokens, so they cannot be compared on it; "
                "evaluate them one by one, or give quantized models the tokenizer of the original"
            )


def _ready(name: str, source: Source, windows: Windows) -> Model:
    """The model, loaded if need be, and checked to take such windows."""
    if not isinstance(source, Model) and not callable(source):
        raise TypeError(
            f"{name} is {source!r:.200}; give a model, or a function that loads one: lambda: AutoModelForCausalLM.from_pretrained(...). "
            "awq-hf eval takes names"
        )
    model = source if isinstance(source, Model) else source()
    module: Any = _module(model)
    if hasattr(module, "get_input_embeddings"):
        windows.check_token_ids(module.get_input_embeddings().weight.shape[0])
    if hasattr(module, "config"):
        positions = positions_of(module.config)
        if positions is not None and int(windows.lengths.max()) > positions:
            raise ValueError(
                f"{name} takes {positions} tokens at once, and windows have {int(windows.lengths.max())}; lower {option('seq_len')}"
            )
    return model


def _module(model: Model) -> nn.Module:
    return model.model if isinstance(model, BlockByBlock) else model


def _evaluate(name: str, model: Model, reference: Model | None, windows: Windows, batch_size: int, progress: Any) -> Evaluation:
    batches = windows.batches(batch_size, hold_out=False)
    sums: list[Tensor] = []  # [figures, windows of the batch], see _compare
    divergences: list[Tensor] = []  # [positions of the batch]
    with _in_evaluation_mode(*(_module(each) for each in (model, reference) if each is not None)):
        for each, called in ((reference, REFERENCE), (model, name)):
            if isinstance(each, BlockByBlock):
                each.run(batches, called, progress)
        numbered = enumerate(progress(batches, desc=f"Evaluating {name}", unit="batch") if progress else batches)
        for position, batch in numbered:
            found = _compare(name, *_pair(model, reference, position, batch), batch, position * batch_size)  # keeps no logits here
            sums.append(found.sum(2))
            if reference is not None:
                divergences.append(found[2][_real(batch)])
    loss, *compared = torch.cat(sums, dim=1)  # [windows] each
    positions, predictions = windows.lengths, windows.lengths - 1
    described: dict[str, Any] = dict(
        perplexity=_perplexity(loss, predictions),
        tokens=windows.tokens,
        seq_len=windows.input_ids.shape[1],
        text=windows.source,
        sha256=windows.sha256(),
    )
    if not compared:
        return Evaluation(**described)
    reference_loss, kl, same = compared
    loss_difference, loss_difference_se = _mean(loss - reference_loss, predictions)
    kl_mean, kl_se = _mean(kl, positions)
    median, kl_99, kl_999 = _quantiles(torch.cat(divergences), (0.5, 0.99, 0.999))
    return Evaluation(
        **described,
        reference_perplexity=_perplexity(reference_loss, predictions),
        loss_difference=loss_difference,
        loss_difference_se=loss_difference_se,
        kl=kl_mean,
        kl_se=kl_se,
        kl_median=median,
        kl_99=kl_99,
        kl_999=kl_999,
        top1=_mean(same, positions)[0],
    )


def _compare(name: str, ours: Tensor, theirs: Tensor | None, batch: Batch, first: int) -> Tensor:
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
    real = _real(batch)
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


@torch.no_grad()
def _logits(model: Model, position: int, batch: Batch) -> Tensor:
    if isinstance(model, BlockByBlock):
        return model.logits(position, batch)
    logits: Tensor = model(**model_inputs(model, batch)).logits
    return logits.flatten(0, 1)


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


def _pair(model: Model, reference: Model | None, position: int, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Logits of the model and of the reference, [windows * seq_len, vocabulary]."""
    theirs = None if reference is None else _logits(reference, position, batch)
    return (theirs if theirs is not None and model is reference else _logits(model, position, batch)), theirs


def _real(batch: Batch) -> Tensor:
    """bool [windows, seq_len]: not padding."""
    return torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool()


@contextmanager
def _in_evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """No dropout; every module gets its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _perplexity(loss: Tensor, predictions: Tensor) -> float:
    return float((loss.sum() / predictions.sum()).exp())


def _mean(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Mean of values and its standard error, from their sums in every window and how many they are (see the module)."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean, windows = sums.sum() / counts.sum(), len(sums)
    if windows < 2:
        return float(mean), None
    residuals = sums - mean * counts
    return float(mean), float((windows / (windows - 1) * residuals.square().sum()).sqrt() / counts.sum())


def _quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Linear interpolation between order statistics. torch.quantile does the same, for up to 2^24 values."""
    ordered = values.sort().values
    found = []
    for share in shares:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        found.append(float(low + (high - low) * (place - math.floor(place))))
    return found
