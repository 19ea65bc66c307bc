"""What inspect() says of a float checkpoint is what a run does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import awq_hf
from awq_hf.blocks import block_signature
from awq_hf.headers import read_headers
from awq_hf.inspection import Forecast, folds, inspect, source
from awq_hf.streaming import load_float
from awq_hf.wording import starred

SIZES = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, pad_token_id=0)
GLU = dict(SIZES, intermediate_size=96, num_key_value_heads=2)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(GLU, attention_bias=True, tie_word_embeddings=True)),
    "gemma3": ("Gemma3TextConfig", dict(GLU, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])),
    "phi3": ("Phi3Config", GLU),
    "opt": ("OPTConfig", dict(SIZES, word_embed_proj_dim=64, ffn_dim=96)),
    "neox": ("GPTNeoXConfig", dict(SIZES, intermediate_size=96)),
    "gpt2": ("GPT2Config", dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128)),
    # fused experts, for which transformers converts what is in the file; and blocks of two kinds
    "qwen3 moe": ("Qwen3MoeConfig", dict(GLU, **MOE, head_dim=16, num_experts=4, mlp_only_layers=[0])),
}


def forecast_of(*arguments: Any, **options: Any) -> Forecast:
    found = inspect(*arguments, **options)
    assert isinstance(found, Forecast)
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, random_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, sizes = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("inspect") / "float"
    random_model(getattr(transformers, name)(**sizes), torch.bfloat16).save_pretrained(path)
    return path


def test_what_it_says_is_what_a_run_does(checkpoint: Path, small_config: Callable[..., Any], tmp_path: Path) -> None:
    kind = json.loads((checkpoint / "config.json").read_text())["model_type"]
    options = dict(modules_to_not_convert=[{"gpt_neox": "1.attention.dense", "gpt2": "1.attn.c_proj"}.get(kind, "1.self_attn.o")])
    said = forecast_of(str(checkpoint), small_config(**options))
    model = awq_hf.quantize(checkpoint, small_config(**options))
    report = model.awq_report
    prefix = f"{said.blocks}.*."

    done: dict[tuple[str, str | None], int] = {}
    for layer in report.layers:
        key = starred(layer.name).removeprefix(prefix), layer.fold
        done[key] = done.get(key, 0) + 1
    assert {(kind.name, kind.fold): kind.count for kind in said.kinds if kind.bits_per_weight} == done
    assert len(done) >= 4 and any(fold for _, fold in done)

    kinds = {prefix + kind.name: (kind.count, kind.reason) for kind in said.kinds if kind.reason}
    staying = kinds | said.left_in_float
    assert not kinds.keys() & said.left_in_float.keys()
    counted: dict[str, tuple[int, str]] = {}
    for name, reason in report.left_in_float.items():
        counted[starred(name)] = counted.get(starred(name), (0, ""))[0] + 1, reason
    assert staying == counted and "modules_to_not_convert" in {reason for _, reason in staying.values()}

    model.save_pretrained(tmp_path)
    stored = read_headers([str(tmp_path / "model.safetensors")])
    packed = {name: source.stored_bytes(info) for name, info in stored.items() if name.endswith((".qweight", ".qzeros", ".scales"))}
    assert sum(said.result_bytes.values()) == sum(map(source.stored_bytes, stored.values()))
    assert said.result_bytes["quantized"] == sum(packed.values())
    assert said.result_bits_per_weight == 8 * sum(packed.values()) / sum(layer.experts * math.prod(layer.shape) for layer in report.layers)
    assert said.bytes_on_disk == sum(map(source.stored_bytes, read_headers([str(checkpoint / "model.safetensors")]).values()))
    assert said.parameters == sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    assert (said.class_name, said.dtype, said.block_count, said.refusal) == (type(model).__name__, "bfloat16", 2, None)


def test_blocks_of_every_kind_are_probed_once(checkpoint: Path, small_config: Callable[..., Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    said = forecast_of(str(checkpoint), small_config())
    assert said.probed == ([0, 1] if "MoeFor" in said.class_name else [0])
    assert len({block_signature(block) for block in model.get_submodule(said.blocks)}) == len(said.probed)


def test_no_weights_but_those_of_the_probed_block_are_loaded(
    llama_dir: Path, small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = load_float(transformers.AutoModelForCausalLM, llama_dir)
    monkeypatch.setattr(folds, "load_float", lambda *_, **__: (model, source))
    assert forecast_of(str(llama_dir), small_config()).probed == [0]
    whole = dict(transformers.AutoModelForCausalLM.from_pretrained(llama_dir).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.is_meta if "layers.1." in name else torch.equal(parameter, whole[name])


def test_a_sharded_checkpoint(llama_dir: Path, tmp_path: Path, small_config: Callable[..., Any]) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(llama_dir).save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    one, many = forecast_of(str(llama_dir), small_config()), forecast_of(str(tmp_path), small_config())
    assert (many.kinds, many.bytes_on_disk, many.result_bytes) == (one.kinds, one.bytes_on_disk, one.result_bytes)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} cannot be read"):
        inspect(str(tmp_path))


def test_shapes_that_do_not_divide(llama_dir: Path, small_config: Callable[..., Any]) -> None:
    said = forecast_of(str(llama_dir), small_config(group_size=64))
    (down,) = (kind for kind in said.kinds if kind.reason)
    assert (down.name, down.count, down.bits_per_weight, down.group_sizes) == ("mlp.down_proj", 2, None, (-1, 16, 32))
    assert down.reason is not None and "in_features 96" in down.reason and said.refusal is not None and "2 layers" in said.refusal
    with pytest.raises(ValueError) as error:
        awq_hf.quantize(llama_dir, small_config(group_size=64))
    assert str(error.value) == said.refusal


def test_options_change_what_is_stored(llama_dir: Path, small_config: Callable[..., Any]) -> None:
    wide = forecast_of(str(llama_dir), small_config(bits=8, zero_point=False), dtype="float16")
    assert wide.spec == {"bits": 8, "group_size": 32, "symmetric": True} and wide.result_bits_per_weight == 8 + 24 / 32
    assert wide.dtype == "float16" and wide.result_bytes["embeddings"] == 2 * 2 * 96 * 64
    assert wide.calibration == {"samples": 8, "seq_len": 48}


def test_models_without_linears(random_model: Callable[..., Any], small_config: Callable[..., Any], llama_dir: Path) -> None:
    said = forecast_of(str(llama_dir), small_config(modules_to_not_convert=["layers"]))
    assert said.refusal is not None and "no Linear of LlamaForCausalLM is left to quantize" in said.refusal
    assert (said.memory, said.seconds, said.fits, said.result_bits_per_weight) == ({}, None, None, None)
    assert said.result_bytes["quantized"] == 0 and sum(said.result_bytes.values()) == said.bytes_on_disk


def test_overrides_and_blocks_that_are_skipped(llama_dir: Path, small_config: Callable[..., Any]) -> None:
    options = dict(overrides={"down_proj": {"bits": 2, "group_size": 16}}, modules_to_not_convert=["layers.0."])
    said = forecast_of(str(llama_dir), small_config(**options))
    down = {kind.bits_per_weight: kind.count for kind in said.kinds if kind.name == "mlp.down_proj"}
    assert down == {None: 1, 2 + 18 / 16: 1}
    assert said.memory["statistics and rounding"] > 4 * 7 * 96**2  # of block 1, though block 0 is skipped


def test_a_block_that_cannot_be_tried_by_itself(random_model: Callable[..., Any], small_config: Callable[..., Any], tmp_path: Path) -> None:
    """Gemma 3n: later blocks read keys and values of earlier ones, of which only the first is loaded."""
    config = transformers.Gemma3nTextConfig(
        **{**GLU, "num_hidden_layers": 6},
        head_dim=16,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=32,
        layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.0] * 6,
        sliding_window=8,
    )
    random_model(config).save_pretrained(tmp_path)
    said = forecast_of(str(tmp_path), small_config(bits=8))
    report = awq_hf.quantize(tmp_path, small_config(bits=8)).awq_report
    done = {(starred(layer.name).removeprefix("model.layers.*."), layer.fold) for layer in report.layers}
    assert {(kind.name, kind.fold) for kind in said.kinds if kind.bits_per_weight and kind.probed} <= done
    assert (said.probed, list(said.not_probed)) == ([0], [4]) and said.seconds is not None
    staying = {kind.name: kind.reason for kind in said.kinds if kind.reason}
    assert staying["altup.modality_router"] == "it runs 2 times in its block"
