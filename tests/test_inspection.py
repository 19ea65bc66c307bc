"""inspect(): what it says of a float checkpoint is what a run does, and of an AWQ checkpoint what is in the file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

import awq_hf
from awq_hf.blocks import block_signature
from awq_hf.headers import read_headers
from awq_hf.inspection import Contents, Forecast, costs, folds, inspect, source
from awq_hf.inspection.forecast import starred
from awq_hf.recipe import Recipe
from awq_hf.spec import QuantSpec

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


def contents_of(path: Path) -> Contents:
    found = inspect(str(path))
    assert isinstance(found, Contents)
    return found


# Float checkpoints: against a run


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, random_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, sizes = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("inspect") / "float"
    random_model(getattr(transformers, name)(**sizes), torch.bfloat16).save_pretrained(path)
    return path


def test_what_it_says_is_what_a_run_does(checkpoint: Path, small_config: Callable[..., Any], tmp_path: Path) -> None:
    options = dict(modules_to_not_convert=["1.self_attn.o", "1.attention.dense", "1.attn.c_proj"])
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
    assert said.result_bits_per_weight == 8 * sum(packed.values()) / sum(math.prod(layer.shape) for layer in report.layers)
    assert said.bytes_on_disk == sum(map(source.stored_bytes, read_headers([str(checkpoint / "model.safetensors")]).values()))
    assert said.parameters == sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    assert (said.class_name, said.dtype, said.block_count, said.refusal) == (type(model).__name__, "bfloat16", 2, None)


def test_blocks_of_every_kind_are_probed_once(checkpoint: Path, small_config: Callable[..., Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    said = forecast_of(str(checkpoint), small_config())
    assert said.probed == ([0, 1] if "MoeFor" in said.class_name else [0])
    assert len({block_signature(block) for block in model.get_submodule(said.blocks)}) == len(said.probed)


def test_no_weights_but_those_of_the_wanted_block_are_loaded(llama_dir: Path) -> None:
    whole = transformers.AutoModelForCausalLM.from_pretrained(llama_dir)
    part = folds._load_blocks(llama_dir, type(whole), "model.layers", [1], torch.float32, "cpu")
    expected = {name: p for name, p in whole.named_parameters() if "layers.0." not in name}
    found = dict(part.named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


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


# Costs


GROUPS = (costs.Group(64, (64, 32, 32), 128, True), costs.Group(64, (64,), 64, False), costs.Group(96, (64,), 64, True))
BLOCK = costs.BlockCost(2, 20_000, 20_000, GROUPS, 1.0)
RECIPE = Recipe(spec=QuantSpec(group_size=32), samples=16, seq_len=64)
UNIT = costs.Speed(1, 1, 1, 1)


def memory(block: costs.BlockCost = BLOCK, recipe: Recipe = RECIPE, device: str = "cpu") -> dict[str, int]:
    return costs.peak_memory([BLOCK, block], recipe, device, model_bytes=123_456, packed_bytes=7_890, hidden=64, itemsize=2)


def test_peak_memory_adds_up_what_is_held() -> None:
    found, tokens = memory(), 16 * 64
    assert (found.pop("model"), found.pop("quantized weights")) == (123_456, 7_890)
    unused = found.pop("freed, but not given back")
    assert found == {
        "hidden states": 3 * tokens * 64 * 2,
        "inputs of a block's Linears": tokens * (64 + 64 + 96) * 2,
        "forwards under way": tokens * (2 * 64 + 64 + 128) * 2,  # while the second group waits for the first one's outputs
        "statistics and rounding": 4 * (7 * 96**2 + 15 * 64 * 96),
    }
    assert unused == pytest.approx(0.4 * sum(found.values()) + 200_000_000, abs=1)
    assert memory(replace(BLOCK, parameters=10**6))["statistics and rounding"] == 4 * 10**6  # the probe's copy


def test_peak_memory_of_the_float_stream_has_no_paused_forwards() -> None:
    less = memory(recipe=replace(RECIPE, stream="float"))
    assert less["forwards under way"] == 0 and less["hidden states"] == 2 * 16 * 64 * 64 * 2
    assert less["statistics and rounding"] == 4 * (4 * 64**2 + 15 * 128 * 64)  # now the first group's


def test_peak_memory_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU works on so many rows at a time as it has threads for; a GPU on all."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tall = replace(BLOCK, groups=(costs.Group(64, (5000,), 5000, True),))
    assert memory(tall)["statistics and rounding"] == 4 * 64 * (7 * 64 + 5 * 5000 + 10 * 3 * 512)
    on_gpu = memory(tall, device="cuda")
    assert on_gpu["statistics and rounding"] == 4 * 64 * (7 * 64 + 15 * 5000)
    assert on_gpu["quantized weights"] == 0 and on_gpu["freed, but not given back"] < 200_000_000


def test_work_is_linear_in_tokens_and_blocks() -> None:
    one = costs.block_work(BLOCK, RECIPE, 1)
    twice = costs.block_work(BLOCK, replace(RECIPE, samples=32), 1)
    assert one.model_flops == 2 * 20_000 * 16 * 64 * 2 * 2 and twice.model_flops == 2 * one.model_flops
    moments = sum(2 * 2 * g.in_features**2 * (2 + 1 / 8) * 16 * 64 for g in GROUPS)
    assert twice.flops - one.flops == moments  # what does not depend on tokens stays
    more = costs.block_work(replace(BLOCK, count=4), RECIPE, 1)
    assert more.seconds == one.seconds == 1.0 and more.flops == 2 * one.flops
    assert costs.block_work(replace(BLOCK, active=5_000), RECIPE, 1).model_flops == one.model_flops / 4


def test_every_part_of_the_recipe_has_its_price() -> None:
    price = lambda **changes: UNIT.seconds(costs.block_work(BLOCK, replace(RECIPE, **changes), 1))  # noqa: E731
    whole = price()
    for part in (dict(scale=None), dict(clip=None), dict(correction=False), dict(stream="float"), dict(rounding="gptq")):
        assert price(**part) < whole, part
    assert price(rounding="nearest") < price(rounding="gptq")
    assert price(spec=QuantSpec(group_size=32, symmetric=True)) < whole
    unprobed = UNIT.seconds(costs.block_work(replace(BLOCK, probed=None), RECIPE, 1))
    assert unprobed - (whole - 1.0) == pytest.approx(60 * (2 * 20_000 * 96 + 2 * 20_000))
    nothing = replace(BLOCK, groups=tuple(replace(g, rows=()) for g in GROUPS))
    assert costs.block_work(nothing, RECIPE, 1).calls == 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[costs.BlockCost]:
    """The blocks whose time was estimated last."""
    found: list[costs.BlockCost] = []

    def count(blocks: list[costs.BlockCost], *_: Any) -> tuple[float, float]:
        found[:] = blocks
        return 1.0, 2.0

    monkeypatch.setattr(costs, "estimated_seconds", count)
    return found


def test_a_probe_is_counted_once(counted: list[costs.BlockCost], llama_dir: Path, small_config: Callable[..., Any]) -> None:
    forecast_of(str(llama_dir), small_config(modules_to_not_convert=["layers.1.mlp"]))
    first, second = counted
    assert first.count == second.count == 1 and first.probed and second.probed == 0
    assert [len(group.rows) for group in first.groups] == [3, 1, 2, 1] and [len(group.rows) for group in second.groups] == [3, 1, 0, 0]


def test_a_token_is_multiplied_with_few_experts(
    counted: list[costs.BlockCost], random_model: Callable[..., Any], small_config: Callable[..., Any], tmp_path: Path
) -> None:
    name, sizes = CONFIGS["qwen3 moe"]
    random_model(getattr(transformers, name)(**sizes)).save_pretrained(tmp_path)
    forecast_of(str(tmp_path), small_config())
    dense, sparse = counted
    assert dense.active == dense.parameters and sparse.parameters - sparse.active == 4 * 3 * 32 * 64 / 2  # 2 of 4 experts


def test_speed_is_measured() -> None:
    speed = costs.measure_speed("cpu", torch.bfloat16)
    assert 1e8 < speed.flops < 1e15 and 1e8 < speed.model_flops < 1e15 and 1e7 < speed.passes < 1e14 and 1e3 < speed.calls < 1e8
    low, high = costs.estimated_seconds([BLOCK], RECIPE, "cpu", torch.float32)
    assert 0.7 < low < high == pytest.approx(2 * low)


def test_a_model_that_does_not_fit(llama_dir: Path, small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said = forecast_of(str(llama_dir), small_config())
    assert said.fits is True and said.memory_free is not None and said.memory["this program"] > 10**8
    short = replace(said, memory_free=sum(said.memory.values()) - 1)
    assert short.fits is False and short.to_dict()["fits"] is False
    monkeypatch.setattr(costs, "free_memory", lambda _device: 5)
    monkeypatch.setattr(costs, "this_program", lambda _device: {"this program": 8})
    said = forecast_of(str(llama_dir), small_config())
    assert (said.fits, said.memory_free, said.memory["this program"]) == (False, 13, 8)


# AWQ checkpoints


def test_an_awq_checkpoint(quantized_dir: Path) -> None:
    found = contents_of(quantized_dir)
    tensors = load_file(quantized_dir / "model.safetensors")
    size = lambda *ends: sum(t.nbytes for name, t in tensors.items() if name.endswith(ends))  # noqa: E731
    assert (found.class_name, found.dtype, found.version) == ("LlamaForCausalLM", "float32", "gemm")
    assert (found.quantized_modules, found.spec) == (14, {"bits": 4, "group_size": 32, "symmetric": False})
    assert found.bytes["quantized"] == size(".qweight", ".qzeros", ".scales")
    assert found.bytes["embeddings"] == size("embed_tokens.weight", "lm_head.weight") == 2 * 96 * 64 * 4
    assert sum(found.bytes.values()) == size("")
    assert found.bits_per_weight == 4 + 20 / 32
    assert (found.scales, found.left_in_float, found.problem) == (["F16"], {"lm_head": 1}, None)
    assert found.written_by == f"awq-hf {awq_hf.__version__}"
    report = json.loads((quantized_dir / "report.json").read_text())
    assert found.calibration == report["calibration"] and found.loss_ratio is not None and 0 < found.loss_ratio < 1


@pytest.fixture
def copy(quantized_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_dir, tmp_path / "copy"))


def edit(directory: Path, **changes: Any) -> None:
    """Change quantization_config in config.json."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("changes", "problem"), [({"group_size": 16}, "qzeros is I32 [3, 8], expected"), ({"bits": 8}, "cannot be read")])
