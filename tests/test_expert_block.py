"""Experts that few calibration tokens reach, and what they are fitted to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import awq_hf
from awq_hf.expert_block import Tokens, _Statistics
from tests.mixtures import MODELS, PLAIN, config_for, enough_text


def test_experts_that_few_tokens_reach(random_model: Callable[..., Any]) -> None:
    """A router that knows experts 0 and 1 only, and sends a token to expert 3 where its own are no choice."""
    original = random_model(MODELS["qwen3"]())
    mlp = original.model.layers[0].mlp

    def few(_module: nn.Module, _args: Any, output: Any) -> Any:
        logits, share, chosen = output
        rare = torch.arange(len(chosen)) % 48 == 7
        chosen = torch.where(rare[:, None], torch.tensor([3, 1]), torch.tensor([0, 1]))
        return logits, share, chosen

    mlp.gate.register_forward_hook(few)  # copies of the model have it too
    plain, quantized = (awq_hf.quantize(copy.deepcopy(original), config_for(enough_text(), **options)) for options in (PLAIN, {}))
    gate_up, down = (layer for layer in quantized.awq_report.layers if ".experts." in layer.name)
    assert gate_up.few_tokens == [2, 3] and down.few_tokens == [2]  # 42 tokens, and rows of 64 and of 32
    (note,) = [note for note in quantized.awq_report.notes if "fewer calibration tokens" in note]
    assert "2 experts in 1 layers" in note and "model.layers.0.mlp.experts, 2 of 4" in note
    text = torch.randint(3, 96, (16, 40), generator=torch.Generator().manual_seed(9))
    seen: list[Tensor] = []
    for model in (original, quantized, plain):
        experts = model.model.layers[0].mlp.experts
        handle = experts.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        with torch.no_grad():
            model(text)
        handle.remove()
    for expert in (2, 3):  # sent all tokens for once
        chosen, share = torch.full((len(seen[0]), 1), expert), torch.ones(len(seen[0]), 1)
        with torch.no_grad():
            results = [m.model.layers[0].mlp.experts(x, chosen, share) for m, x in zip((original, quantized, plain), seen, strict=True)]
        assert float((results[1] - results[0]).norm()) < 0.9 * float((results[2] - results[0]).norm())


def test_statistics_are_those_of_the_tokens_that_reach_an_expert() -> None:
    """Divided by the smoothing scales, and filled up to as many tokens as there are channels."""
    generator = torch.Generator().manual_seed(0)
    scales, experts = torch.rand(8, generator=generator) + 0.5, torch.tensor([0, 0, 0, 0, 1])
    batches = []
    for held_out in (False, False, True):
        x0, chosen = torch.randn(20, 8, generator=generator), experts[torch.randint(5, (20, 1), generator=generator)]
        batches.append(Tokens(x0 / scales + 0.1, x0, chosen, held_out))
    batches[1].chosen[:] = 0  # leaves expert 1 a few tokens of the first batch
    statistics = _Statistics(batches, 2, 8, scales)
    z, mine = torch.cat([batch.x for batch in batches[:2] if batch.x is not None]), torch.cat([b.chosen[:, 0] for b in batches[:2]])
    for expert in (0, 1):
        reached = [(batch.chosen == expert).any(1).nonzero()[:, 0] for batch in batches]
        train, _ = statistics.of_inputs(reached)
        own, share = z[mine == expert], min(1.0, float((mine == expert).sum()) / 8)
        assert (share == 1) == (expert == 0) and share > 0
        torch.testing.assert_close(train.H, share * own.T @ own / len(own) + (1 - share) * z.T @ z / len(z))
        assert train.P is not None  # e is 0.1 everywhere
        torch.testing.assert_close(train.P, 0.1 * (share * own.mean(0) + (1 - share) * z.mean(0)).expand(8, 8), rtol=1e-4, atol=1e-5)
