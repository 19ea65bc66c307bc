"""Loading an AWQ checkpoint: names that transformers renames, modules it fuses, heads, and what the config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import Transpose, WeightConverter

from awq_hf import AwqConfig, AwqLinear, renaming
from awq_hf.linear import ScaledActivation

IDS = torch.arange(3, 15)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def load(path: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return auto.from_pretrained(path, **options)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copied(quantized_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_dir, tmp_path / "copy"))


# Names


def assert_round_trip(path: Path, plain: Any, again: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """It computes what the plain model computes, and is saved under the names it came with."""
    model = load(path, auto)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)
    model.save_pretrained(again)
    assert torch.equal(load(again, auto)(IDS).logits, model(IDS).logits)
    return model


def test_names_of_an_older_vision_language_checkpoint(
    random_model: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path
) -> None:
    """transformers renames them: language_model.model.layers -> model.language_model.layers."""
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlavaConfig(
        text_config=dict(model_type="llama", **SIZES),
        vision_config=dict(**vision, image_size=16, patch_size=8, projection_dim=32),
        image_token_index=90,
    )
    old = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    old |= {f"model.{part}": part for part in ("vision_tower", "multi_modal_projector")}

    def rename(name: str) -> str:
        start = next(start for start in old if name.startswith(start))
        return old[start] + name.removeprefix(start)

    plain = write_awq(transformers.LlavaForConditionalGeneration(config).eval(), tmp_path / "in", "language_model.layers", rename)
    model = assert_round_trip(tmp_path / "in", plain, tmp_path / "out", AutoModelForImageTextToText)
    assert sum(isinstance(module, AwqLinear) for module in model.modules()) == 14
    assert load_file(tmp_path / "in" / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    half = load(tmp_path / "in", AutoModelForImageTextToText, dtype=torch.bfloat16)
    assert all(
        p.dtype == (torch.float16 if ".scales" in n else torch.bfloat16) for n, p in half.named_parameters() if p.is_floating_point()
    )


@pytest.mark.parametrize("prefixed", [True, False])
def test_with_and_without_the_base_models_prefix(
    prefixed: bool, tiny_llama: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path
) -> None:
    plain = write_awq(tiny_llama(), tmp_path / "in", rename=str if prefixed else lambda name: name.removeprefix("model."))
    assert_round_trip(tmp_path / "in", plain, tmp_path / "out")
    body = load(tmp_path / "in", AutoModel)
    assert torch.equal(body(IDS).last_hidden_state, load(tmp_path / "in").model(IDS).last_hidden_state)


def test_modules_are_those_of_the_file_whatever_the_list_says(
    tiny_llama: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path
) -> None:
    listed = ["self_attn", "lm_head"]
    plain = write_awq(tiny_llama(), tmp_path / "in", "q_proj", modules_to_not_convert=listed)
    model = assert_round_trip(tmp_path / "in", plain, tmp_path / "out")
    assert [name for name, m in model.named_modules() if isinstance(m, AwqLinear)] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"] == listed


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head(tied: bool, tiny_llama: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path) -> None:
    """Where the config ties it to the embedding, the file shows that it is not tied."""
    source = tiny_llama()
    source.config.tie_word_embeddings = tied
    plain = write_awq(source, tmp_path / "in", "")
    model = assert_round_trip(tmp_path / "in", plain, tmp_path / "out")
    assert isinstance(model.lm_head, AwqLinear) and not model.config.tie_word_embeddings
    model.tie_weights()
    assert not hasattr(model.lm_head, "weight")


def test_scaled_activations(random_model: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path) -> None:
    """AutoAWQ divides the output of a GELU where no weight can take the scales up: falcon, mpt, gpt-neox and others."""
    config = transformers.FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    source = random_model(config)
    scales = {f"transformer.h.{i}.mlp.act.scales": torch.rand(256).half() + 0.5 for i in range(2)}
    write_awq(source, tmp_path / "in", ".h.", changes=scales)
    for i, block in enumerate(source.transformer.h):
        divisor = scales[f"transformer.h.{i}.mlp.act.scales"].float()
        block.mlp.act.register_forward_hook(lambda _module, _args, output, divisor=divisor: output / divisor)
    model = assert_round_trip(tmp_path / "in", source, tmp_path / "out")
    assert isinstance(model.transformer.h[0].mlp.act, ScaledActivation)
    assert scales.keys() <= load_file(tmp_path / "out" / "model.safetensors").keys()
    with pytest.raises(ValueError, match=r"h.0.mlp.act divides its outputs"):
        model.dequantize()


# Mixtures of experts


@pytest.fixture(scope="module")
def moe(random_model: Callable[..., Any]) -> Any:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1, head_dim=16)
    return random_model(transformers.Qwen3MoeConfig(**SIZES, **experts))


def test_experts_in_float_beside_quantized_attention(moe: Any, write_awq: Callable[..., Any], tmp_path: Path) -> None:
    """The float experts come one by one in the file, and transformers fuses them."""
    changes: dict[str, Tensor | None] = {}
    for name, tensor in moe.state_dict().items():
        if ".experts." in name:
            changes[name] = None
            parts = {"gate_proj": tensor[:, :32], "up_proj": tensor[:, 32:]} if "gate_up" in name else {"down_proj": tensor}
            start = name.rpartition(".")[0]
            changes |= {f"{start}.{e}.{part}.weight": weights[e] for part, weights in parts.items() for e in range(4)}
    plain = write_awq(moe, tmp_path / "in", "self_attn", changes=changes)
    assert_round_trip(tmp_path / "in", plain, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == load_file(tmp_path / "in" / "model.safetensors").keys()


def test_modules_that_transformers_rearranges_are_refused(quantized_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and split projections: what is done to a matrix cannot be done to its packed integers."""
    turned = WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(renaming, "get_model_conversion_mapping", lambda _model: [turned])
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.qweight cannot be loaded: transformers rearranges .*Transpose"):
        load(quantized_dir)


