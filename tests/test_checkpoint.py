"""Loading an AWQ checkpoint: names that transformers renames, what is refused by name, and that nothing is left random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers.core_model_loading import Transpose, WeightConverter

from awq_hf import AwqConfig, AwqLinear, compat
from awq_hf.linear import ScaledActivation

IDS = torch.arange(3, 15)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
Damage = Callable[[dict[str, Tensor]], Any]


def load(path: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return auto.from_pretrained(path, **options)


def damaged(source: Path, path: Path, damage: Damage) -> Path:
    """A copy of the checkpoint whose tensors went through `damage`."""
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    damage(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copied(quantized_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_dir, tmp_path / "copy"))


@pytest.fixture
def sharded(quantized_dir: Path, tmp_path: Path) -> Path:
    load(quantized_dir).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def index_of(path: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((path / "model.safetensors.index.json").read_text())
    return index


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


def test_quantized_experts_are_refused(moe: Any, write_awq: Callable[..., Any], tmp_path: Path) -> None:
    parts = [f"{e}.{p}" for e in range(4) for p in ("gate_proj", "up_proj", "down_proj")]
    experts: dict[str, Tensor | None] = {
        f"model.layers.{layer}.mlp.experts.{part}.{suffix}": torch.zeros(1, dtype=torch.int32)
        for layer in range(2)
        for part in parts
        for suffix in ("qweight", "qzeros", "scales")
    }
    experts |= {f"model.layers.{layer}.mlp.experts.{part}": None for layer in range(2) for part in ("gate_up_proj", "down_proj")}
    write_awq(moe, tmp_path / "m", "self_attn", changes=experts)
    told = r"layers.0.mlp.experts.0.down_proj.qweight belongs to experts .*Qwen3MoeForCausalLM.* fused experts are not supported yet"
    with pytest.raises(ValueError, match=told):
        load(tmp_path / "m")


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
    monkeypatch.setattr(compat, "get_model_conversion_mapping", lambda _model: [turned])
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.qweight cannot be loaded: transformers rearranges .*Transpose"):
        load(quantized_dir)


# Files


@pytest.mark.parametrize("cut", [0, 4, 8, 40, 5_000, -1])
def test_truncated_files_are_named(cut: int, copied: Path) -> None:
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*downloaded to its end"):
        load(copied)


@pytest.mark.parametrize("junk", [b"junk" * 1000, (2**60).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b"\0" * 64])
def test_junk_is_named(junk: bytes, copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(junk)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(copied)


def test_a_damaged_float_checkpoint_is_named(llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path / "m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load(tmp_path / "m", quantization_config=small_config())


def test_pickled_files_are_not_opened(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file, and pickled files are not opened"):
        load(copied)


def test_shards(sharded: Path, quantized_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(quantized_dir)(IDS).logits
    assert torch.equal(load(sharded)(IDS).logits, expected)
    monkeypatch.chdir(sharded.parent)
    (sharded.parent / "deeper").mkdir()
    for relative in (Path("sharded"), Path("deeper/../sharded")):
        assert torch.equal(load(relative)(IDS).logits, expected)


def test_shards_may_be_links(sharded: Path, tmp_path: Path, quantized_dir: Path) -> None:
    (tmp_path / "cache").mkdir()
    for shard in sharded.glob("*.safetensors"):
        shard.rename(tmp_path / "cache" / shard.name)
        shard.symlink_to(tmp_path / "cache" / shard.name)
    assert torch.equal(load(sharded)(IDS).logits, load(quantized_dir)(IDS).logits)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        load(sharded)


def test_an_index_that_names_a_tensor_which_its_shard_lacks(sharded: Path) -> None:
    index = index_of(sharded)
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    for wrong in ({name: shards[1]}, {"model.layers.7.mlp.up_proj.qweight": shards[0]}):
        written = {**index, "weight_map": {**index["weight_map"], **wrong}}
        (sharded / "model.safetensors.index.json").write_text(json.dumps(written))
        with pytest.raises(
            ValueError, match=f"index.json places {next(iter(wrong))} in {next(iter(wrong.values()))}, which does not hold it"
        ):
            load(sharded)


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_points_out_of_the_folder(absolute: bool, sharded: Path, tmp_path: Path) -> None:
    index = index_of(sharded)
    shard = next(iter(index["weight_map"].values()))
    (sharded / shard).rename(tmp_path / shard)
    elsewhere = str(tmp_path / shard) if absolute else f"../{shard}"
    index["weight_map"] = {name: elsewhere if file == shard else file for name, file in index["weight_map"].items()}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{shard}, which is outside of .*sharded"):
        load(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(one).items()))
    save_file({**load_file(other), name: tensor}, other, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is in .*{one.name} and in .*{other.name}"):
        load(sharded)


# Tensors of the whole model


def _set(name: str, value: Any) -> Damage:
    """Put `value` into the second place of a tensor."""
    return lambda tensors: tensors[name].view(-1).__setitem__(1, value)


def _cast(name: str, dtype: torch.dtype) -> Damage:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def _add(name: str, tensor: Tensor) -> Damage:
    return lambda tensors: tensors.update({name: tensor})


def _pop(name: str) -> Damage:
    return lambda tensors: tensors.pop(name)


NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "damage, told",
    [
        (_pop(NORM), f"{NORM} is missing"),
        (_pop(EMBEDDING), f"{EMBEDDING} is missing"),
        (_pop("lm_head.weight"), "lm_head.weight is missing"),
        (_pop(f"{Q_PROJ}.bias"), f"{Q_PROJ}.bias is missing"),
        (_add("model.layers.0.mlp.act.weight", torch.zeros(3)), "model.layers.0.mlp.act.weight is in the checkpoint, but LlamaForCausalLM"),
        (_add("nothing", torch.zeros(3)), "nothing is in the checkpoint, but LlamaForCausalLM has no place for it"),
        (_add(f"{Q_PROJ}.weight", torch.zeros(64, 64)), f"{Q_PROJ}.weight is in the checkpoint"),
        (_add(f"{Q_PROJ}.g_idx", torch.zeros(64, dtype=torch.int32)), f"{Q_PROJ}.g_idx is in the checkpoint"),
        (_add("model.embed_tokens.qweight", torch.zeros(1)), "model.embed_tokens.qweight is in the checkpoint, but .* no Linear"),
        (_add("embed_tokens.weight", torch.zeros(96, 64)), "embed_tokens.weight and .*embed_tokens.weight are both model.embed_tokens"),
        (_add(EMBEDDING, torch.zeros(95, 64)), rf"{EMBEDDING} in .*safetensors is F32 \[95, 64\], but .* is \[96, 64\]"),
        (_add(f"{Q_PROJ}.bias", torch.zeros(63)), rf"{Q_PROJ}.bias is F32 \[63\], expected F16 or BF16 or F32 \[64\]"),
        (_add(f"{Q_PROJ}.bias", torch.zeros(64, dtype=torch.int32)), f"{Q_PROJ}.bias is I32"),
        (_cast(NORM, torch.int32), rf"{NORM} in .* is I32 \[64\], but .* is torch.float32"),
        (_cast(EMBEDDING, torch.bool), f"{EMBEDDING} in .* is BOOL"),
        (_cast(f"{Q_PROJ}.qweight", torch.float32), f"{Q_PROJ}.qweight is F32"),
        (_cast(f"{Q_PROJ}.qzeros", torch.int16), f"{Q_PROJ}.qzeros is I16"),
        (_cast(f"{Q_PROJ}.scales", torch.float64), f"{Q_PROJ}.scales is F64"),
        (_set(f"{Q_PROJ}.scales", float("nan")), f"{Q_PROJ}.scales in .*model.safetensors holds NaN"),
        (_set(f"{Q_PROJ}.scales", float("-inf")), f"{Q_PROJ}.scales in .* holds NaN or infinity"),
        (_set(f"{Q_PROJ}.bias", float("nan")), f"{Q_PROJ}.bias in .* holds NaN"),
        (_set(NORM, float("inf")), f"{NORM} in .* holds NaN"),
        (_set(EMBEDDING, float("nan")), f"{EMBEDDING} in .* holds NaN"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(damage: Damage, told: str, quantized_dir: Path, tmp_path: Path) -> None:
    path = damaged(quantized_dir, tmp_path / "m", damage)
    with pytest.raises(ValueError, match=told):
        load(path)


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, ON_DISK])
def test_values_are_checked_wherever_they_are(device_map: Any, quantized_dir: Path, tmp_path: Path) -> None:
    path = damaged(quantized_dir, tmp_path / "m", _set("model.layers.1.mlp.up_proj.scales", float("nan")))
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.scales in .* holds NaN"):
        load(path, device_map=device_map, offload_folder=tmp_path)


def test_values_that_only_the_chosen_dtype_cannot_hold(quantized_dir: Path, tmp_path: Path) -> None:
    path = damaged(quantized_dir, tmp_path / "m", _set(NORM, 1e6))
    assert load(path, dtype=torch.bfloat16) is not None
    with pytest.raises(ValueError, match=rf"{NORM} in .* beyond torch.float16"):
        load(path, dtype=torch.float16)


def test_values_are_looked_at_in_parts(quantized_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_hf.checkpoint.CHUNK", 100)
    path = damaged(quantized_dir, tmp_path / "m", lambda tensors: tensors[EMBEDDING].view(-1).__setitem__(-1, float("nan")))
    sizes: list[int] = []
    plain = torch.isfinite

    def counted(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return plain(tensor)

    monkeypatch.setattr(torch, "isfinite", counted)
    with pytest.raises(ValueError, match=EMBEDDING):
        load(path)
    assert max(sizes) == 100 and len(sizes) >= 96 * 64 // 100


def test_many_problems_are_counted(quantized_dir: Path, tmp_path: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"(?s)not fit the model:\n  model.layers.1.input_layernorm.weight is missing.*\n  and 8 more"):
        load(damaged(quantized_dir, tmp_path / "m", strip))


def test_nothing_of_the_check_stays_on_the_model(quantized_dir: Path, llama_dir: Path, small_config: Callable[..., Any]) -> None:
    for model in (load(quantized_dir), load(llama_dir, quantization_config=small_config(samples=2))):
        assert "_adjust_missing_and_unexpected_keys" not in vars(model)
        assert model.hf_quantizer.loading is None


# Other heads


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_another_head_on_the_body(auto: Any, quantized_dir: Path, tmp_path: Path) -> None:
    """The head that is left behind, and the new one, are what the user asked for; the body must be whole all the same."""
    body = load(quantized_dir, auto)
    body = getattr(body, "model", body)
    assert torch.equal(body(IDS).last_hidden_state, load(quantized_dir).model(IDS).last_hidden_state)
    for damage, told in (
        (_pop(NORM), "input_layernorm.weight is missing"),
        (_add("model.layers.0.x", torch.zeros(1)), "model.layers.0.x is in"),
    ):
        path = damaged(quantized_dir, tmp_path / told.split()[0], damage)
        with pytest.raises(ValueError, match=told):
            load(path, auto)


def test_a_body_gets_no_random_language_model_head(quantized_dir: Path, tmp_path: Path) -> None:
    load(quantized_dir, AutoModel).save_pretrained(tmp_path)
    assert load(tmp_path, AutoModel) is not None
    with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
        load(tmp_path)


def test_a_quantized_head_that_is_left_behind(tiny_llama: Callable[..., Any], write_awq: Callable[..., Any], tmp_path: Path) -> None:
    write_awq(tiny_llama(), tmp_path / "m", "")
    expected = load(tmp_path / "m").model(IDS).last_hidden_state
    assert torch.equal(load(tmp_path / "m", AutoModel)(IDS).last_hidden_state, expected)
    assert torch.equal(load(tmp_path / "m", AutoModelForSequenceClassification).model(IDS).last_hidden_state, expected)


def test_tensors_that_the_architecture_leaves_out(quantized_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of some architectures hold layers that predict further tokens, which transformers has no code for."""
    extra = {f"mtp.layers.0.up_proj.{part}": torch.zeros(1, dtype=torch.int32) for part in ("qweight", "qzeros", "scales")}
    path = damaged(quantized_dir, tmp_path / "m", lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match="mtp.layers.0.up_proj.qweight is in the checkpoint"):
        load(path)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    assert torch.equal(load(path)(IDS).logits, load(quantized_dir)(IDS).logits)


# Quantizing on the spot


@pytest.mark.parametrize(
    "damage, told",
    [
        (_pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (_pop(EMBEDDING), f"{EMBEDDING} is missing"),
        (_pop("model.norm.weight"), "model.norm.weight is missing"),
        (_add(f"{Q_PROJ}.weight", torch.zeros(64, 60)), rf"{Q_PROJ}.weight is \[64, 60\], expected \[64, 64\]"),
        (_add(f"{Q_PROJ}.qweight", torch.zeros(8, 8)), f"{Q_PROJ}.qweight: the checkpoint is quantized already"),
    ],
)
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_random_weights_are_not_quantized(
    damage: Damage, told: str, ignore_mismatched_sizes: bool, llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path
) -> None:
    path = damaged(llama_dir, tmp_path / "m", damage)
    with pytest.raises(ValueError, match=told):
        load(path, quantization_config=small_config(samples=2), ignore_mismatched_sizes=ignore_mismatched_sizes)


def test_a_new_head_is_left_to_transformers(llama_dir: Path, small_config: Callable[..., Any]) -> None:
    model = load(llama_dir, AutoModelForSequenceClassification, quantization_config=small_config(samples=2))
    assert isinstance(model.score, nn.Linear)


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