def test_tensors_that_do_not_fit_the_config(changes: dict[str, Any], problem: str, copy: Path) -> None:
    edit(copy, **changes)
    found = contents_of(copy)
    assert found.problem is not None and problem in found.problem
    assert (found.quantized_modules, found.bits_per_weight, found.left_in_float) == (14, None, {})


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a checkpoint."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_tensor_that_is_missing(copy: Path) -> None:
    rewrite(copy, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.0.mlp.up_proj.scales"})
    problem = contents_of(copy).problem
    assert problem is not None and problem.startswith("model.layers.0.mlp.up_proj.scales is missing from the checkpoint")


def test_a_float_tensor_of_another_shape(copy: Path) -> None:
    rewrite(copy, lambda tensors: {n: t[:60] if n == "model.norm.weight" else t for n, t in tensors.items()})
    problem = contents_of(copy).problem
    assert problem is not None and "model.norm.weight" in problem and "[60]" in problem


def test_names_without_the_prefix_of_the_base_model(copy: Path, quantized_dir: Path) -> None:
    rewrite(copy, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    assert contents_of(copy) == replace(contents_of(quantized_dir), model=str(copy))


def test_who_wrote_it(copy: Path) -> None:
    (copy / "report.json").write_text('["somebody else\'s"]')
    found = contents_of(copy)
    assert (found.written_by, found.loss_ratio, found.calibration) == (None, None, None)
    for changes, writer in (
        ({"autoround_version": "0.9"}, "auto-round 0.9"),
        ({"provider": "auto-round"}, "auto-round"),
        ({"meta": {"quantizer": ["gptqmodel:7.0"]}}, "gptqmodel:7.0"),
    ):
        edit(copy, **changes)
        assert contents_of(copy).written_by == writer


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "bitsandbytes"])
def test_other_methods_are_refused_by_name(method: str, copy: Path) -> None:
    edit(copy, quant_method=method)
    with pytest.raises(ValueError, match=f"is quantized already, with {method};"):
        inspect(str(copy))


