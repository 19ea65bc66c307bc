"""Inside from_pretrained: dtypes, shards, devices, what is refused before work, and what a damaged checkpoint says."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import awq_hf
from awq_hf import AwqConfig, AwqHfQuantizer, AwqLinear, hf_quantizer

Q_PROJ = "model.layers.0.self_attn.q_proj"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantized(path: Path, config: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **options)


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def dtypes_of(model: nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """(of the scales, of every other floating parameter)."""
    named = [(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()]
    scales = {dtype for name, dtype in named if name.endswith(".scales")}
    return scales, {dtype for name, dtype in named if not name.endswith(".scales")}


# Dtypes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_the_dtype_of_the_checkpoint(
    dtype: torch.dtype, tied: bool, tiny_llama: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    tiny_llama(dtype, tie_word_embeddings=tied).save_pretrained(tmp_path / "float")
    model = quantized(tmp_path / "float", small_config())
    assert model.dtype == dtype and dtypes_of(model) == ({torch.float16}, {dtype})
    model.save_pretrained(tmp_path / "awq")
    written = load_file(tmp_path / "awq" / "model.safetensors")
    assert {t.dtype for name, t in written.items() if name.endswith(".scales")} == {torch.float16}
    assert {t.dtype for name, t in written.items() if name.endswith(("norm.weight", ".bias"))} == {dtype}
    assert ("lm_head.weight" in written) is not tied
    loaded = load(tmp_path / "awq")
    assert dtypes_of(loaded) == ({torch.float16}, {dtype})
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_argument(dtype: torch.dtype, llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor) -> None:
    for model in (quantized(llama_dir, small_config(samples=2), dtype=dtype), load(quantized_dir, dtype=dtype)):
        assert model.dtype == dtype and dtypes_of(model) == ({torch.float16}, {dtype})
        assert model(prompt).logits.dtype == dtype


@pytest.mark.parametrize("surroundings", ["default dtype", "inference mode"])
def test_what_surrounds_a_run_changes_nothing(
    surroundings: str, llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any]
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if surroundings == "default dtype" else before)
    try:
        with torch.inference_mode(surroundings == "inference mode"):
            found = quantized(llama_dir, small_config()).state_dict()
    finally:
        torch.set_default_dtype(before)
    expected = load_file(quantized_dir / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_activations_that_do_not_fit_the_dtype_are_refused(tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    model = tiny_llama(torch.float16)
    model.model.layers[0].mlp.down_proj.weight.data *= 3e4
    with pytest.raises(ValueError, match=r"model\.layers\.0 gets or puts out NaN or infinity .* dtype='bfloat16'"):
        awq_hf.quantize(model, small_config())
    model.model.layers[0].mlp.down_proj.weight.data /= 3e4
    assert awq_hf.quantize(model, small_config(samples=2)).awq_report.layers  # nothing had been done


def test_scales_survive_a_cast_in_memory(quantized_dir: Path) -> None:
    model = load(quantized_dir)
    before = model.get_submodule(Q_PROJ).scales.clone()
    model.to(torch.bfloat16)
    assert dtypes_of(model) == ({torch.float16}, {torch.bfloat16})
    assert torch.equal(model.get_submodule(Q_PROJ).scales, before)


def test_quantized_parameters_are_frozen(llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any]) -> None:
    for model in (quantized(llama_dir, small_config(samples=2)), load(quantized_dir)):
        packed = [m for m in model.modules() if isinstance(m, AwqLinear)]
        assert len(packed) == 14 and not any(p.requires_grad for m in packed for p in m.parameters())
        assert not model.training


# Files and devices


def test_sharded_in_and_out(
    tiny_llama: Callable[..., Any], small_config: Callable[..., Any], quantized_dir: Path, prompt: Tensor, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "float", max_shard_size="40KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 3
    model = quantized(tmp_path / "float", small_config())
    model.save_pretrained(tmp_path / "awq", max_shard_size="20KB")
    assert len(list((tmp_path / "awq").glob("*.safetensors"))) > 3
    expected = load(quantized_dir)(prompt).logits
    assert torch.equal(model(prompt).logits, expected) and torch.equal(load(tmp_path / "awq")(prompt).logits, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="device_map='auto' would choose the GPU")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_one_device(device_map: Any, llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor) -> None:
    expected = load(quantized_dir)(prompt).logits
    assert torch.equal(quantized(llama_dir, small_config(), device_map=device_map)(prompt).logits, expected)
    assert torch.equal(load(quantized_dir, device_map=device_map)(prompt).logits, expected)


@pytest.mark.parametrize("device_map", [{"": "cpu", "lm_head": torch.device("cpu")}, {"lm_head": torch.device("cpu"), "": "cpu"}])
def test_one_device_in_two_spellings(device_map: Any, llama_dir: Path, small_config: Callable[..., Any]) -> None:
    """transformers itself loads by no such map; quantizing needs but the device."""
    assert quantized(llama_dir, small_config(samples=2), device_map=device_map).device == torch.device("cpu")


def test_a_gpu_in_two_spellings_is_one_device() -> None:
    for device_map in ({"": 0, "lm_head": "cuda:0"}, {"": torch.device("cuda", 0), "lm_head": 0}):
        assert AwqHfQuantizer(AwqConfig(), pre_quantized=False).place(device_map) is not None
    assert AwqHfQuantizer(AwqConfig(), pre_quantized=False).place({"": 0, "lm_head": 1}) is None


SPREAD = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize("device_map", [{"": "disk"}, {**SPREAD, "model.layers.1": "disk"}, {**SPREAD, "model.layers.1": 0}])
def test_offload_and_several_devices_are_refused(
    device_map: Any, llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="device_map"):
        quantized(llama_dir, small_config(), device_map=device_map, offload_folder=tmp_path)


def test_a_quantized_model_can_be_offloaded(quantized_dir: Path, prompt: Tensor, tmp_path: Path) -> None:
    offloaded = load(quantized_dir, device_map={**SPREAD, "model.layers.1": "disk"}, offload_folder=tmp_path)
    assert torch.equal(offloaded(prompt).logits, load(quantized_dir)(prompt).logits)


def test_weights_that_are_not_in_memory_are_refused(
    llama_dir: Path, tiny_llama: Callable[..., Any], small_config: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="not in memory"):
        quantized(llama_dir, small_config(), device_map="meta")
    with pytest.raises(ValueError, match="not in memory"):
        awq_hf.quantize(tiny_llama().to("meta"), small_config())


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads(auto_class: Any, llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor) -> None:
    model = auto_class.from_pretrained(llama_dir, quantization_config=small_config())
    decoder = model.get_decoder() if hasattr(model, "model") else model
    assert torch.equal(decoder(prompt).last_hidden_state, load(quantized_dir).model(prompt).last_hidden_state)


# Refused before the weights are loaded


def test_shapes_that_do_not_divide(
    llama_dir: Path, small_config: Callable[..., Any], prompt: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(AwqHfQuantizer, "postprocess_model", lambda *args, **kwargs: started.append(args))
    with pytest.raises(ValueError) as error:
        quantized(llama_dir, small_config(group_size=64))
    assert started == []
    message = str(error.value)
    for part in ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "96", "[-1, 16, 32]", "modules_to_not_convert=['down_proj']"):
        assert part in message
    monkeypatch.undo()
    model = quantized(llama_dir, small_config(group_size=64, modules_to_not_convert=["down_proj"]))
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear) and isinstance(model.model.layers[0].mlp.up_proj, AwqLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize("calibration", [None, ["some text"]])
def test_no_tokenizer(calibration: Any, llama_dir: Path, small_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.*AwqConfig\(tokenizer="):
        quantized(llama_dir, small_config(calibration=calibration))
    with pytest.raises(ValueError, match=r"the model was made in memory, .*AwqConfig\(tokenizer="):
        awq_hf.quantize(
            transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(llama_dir)), small_config(calibration=calibration)
        )


@pytest.mark.parametrize("samples", [[torch.arange(90, 100)], [torch.tensor([5, -1, 7])]])
def test_token_ids_that_the_model_does_not_have(samples: list[Tensor], llama_dir: Path, small_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="token id"):
        quantized(llama_dir, small_config(calibration=samples))


def test_the_tokenizer_of_another_model(llama_dir: Path, demo_dir: Path, small_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="tokenizer is not this model's"):
        quantized(llama_dir, small_config(calibration=["The state of our Union"], tokenizer=str(demo_dir / "model")))


def test_windows_longer_than_the_model_has_positions(random_model: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    sizes = dict(vocab_size=96, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4)
    model = random_model(transformers.OPTConfig(**sizes, max_position_embeddings=32))
    with pytest.raises(ValueError, match="seq_len"):
        awq_hf.quantize(model, small_config(seq_len=48))


# Configs of others


def test_transformers_own_config_quantizes_with_our_defaults(
    llama_dir: Path, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch, prompt: Tensor
) -> None:
    monkeypatch.setattr(hf_quantizer, "load_windows", lambda _calibration, _tokenizer, seq_len, **_: awq_windows(tokens, seq_len))
    monkeypatch.setattr(hf_quantizer, "_tokenizer", lambda *_: None)
    model = quantized(llama_dir, transformers.AwqConfig(bits=4, group_size=32))
    assert isinstance(model.get_submodule(Q_PROJ), AwqLinear) and isinstance(model.config.quantization_config, AwqConfig)
    assert torch.isfinite(model(prompt).logits).all()


def awq_windows(tokens: list[Tensor], seq_len: int) -> Any:
    from awq_hf.calibration.data import load_windows

    return load_windows(tokens, None, seq_len)


@pytest.mark.parametrize("passed", [AwqConfig(bits=8), transformers.AwqConfig()])
def test_a_config_passed_for_a_quantized_checkpoint_changes_nothing(passed: Any, quantized_dir: Path, prompt: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # transformers says that the checkpoint's own is used
        model = quantized(quantized_dir, passed)
    assert (model.config.quantization_config.bits, model.config.quantization_config.group_size) == (4, 32)
    assert torch.equal(model(prompt).logits, load(quantized_dir)(prompt).logits)


# Damaged checkpoints


def _cut(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.qweight"] = tensors[f"{Q_PROJ}.qweight"][:, :4].contiguous()


def _foreign(tensors: dict[str, Tensor]) -> None:
    tensors["model.tower.proj.qweight"] = tensors[f"{Q_PROJ}.qweight"].clone()


def _swapped(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.scales"] = tensors[f"{Q_PROJ}.scales"].to(torch.int32)


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda tensors: tensors.pop(f"{Q_PROJ}.qweight"), Q_PROJ),
        (lambda tensors: tensors.pop(f"{Q_PROJ}.qzeros"), f"{Q_PROJ}.qzeros"),
        (lambda tensors: tensors.pop(f"{Q_PROJ}.scales"), f"{Q_PROJ}.scales"),
        (lambda tensors: [tensors.pop(f"{Q_PROJ}.{part}") for part in ("qweight", "qzeros", "scales")], Q_PROJ),
        (_cut, rf"{Q_PROJ}.qweight is I32 \[64, 4\], expected I32 \[64, 8\]"),
        (_swapped, f"{Q_PROJ}.scales is I32"),
        (_foreign, "model.tower.proj.qweight"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith((".qweight", ".qzeros"))], "not quantized"),
    ],
    ids=["no qweight", "no qzeros", "no scales", "no layer", "shape", "dtype", "foreign", "float"],
)
def test_damaged_tensors_are_named(damage: Callable[[dict[str, Tensor]], Any], named: str, quantized_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized_dir, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=named):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"version": "gemv"}, "'gemv'"),
        ({"bits": 3}, "3 bits"),
        ({"group_size": 16}, ".qzeros"),
        ({"group_size": 64}, "layers.0.mlp.down_proj"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors(changes: dict[str, Any], named: str, quantized_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"].update(changes)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        load(tmp_path / "m")
