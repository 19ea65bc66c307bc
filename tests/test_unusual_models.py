"""Models that are not like the others: layers left out, experts, shapes that do not fit, and what is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import awq_hf
from awq_hf.block import BlockWork

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def relative_error(changed: Any, original: Any, prompt: Tensor) -> float:
    with torch.no_grad():
        expected = original(prompt).logits
        return float((changed(prompt).logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


@pytest.mark.parametrize("skip", ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "layers.0"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_layers_that_stay_float_keep_the_function(
    skip: str, group_size: int, tiny_llama: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor
) -> None:
    """Producers or consumers of a fold that are not quantized still take part in it, whether or not groups would fit them."""
    original = tiny_llama(intermediate_size=96 if group_size == 32 or skip == "down_proj" else 128)
    expected = {name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear) and skip in name}
    config = small_config(bits=8, group_size=group_size, modules_to_not_convert=[skip])
    quantized = awq_hf.quantize(tiny_llama(intermediate_size=original.config.intermediate_size), config)
    reasons = quantized.awq_report.left_in_float
    assert {name for name, reason in reasons.items() if reason == "modules_to_not_convert"} == expected
    assert relative_error(quantized, original, prompt) < 0.03


def test_fused_experts_that_stay_float_are_reported(random_model: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    for skip, told in (("experts", "modules_to_not_convert"), ("down_proj", "modules_to_not_convert or overrides name some")):
        quantized = awq_hf.quantize(random_model(config), small_config(modules_to_not_convert=[skip]))
        for index in range(2):
            assert quantized.awq_report.left_in_float[f"model.layers.{index}.mlp.experts"].startswith(told)


def test_keys_and_values_that_later_blocks_share_are_handed_on(
    random_model: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor
) -> None:
    """Gemma 3n: the last two blocks read keys and values of earlier ones. Small matrices stay float, and one that runs twice."""
    config = transformers.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=16,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        sliding_window=8,
    )
    quantized = awq_hf.quantize(random_model(config), small_config(bits=8))
    assert relative_error(quantized, random_model(config), prompt) < 0.03
    reasons = {name: why for name, why in quantized.awq_report.left_in_float.items() if "altup.correction_coefs" in name}
    assert len(reasons) == 4 and set(reasons.values()) == {"small, and in_features 4 is not divisible by group_size 32"}
    routers = [why for name, why in quantized.awq_report.left_in_float.items() if "modality_router" in name]
    assert routers == ["it runs 2 times in its block"] * 4


def test_modules_whose_initialization_reaches_for_weights_are_loaded(
    random_model: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, tmp_path: Any
) -> None:
    """Mamba 2's mixers have parameters of their own beside the Linears that they initialize."""
    config = transformers.Mamba2Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=16, num_heads=8, head_dim=16, n_groups=1
    )
    quantized = awq_hf.quantize(random_model(config), small_config(samples=2))
    quantized.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(prompt).logits, quantized(prompt).logits)


def test_overrides_are_stored_and_loaded(
    tiny_llama: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, tmp_path: Any
) -> None:
    overrides = {"layers.0.self_attn.q_proj": None, "self_attn": {"bits": 8}, "down_proj": {"bits": 2, "group_size": 16}}
    quantized = awq_hf.quantize(tiny_llama(), small_config(overrides=overrides))
    specs = {name: (m.spec.bits, m.spec.group_size) for name, m in quantized.named_modules() if isinstance(m, awq_hf.AwqLinear)}
    assert "model.layers.0.self_attn.q_proj" not in specs and specs["model.layers.1.self_attn.q_proj"] == (8, 32)
    assert specs["model.layers.0.mlp.down_proj"] == (2, 16) and specs["model.layers.1.mlp.up_proj"] == (4, 32)
    quantized.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(prompt).logits, quantized(prompt).logits)
    written = loaded.config.quantization_config.to_dict()
    assert written["version"] == "awq_hf" and "layers.0.self_attn.q_proj" not in written["overrides"]
    assert written["modules_to_not_convert"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert any("vLLM loads q_proj, k_proj, v_proj as one matrix" in note for note in quantized.awq_report.notes)


@pytest.mark.parametrize(
    "auto, config, message",
    [
        (
            "AutoModelForMaskedLM",
            transformers.AlbertConfig(**SIZES | {"embedding_size": 32}),
            "calls albert.encoder.albert_layer_groups.0 2 times for one text",
        ),
        (
            "AutoModelForCausalLM",
            transformers.Zamba2Config(
                **SIZES | {"num_hidden_layers": 4},
                mamba_ngroups=1,
                n_mamba_heads=8,
                mamba_headdim=16,
                num_mem_blocks=1,
                layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            ),
            r"model\.layers\.3\.shared_transformer\.\S+ is model\.layers\.1\.shared_transformer\.\S+ as well",
        ),
        (
            "AutoModel",
            transformers.ViTConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
            ),
            "ViTModel has no embedding of tokens",
        ),
        (
            "AutoModelForSeq2SeqLM",
            transformers.T5Config(vocab_size=96, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16),
            "T5ForConditionalGeneration has an encoder and a decoder",
        ),
        (
            "AutoModelForCausalLM",
            transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8),
            r"dt_proj: in_features 4 is not divisible by group_size 32(.|\n)*modules_to_not_convert=\['dt_proj', 'x_proj'\]",
        ),
    ],
    ids=["albert", "zamba2", "vit", "t5", "mamba"],
)
def test_what_cannot_be_quantized_is_refused_with_its_reason(
    auto: str, config: Any, message: str, random_model: Callable[..., Any], small_config: Callable[..., Any]
) -> None:
    model = random_model(config, auto=getattr(transformers, auto))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        awq_hf.quantize(model, small_config())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing was changed"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockWork, "choose_scales", lambda self: pytest.fail(f"{self.name} was begun"))


T5: dict[str, Any] = dict(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)


@pytest.mark.usefixtures("no_work")
def test_a_weight_that_the_model_reads_itself_is_named_before_any_work(small_config: Callable[..., Any]) -> None:
    model = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(
        ValueError, match=r"block\.0\.layer\.1\.DenseReluDense\.wo: .* reads its 'weight'.* modules_to_not_convert=\['wo'\]"
    ):
        awq_hf.quantize(model, small_config())
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", [transformers.T5EncoderModel, transformers.UMT5EncoderModel])
def test_without_that_it_is_quantized(kind: Any, small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    original = kind(kind.config_class(**T5)).eval()
    original.save_pretrained(tmp_path / "float")
    config = small_config(bits=8, modules_to_not_convert=["wo"])
    kind.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(tmp_path / "awq")
    loaded, expected = kind.from_pretrained(tmp_path / "awq"), original(prompt)[0]
    assert (loaded(prompt)[0] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_model_that_changes_its_own_weights_is_refused(in_memory: bool, small_config: Callable[..., Any], tmp_path: Path) -> None:
    """RWKV divides two of a block's matrices when it first runs."""
    config = transformers.RwkvConfig(vocab_size=96, hidden_size=64, num_hidden_layers=4, context_length=96, rescale_every=2)
    model: Any = transformers.RwkvForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"changes rwkv\.blocks\.\d\.attention\.output\.weight itself.*rescale_every=0"):
        if in_memory:
            awq_hf.quantize(model, small_config())
        else:
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=small_config())