# What the config says


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"bits": 8, "version": None}, r"for 8 bits.*; the tensors look like bits=4, group_size=32, version 'gemm'"),
        ({"bits": 3, "version": "awq_hf"}, "look like bits=4"),
        ({"bits": 8}, "version 'gemm' with 8 bits cannot be read"),
        ({"group_size": 16}, r"qzeros is I32 \[3, 8\], expected I32 \[6, 8\] for .*; the tensors look like bits=4, group_size=32"),
        ({"group_size": -1}, "look like bits=4, group_size=32"),
        ({"group_size": 64}, "in_features 96 is not divisible by group_size 64; .*look like bits=4, group_size=32"),
        ({"bits": "4"}, "bits='4'"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"bits": True}, "bits=True"),
        ({"bits": [4]}, r"bits=\[4\]"),
        ({"group_size": "128"}, "group_size='128'"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": {}}, "group_size={}"),
        ({"zero_point": "no"}, "zero_point='no'"),
        ({"zero_point": 1}, "zero_point=1"),
        ({"version": 4}, "version=4"),
        ({"version": ""}, "version '' is not known"),
        ({"modules_to_not_convert": "lm_head"}, "give a list"),
        ({"modules_to_not_convert": [1]}, r"\[1\] is not a list of strings"),
        ({"modules_to_not_convert": 7}, "7 is not a list of strings"),
    ],
)
def test_a_config_that_cannot_be_true(changes: dict[str, Any], told: str, copied: Path) -> None:
    edit_config(copied, **changes)
    with pytest.raises(ValueError, match=told):
        load(copied)


def test_missing_keys_have_the_defaults_of_the_format(
    tiny_llama: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path
) -> None:
    plain = write_awq(tiny_llama(), tmp_path / "in", bits=None, zero_point=None, version=None)
    assert_round_trip(tmp_path / "in", plain, tmp_path / "out")
    edit_config(tmp_path / "in", group_size=None)
    with pytest.raises(ValueError, match="group_size 128.*look like bits=4, group_size=32"):
        load(tmp_path / "in")


def test_a_float_checkpoint_that_says_awq(llama_dir: Path, copied: Path) -> None:
    shutil.copy(llama_dir / "model.safetensors", copied)
    with pytest.raises(ValueError, match=r"no tensor of the checkpoint is named \*.qweight"):
        load(copied)


@pytest.mark.parametrize("version", ["gemv", "marlin", "anything"])
def test_only_our_own_layouts_are_written(version: str) -> None:
    with pytest.raises(ValueError, match=f"version='{version}' can at most be read"):
        AwqConfig(version=version)
