"""What people do with a model once they have it: both a loaded one and one quantized on the spot behave like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig

from awq_hf import AwqLinear

pytestmark = pytest.mark.usefixtures("usual_kernels")


@pytest.fixture(scope="module", params=["loaded", "quantized"])
def make(
    usual_kernels: None, request: pytest.FixtureRequest, quantized_dir: Path, llama_dir: Path, small_config: Callable[..., Any]
) -> Callable[..., Any]:
    """make(): a tiny quantized model of its own for every test."""
    if request.param == "loaded":
        return lambda **options: AutoModelForCausalLM.from_pretrained(quantized_dir, **options)
    quantized = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=small_config(samples=2))
    return lambda **options: (
        AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=small_config(samples=2), **options)
        if options
        else copy.deepcopy(quantized)
    )


def packed(model: Any) -> dict[str, Tensor]:
    return {f"{name}.{part}": p for name, m in model.named_modules() if isinstance(m, AwqLinear) for part, p in m.named_parameters()}


# torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str, make: Callable[..., Any], prompt: Tensor) -> None:
    model = make()
    assert model.hf_quantizer.is_compileable
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits)


# Generation


def test_a_static_cache_generates_what_a_growing_one_does(make: Callable[..., Any], prompt: Tensor) -> None:
    model = make()
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt))
    expected = model.generate(prompt, **options)
    assert expected.shape == (2, 24)
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


def test_generate_compiles_as_one_graph(make: Callable[..., Any], prompt: Tensor) -> None:
    """As it does by itself on a GPU with a static cache; of two lengths, of which the longer came first, one graph is made."""
    model, config = make(), CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for new in (12, 6):
        options = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt))
        found = model.generate(prompt, cache_implementation="static", compile_config=config, **options)
        assert torch.equal(found, model.generate(prompt, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_cache_changes_nothing(make: Callable[..., Any], prompt: Tensor) -> None:
    model = make()
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt))
    assert torch.equal(model.generate(prompt, use_cache=False, **options), model.generate(prompt, **options))


# Sizes


def test_memory_and_parameters_are_counted(make: Callable[..., Any]) -> None:
    model = make()
    stored = sum(p.numel() * p.element_size() for p in model.parameters()) + sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint() == stored
    linears = [module for module in model.modules() if isinstance(module, AwqLinear)]
    whole = lambda rows: -(-rows // 64) * 64  # noqa: E731  torch's kernel takes so many together
    words = [2 * whole(m.out_features) * m.in_features // 4 for m in linears]  # bytes
    assert [m.layout for m in linears] == ["cpu"] * 14 and [m.get_parameter("words").nbytes for m in linears] == words
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    trainable = model.num_parameters(only_trainable=True)
    assert trainable == sum(p.numel() for name, p in model.named_parameters() if name not in packed(model))


# Casts and copies


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casting_keeps_integers_and_scales(dtype: torch.dtype, make: Callable[..., Any], prompt: Tensor) -> None:
    model = make()
    before = {name: p.clone() for name, p in packed(model).items() if not name.endswith("bias")}
    assert model.to(dtype) is model and model.dtype == dtype
    for name, tensor in before.items():
        assert torch.equal(model.get_parameter(name), tensor) and model.get_parameter(name).dtype == tensor.dtype, name
    logits = model(prompt).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()


def test_half_and_float_are_refused_as_transformers_does(make: Callable[..., Any]) -> None:
    for method in ("half", "float"):
        with pytest.raises(ValueError, match="not supported for quantized"):
            getattr(make(), method)()


def test_a_copy_is_a_model_of_its_own(make: Callable[..., Any], prompt: Tensor) -> None:
    model = make()
    expected = model(prompt).logits
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(prompt).logits, expected) and not torch.equal(model(prompt).logits, expected)
    assert not any(parameter.requires_grad for parameter in packed(copied).values())


def test_a_pickled_model_is_the_same_and_saves_the_same(make: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    model = make()
    expected = model(prompt).logits
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "saved")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(found(prompt).logits, expected)
    found.save_pretrained(tmp_path / "again")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert ("report.json" in files) == hasattr(model, "awq_report") and "model.safetensors" in files
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


# State dicts and files


def test_a_state_dict_goes_through_safetensors(make: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    model = make()
    expected = model(prompt).logits
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(model(prompt).logits, expected)


@pytest.mark.parametrize("max_shard_size", ["8KB", "40KB", "5GB"])
def test_shards(max_shard_size: str, make: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) == 1) == (max_shard_size == "5GB")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(prompt).logits, model(prompt).logits)


# Devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="device_map='auto' would choose the GPU")
@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}]
)
def test_ways_to_load(options: dict[str, Any], make: Callable[..., Any], prompt: Tensor) -> None:
    model = make(**options)
    assert torch.equal(model(prompt).logits, make()(prompt).logits)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched for every call runs on the reference; so does the rest then."""
    monkeypatch.setenv("AWQ_HF_KERNEL", "reference")


@pytest.mark.usefixtures("on_reference")
@pytest.mark.skipif(torch.cuda.is_available(), reason="layers on disk would run on the GPU")
@pytest.mark.parametrize("on_disk", [["model.layers.0"], ["model.layers.0", "model.layers.1"], ["model.embed_tokens", "lm_head"]])
def test_a_checkpoint_partly_on_disk(on_disk: list[str], quantized_dir: Path, prompt: Tensor, tmp_path: Path) -> None:
    device_map = {**dict.fromkeys(PARTS, "cpu"), **dict.fromkeys(on_disk, "disk")}
    model = AutoModelForCausalLM.from_pretrained(quantized_dir, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(model(prompt).logits, AutoModelForCausalLM.from_pretrained(quantized_dir)(prompt).logits)
    assert torch.equal(model(prompt).logits, model(prompt).logits)  # loaded again for every call


@pytest.mark.usefixtures("on_reference")
def test_all_on_disk(quantized_dir: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_dir, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert torch.equal(model(prompt).logits, AutoModelForCausalLM.from_pretrained(quantized_dir)(prompt).logits)


# Gradients


def test_packed_parameters_get_no_gradient(make: Callable[..., Any], prompt: Tensor) -> None:
    model = make()
    assert not any(parameter.requires_grad for parameter in packed(model).values())
    model.lm_head(model.model(prompt).last_hidden_state.detach()).sum().backward()
    assert model.lm_head.weight.grad is not None
    assert all(parameter.grad is None for parameter in packed(model).values())
    with torch.no_grad():
        assert not model(prompt).logits.requires_grad
