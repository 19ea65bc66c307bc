"""Damaged checkpoints: what is missing, left over, misshapen or not finite is refused by name, and nothing is left random."""

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
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = torch.arange(3, 15)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"
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
    monkeypatch.setattr("awq_hf.stored.CHUNK", 100)
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