def test_quantized_tensors_that_the_config_does_not_name(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds \*.qweight, so it is quantized already"):
        inspect(str(copy))


# What cannot be inspected


def test_directories_that_hold_no_model(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        inspect(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no config.json"):
        inspect(str(tmp_path))
    shutil.copy(llama_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        inspect(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\)"):
        inspect(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        inspect(str(tmp_path))
    with pytest.raises(ValueError, match="is a file; give the directory"):
        inspect(str(tmp_path / "model.safetensors"))
    shutil.copy(llama_dir / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read its config.json"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="cannot build a causal language model"):
        inspect(str(tmp_path))


def test_code_beside_a_checkpoint_is_not_run(llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot read its config.json"):
        inspect(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], None]:
    """hub(directory): the Hub gives the files of this directory as someone/model; the cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def serve(directory: Path) -> None:
        headers = read_headers([str(directory / "model.safetensors")])
        metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=headers)})
        config = transformers.AutoConfig.from_pretrained(directory)

        def download(repo: str, name: str) -> str:
            assert repo == "someone/model"
            if not (directory / name).is_file():
                raise EntryNotFoundError(f"no {name}")
            return str(directory / name)

        monkeypatch.setattr(source, "get_safetensors_metadata", {"someone/model": metadata}.__getitem__)
        monkeypatch.setattr(source, "AutoConfig", SimpleNamespace(from_pretrained=lambda repo, **_: {"someone/model": config}[repo]))
        monkeypatch.setattr(source, "hf_hub_download", download)

    return serve


def test_a_float_model_on_the_hub(hub: Callable[[Path], None], llama_dir: Path, small_config: Callable[..., Any]) -> None:
    here = forecast_of(str(llama_dir), small_config())
    hub(llama_dir)
    there = forecast_of("someone/model", small_config())
    assert there.probed == [] and not any(kind.probed for kind in there.kinds)
    assert there.result_bytes == here.result_bytes and there.bytes_on_disk == here.bytes_on_disk
    assert [replace(kind, fold=None, probed=False) for kind in here.kinds] == there.kinds
    working = lambda said: sum(said.memory.values()) - said.memory["this program"]  # noqa: E731
    assert 0.7 * working(here) < working(there) < 2 * working(here)


def test_an_awq_model_on_the_hub(hub: Callable[[Path], None], quantized_dir: Path) -> None:
    here = contents_of(quantized_dir)
    hub(quantized_dir)
    assert inspect("someone/model") == replace(here, model="someone/model")
    with pytest.raises(ValueError, match="someone/other is no directory here, and the Hub does not give such a model"):
        inspect("someone/other")


def test_a_hub_model_in_the_cache(hub: Callable[[Path], None], llama_dir: Path, small_config: Callable[..., Any]) -> None:
    repo = Path(constants.HF_HUB_CACHE) / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    snapshot = shutil.copytree(llama_dir, repo / "snapshots" / ("a" * 40))
    assert forecast_of("someone/model", small_config()).probed == [0]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the Hub does not give such a model"):
        inspect("someone/model")
