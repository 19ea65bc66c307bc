"""The search of GGUF's types for fused experts, on a tiny mixture whose rows superblocks divide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from awq_hf.calibration.data import Windows, load_windows
from awq_hf.encoded_layer import Encoded, EncodedLayer, decode, encode
from awq_hf.encoding import encode_model
from awq_hf.experts import PARTS
from awq_hf.recipe import Recipe

EXPERTS = 4
MODULE = "model.layers.0.mlp.experts"
TYPES = dict(zip((f"{MODULE}.{part}" for part in PARTS), (Type.Q4_K, Type.Q6_K, Type.Q3_K), strict=True))
RECIPE = Recipe(samples=24, seq_len=48)


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Any]) -> Any:
    """One block, so that no later router chooses others for what it puts out."""
    from transformers import Qwen3MoeConfig

    sizes = dict(vocab_size=96, hidden_size=256, moe_intermediate_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=128)
    return random_model(Qwen3MoeConfig(**sizes, **heads, norm_topk_prob=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))


@pytest.fixture(scope="module")
def windows() -> Windows:
    text = [torch.randint(3, 96, (48,), generator=torch.Generator().manual_seed(i)) for i in range(24)]
    return load_windows(text, None, RECIPE.seq_len, samples=RECIPE.samples, seed=0)


@pytest.fixture(scope="module")
def searched(model: Any, windows: Windows) -> tuple[Any, Encoded]:
    own = copy.deepcopy(model)
    return own, encode_model(own, TYPES, RECIPE, windows)


def parts_in(model: Any, part: str) -> Tensor:
    """[experts, out, in]"""
    experts = model.get_submodule(MODULE)
    return experts.down_proj.data if part == "down_proj" else experts.gate_up_proj.data.chunk(2, 1)[part == "up_proj"]


def lines(encoded: Encoded) -> list[EncodedLayer]:
    assert encoded.report is not None
    return encoded.report.layers  # type: ignore[return-value]


def test_the_model_holds_what_the_blocks_say(searched: Any) -> None:
    found, encoded = searched
    assert encoded.weights.keys() == {f"{name}.{expert}" for name in TYPES for expert in range(EXPERTS)}
    for name, kind in TYPES.items():
        for expert in range(EXPERTS):
            weight = encoded.weights[f"{name}.{expert}"]
            assert (weight.kind, weight.shape) == (kind.name, (256, 256))
            assert torch.equal(decode(weight.data, kind), parts_in(found, name.rpartition(".")[2])[expert])


def test_every_part_is_reported_and_better_than_its_quantizer_alone(searched: Any) -> None:
    report = searched[1].report
    about = lines(searched[1])
    assert [(line.name, line.kind, line.experts) for line in about] == [(name, kind.name, EXPERTS) for name, kind in TYPES.items()]
    assert [line.fold for line in about] == ["post_attention_layernorm"] * 2 + ["mlp.experts.gate_up_proj"]
    for line in about:
        assert 0 < line.loss < line.loss_importance and line.loss < 0.9 * line.loss_plain
        assert "descent" in line.rounding and not line.few_tokens
    assert {"importance of experts", "scale search", "encoding", "rounding", "held-out check"} <= report.seconds.keys()


def test_the_model_is_nearer_to_the_float_one_than_with_the_quantizers_alone(model: Any, searched: Any, windows: Windows) -> None:
    alone = copy.deepcopy(model)
    encode_model(alone, TYPES, Recipe(samples=24, seq_len=48, scale=None, correction=False, rounding="nearest", stream="float"), windows)
    text = torch.randint(3, 96, (32, 40), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        p, ours, theirs = (each(text).logits.log_softmax(-1) for each in (model, searched[0], alone))
    kl = lambda q: float((p.exp() * (p - q)).sum(-1).mean())  # noqa: E731
    assert kl(ours) < 0.95 * kl(theirs)


def test_importance_is_of_the_tokens_that_the_router_sends(model: Any, searched: Any, windows: Windows) -> None:
    encoded, seen = searched[1], []
    handle = model.get_submodule(MODULE).register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        for batch in windows.batches(RECIPE.batch_size):
            if not batch.held_out:
                model(batch.input_ids)
    handle.remove()
    x, chosen = (torch.cat(each) for each in zip(*seen, strict=True))
    for expert in range(EXPERTS):
        reached = x[(chosen == expert).any(1)]
        h = model.get_submodule(MODULE)._apply_gate(reached @ model.get_submodule(MODULE).gate_up_proj[expert].T)
        for part, inputs in zip(PARTS, (reached, reached, h), strict=True):
            torch.testing.assert_close(encoded.importance[f"{MODULE}.{part}"][expert], inputs.square().mean(0), rtol=1e-3, atol=0)
            assert encoded.counts[f"{MODULE}.{part}"][expert] == len(reached)


def test_an_expert_that_no_token_reaches_is_fitted_to_the_others(model: Any, windows: Windows) -> None:
    lonely = copy.deepcopy(model)
    experts = lonely.get_submodule(MODULE)
    experts.register_forward_pre_hook(lambda _, args: (args[0], torch.where(args[1] == EXPERTS - 1, 0, args[1]), *args[2:]))
    original = parts_in(lonely, "gate_proj")[-1].clone()
    few = windows.sample(8, 0)
    encoded = encode_model(lonely, TYPES, Recipe(samples=8, seq_len=48, scale=None, correction=False), few)
    for part in PARTS:
        assert encoded.counts[f"{MODULE}.{part}"][-1] == 0 and bool((encoded.importance[f"{MODULE}.{part}"][-1] == 1).all())
    plain = decode(encode(original, Type.Q4_K, None), Type.Q4_K)
    stored = parts_in(lonely, "gate_proj")[-1]
    assert all(EXPERTS - 1 in line.few_tokens for line in lines(encoded))
    assert encoded.report is not None and "experts in 1 layers were sent fewer calibration tokens" in " ".join(encoded.report.notes)
    assert not torch.equal(stored, plain) and (stored - original).norm() < 0.2 * original.norm()
    assert all(line.loss <= line.loss_plain for line in lines(encoded))


def test_a_row_that_blocks_do_not_divide_is_refused(model: Any, windows: Windows, random_model: Any) -> None:
    config = copy.deepcopy(model.config)
    config.moe_intermediate_size = 96
    narrow = random_model(config)
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.experts.down_proj: a row of 96 .* Q3_K's blocks of 256"):
        encode_model(narrow, TYPES, RECIPE, windows)
