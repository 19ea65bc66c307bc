"""How good models are on a text they were not calibrated on: perplexity, and how far they are from a reference model.

What is computed at each position, and standard errors, are in figures.py. Losses are compared in pairs, token by token: what both
models find hard cancels.
"""

from __future__ import annotations

import gc
import logging
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
from awq_hf.figures import REFERENCE, compare, mean, perplexity, quantiles, real_positions
from awq_hf.products import run
from awq_hf.wording import option

Texts = str | os.PathLike[str] | Sequence[str] | Sequence[Tensor] | None
Model = nn.Module | BlockByBlock
Source = Model | Callable[[], Model]

WINDOWS, LOGITS = 8, 2**27  # that a batch has at most: of 32,000 tokens 8 windows of 512, of 128,000 2

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
    batch_size: int | None = None,
    progress: Any = None,
) -> Evaluation:
    """Compare `model` with `reference` on windows of `texts`: a UTF-8 text file, strings, 1-D tensors of token ids, or None.

    None is the held-out text that comes with the package.

    Windows of seq_len tokens follow each other without overlap; max_tokens // seq_len of them (at least one) are used. batch_size: windows
    that run together; None: up to 8, fewer where the vocabulary is large. In memory is one batch of logits of both models, in the models'
    dtype; log-probabilities and sums are float64. Standard errors take windows as the independent units (see the module). tokenizer: not
    needed for token ids. progress: like tqdm.

    Raises ValueError for a text that cannot be used, for a model it does not fit, for vocabularies of different size (also where one
    of them is only padded: what the padding's probabilities should be compared with is unknown), and for logits that are not finite.
    """
    name = "the model"
    return evaluate_many({name: model}, reference, texts, tokenizer, seq_len, max_tokens, batch_size, progress)[name]


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for options that leave nothing to evaluate."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{option(name, value)} leaves nothing to evaluate; give at least 1")


def evaluate_many(
    models: Mapping[str, Source],
    reference: Source | None = None,
    texts: Texts = None,
    tokenizer: Any = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Any = None,
) -> dict[str, Evaluation]:
    """evaluate() for several models by name, on the same tokens.

    Models and the reference are modules, or functions that load one. What a function loads is released before the next is called,
    so that the reference and one model are in memory at a time. The reference's logits would not fit there: it is run again, batch
    by batch, for every model. The text is read and checked before anything is loaded.

    A model may also be one whose blocks run one by one (block_by_block.py): its hidden states before the head are what is in memory, and
    are computed once.
    """
    check_counts(batch_size=batch_size, max_tokens=max_tokens)
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


def _windows_at_once(model: Any, seq_len: int) -> int:
    """How many windows a batch has: their logits are the largest part of the memory that evaluating takes."""
    vocabulary = model.config.get_text_config().vocab_size if hasattr(model, "config") else 1
    return min(WINDOWS, max(1, LOGITS // (seq_len * vocabulary)))


def _evaluate(name: str, model: Model, reference: Model | None, windows: Windows, batch_size: int | None, progress: Any) -> Evaluation:
    batch_size = batch_size or _windows_at_once(_module(model), windows.input_ids.shape[1])
    batches = windows.batches(batch_size, hold_out=False)
    sums: list[Tensor] = []  # [figures, windows of the batch], see figures.compare
    divergences: list[Tensor] = []  # [positions of the batch]
    with _in_evaluation_mode(*(_module(each) for each in (model, reference) if each is not None)):
        for each, called in ((reference, REFERENCE), (model, name)):
            if isinstance(each, BlockByBlock):
                each.run(batches, called, progress)
        numbered = enumerate(progress(batches, desc=f"Evaluating {name}", unit="batch") if progress else batches)
        for position, batch in numbered:
            found = compare(name, *_pair(model, reference, position, batch), batch, position * batch_size)  # keeps no logits here
            sums.append(found.sum(2))
            if reference is not None:
                divergences.append(found[2][real_positions(batch)])
    loss, *compared = torch.cat(sums, dim=1)  # [windows] each
    positions, predictions = windows.lengths, windows.lengths - 1
    described: dict[str, Any] = dict(
        perplexity=perplexity(loss, predictions),
        tokens=windows.tokens,
        seq_len=windows.input_ids.shape[1],
        text=windows.source,
        sha256=windows.sha256(),
    )
    if not compared:
        return Evaluation(**described)
    reference_loss, kl, same = compared
    loss_difference, loss_difference_se = mean(loss - reference_loss, predictions)
    kl_mean, kl_se = mean(kl, positions)
    median, kl_99, kl_999 = quantiles(torch.cat(divergences), (0.5, 0.99, 0.999))
    return Evaluation(
        **described,
        reference_perplexity=perplexity(reference_loss, predictions),
        loss_difference=loss_difference,
        loss_difference_se=loss_difference_se,
        kl=kl_mean,
        kl_se=kl_se,
        kl_median=median,
        kl_99=kl_99,
        kl_999=kl_999,
        top1=mean(same, positions)[0],
    )


@torch.no_grad()
def _logits(model: Model, position: int, batch: Batch) -> Tensor:
    if isinstance(model, BlockByBlock):
        return model.logits(position, batch)
    logits: Tensor = run(model, **model_inputs(model, batch)).logits
    return logits.flatten(0, 1)


def _pair(model: Model, reference: Model | None, position: int, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Logits of the model and of the reference, [windows * seq_len, vocabulary]."""
    theirs = None if reference is None else _logits(reference, position, batch)
    return (theirs if theirs is not None and model is reference else _logits(model, position, batch)), theirs


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
