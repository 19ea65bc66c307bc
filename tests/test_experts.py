"""Experts, which transformers fuses: loaded from and saved to one matrix each, computed, dequantized, refused by name."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import awq_hf
from awq_hf import QuantizedWeight, QuantSpec, experts
from awq_hf.affine import dequantize_weight
from awq_hf.experts import AwqExperts, ExpertWeights, reason_against
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.inspection.contents import read_contents
from awq_hf.inspection.source import open_source
from awq_hf.linear import pack_weight
from tests.mixtures import MODELS, SIZES

QWEN_PARTS, MIXTRAL_PARTS = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


def on_disk(name: str, tensor: str) -> str:
    return tensor.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else tensor


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def expert_tensors(model: Any, name: str, bits: int = 4) -> dict[str, Tensor | None]:
    """Random 4-bit weights for all experts, put into `model` too: the tensors of a checkpoint, None for those that are not in it."""
    generator, group = torch.Generator().manual_seed(5), 32
    changes: dict[str, Tensor | None] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "gate_up_proj"):
            continue
        changes |= {f"{path}.gate_up_proj": None, f"{path}.down_proj": None}
        inner = module.down_proj.shape[2]
        for expert in range(len(module.down_proj)):
            parts = (module.gate_up_proj[expert, :inner], module.gate_up_proj[expert, inner:], module.down_proj[expert])
            for leaf, weight in zip(MIXTRAL_PARTS if name == "mixtral" else QWEN_PARTS, parts, strict=True):
                out, groups = weight.shape[0], weight.shape[1] // group
                q, z = (torch.randint(0, 2**bits, (out, n), generator=generator, dtype=torch.uint8) for n in (weight.shape[1], groups))
                scales = (0.001 + torch.rand(out, groups, generator=generator) / 2 ** (bits + 2)).half()
                quantized = QuantizedWeight(q, scales, z, QuantSpec(bits, group))
                weight.data.copy_(dequantize_weight(quantized))
                changes |= {f"{path}.{expert}.{leaf}.{part}": tensor for part, tensor in pack_weight(quantized).items()}
    return changes


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def write(random_model: Callable[..., Any], write_awq: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """write(name, changes, **quantization_config) -> (directory, the model that it stands for)."""

    def make(name: str, changes: dict[str, Tensor | None] | None = None, **quantization_config: Any) -> tuple[Path, Any]:
        path, model = tmp_path_factory.mktemp(name) / "awq", random_model(MODELS[name]())
        if name == "qwen3":
            model.config.head_dim = 16
        tensors = expert_tensors(model, name, quantization_config.get("bits", 4)) | (changes or {})
        quantized = "_proj" if quantization_config.get("bits", 4) == 4 else "nothing"
        return path, write_awq(model, path, quantized, lambda tensor: on_disk(name, tensor), tensors, **quantization_config)

    return make


@pytest.fixture(scope="module")
def checkpoint(name: str, write: Callable[..., Any]) -> tuple[Path, Any]:
    return write(name)


def test_experts_are_loaded_and_saved_bit_by_bit(checkpoint: tuple[Path, Any], prompt: Tensor, tmp_path: Path) -> None:
    path, plain = checkpoint
    model = load(path)
    assert isinstance(model.model.layers[0].mlp.experts, AwqExperts)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, plain(prompt).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(*(m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, plain)))
    model.save_pretrained(tmp_path / "out")
    found, expected = (load_file(each / "model.safetensors") for each in (tmp_path / "out", path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_they_load_in_any_dtype(dtype: Any, write: Callable[..., Any]) -> None:
    """Which torch has for its default while transformers builds the model; what was tried before is forgotten."""
    path, _ = write("mixtral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    experts._tried.cache_clear()
    found = load(path, dtype=dtype)
    assert any(isinstance(module, AwqExperts) for module in found.modules())


def test_dequantizing_gives_the_fused_model_back(checkpoint: tuple[Path, Any], prompt: Tensor, tmp_path: Path) -> None:
    path, plain = checkpoint
    model = load(path).dequantize()
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())
    model.save_pretrained(tmp_path / "a")
    plain.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == load_file(tmp_path / "b" / "model.safetensors").keys()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a")(prompt).logits, plain(prompt).logits)


def test_exporters_read_the_same_from_memory(checkpoint: tuple[Path, Any]) -> None:
    path, _ = checkpoint
    in_memory, in_files = (dict(open_checkpoint(each).items()) for each in (load(path), path))
    assert in_memory.keys() == in_files.keys()
    for key, value in in_files.items():
        other = in_memory[key]
        if isinstance(value, QuantizedWeight):
            assert isinstance(other, QuantizedWeight) and value.spec == other.spec
            assert all(torch.equal(getattr(value, part), getattr(other, part)) for part in ("q", "scales", "zero_points"))
        else:
            assert isinstance(other, Tensor) and torch.equal(value, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_usual_kernels(checkpoint: tuple[Path, Any], dtype: torch.dtype, prompt: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWQ_HF_KERNEL")
    path, plain = checkpoint
    model = load(path, dtype=dtype)
    weights = model.model.layers[0].mlp.experts.down_proj
    assert isinstance(weights, ExpertWeights) and weights.layout != "canonical"
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits, expected = model(prompt).logits.float(), plain(prompt).logits
    assert float((logits - expected).norm() / expected.norm()) < 5e-2  # both multiply in bfloat16
    model.to(torch.float32).load_state_dict(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items() if "experts" in name)


def test_compiled_whole(write: Callable[..., Any], prompt: Tensor) -> None:
    path, _ = write("qwen3")
    model = load(path)
    with torch.no_grad():
        compiled = torch.compile(model.model.layers[0].mlp.experts, fullgraph=True, backend="aot_eager")
        x, ids, share = torch.randn(6, 64), torch.tensor([[0, 2]] * 5 + [[2, 1]]), torch.rand(6, 2)
        torch.testing.assert_close(compiled(x, ids, share), model.model.layers[0].mlp.experts(x, ids, share))


def test_gradients_reach_what_is_before_the_experts(write: Callable[..., Any], prompt: Tensor) -> None:
    path, plain = write("qwen2")
    gradients = []
    for model in (load(path), plain):
        x = model.get_input_embeddings()(prompt).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_other_widths(write: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    path, plain = write("mixtral", bits=3, version="awq_hf")
    model = load(path)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, plain(prompt).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "out")
    found, expected = (load_file(each / "model.safetensors") for each in (tmp_path / "out", path))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# Refusals

FIRST = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{FIRST}.2.up_proj.qweight": None, f"{FIRST}.2.up_proj.qzeros": None, f"{FIRST}.2.up_proj.scales": None},
         r"experts.2.up_proj.qweight is missing from the checkpoint"),
        ({f"{FIRST}.2.up_proj.qzeros": None}, r"experts.2.up_proj.qzeros is missing from the checkpoint"),
        ({f"{FIRST}.1.down_proj.scales": torch.zeros(1, 56).half()}, r"experts.1.down_proj.scales is F16 \[1, 56\], expected .*\[1, 64\]"),
        ({f"{FIRST}.1.down_proj.scales": torch.ones(1, 64)}, r"scales are F16 and F32; scales of a layer's experts need one dtype"),
        ({f"{FIRST}.4.up_proj.qweight": torch.zeros(64, 4, dtype=torch.int32)}, r"experts.4.up_proj.qweight is .* has 4 experts a layer"),
        ({f"{FIRST}.0.up_proj.bias": torch.zeros(32)}, r"experts.0.up_proj.bias is in the checkpoint, but Qwen3MoeFor.* has no place"),
        ({f"{FIRST}.1.down_proj.scales": torch.full((1, 64), torch.nan).half()}, r"experts.down_proj.scales holds NaN"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes: dict[str, Tensor | None], told: str, write: Callable[..., Any]) -> None:
    path, _ = write("qwen3", changes)
    with pytest.raises(ValueError, match=told):
        load(path)


@pytest.mark.parametrize("whole", [False, True])
def test_experts_that_are_quantized_in_part(whole: bool, write: Callable[..., Any]) -> None:
    """One matrix in float, and one of the two projections of all experts."""
    path, _ = write("qwen3")
    tensors = load_file(path / "model.safetensors")
    for expert in range(4) if whole else (3,):
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{FIRST}.{expert}.down_proj.{part}"]
        tensors[f"{FIRST}.{expert}.down_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    told = "experts.down_proj is in float, but other matrices" if whole else "experts.3.down_proj.weight is in float, but other experts"
    with pytest.raises(ValueError, match=told):
        load(path)


def test_what_can_be_replaced_is_found_by_trying(random_model: Callable[..., Any]) -> None:
    oss = transformers.GptOssConfig(**{**SIZES, "num_hidden_layers": 1}, num_local_experts=4, intermediate_size=32, head_dim=16)
    experts = random_model(oss).model.layers[0].mlp.experts
    assert "GptOssExperts holds down_proj, down_proj_bias" in str(reason_against(experts))
    understood = random_model(MODELS["qwen3"]()).model.layers[0].mlp.experts
    assert reason_against(understood) is None
    kind, other = type(understood), copy.deepcopy(understood)

    class Interleaved(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
            weights = self.gate_up_proj.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
            return torch.func.functional_call(other, {"gate_up_proj": weights, "down_proj": self.down_proj}, (x, index, share))

    understood.__class__ = Interleaved
    assert reason_against(understood) == "Interleaved computes something else with its weights than gate, up and down"
    understood.__class__ = nn.Module
    assert "does not follow transformers' interface" in str(reason_against(understood))


def test_trying_keeps_no_weights_alive(random_model: Callable[..., Any]) -> None:
    experts = random_model(MODELS["qwen3"]()).model.layers[0].mlp.experts
    experts.name = "not one that was tried before"
    weight = weakref.ref(experts.gate_up_proj)
    assert reason_against(experts) is None
    del experts
    gc.collect()
    assert weight() is None


def test_skip_lists_name_routers_and_not_experts(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = checkpoint
    for source, target in ((path, tmp_path / "files"), (load(path), tmp_path / "memory")):
        awq_hf.export(source, "awq", target)
        skipped = json.loads((target / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
        quantized = [name.removesuffix(".qweight") for name in load_file(target / "model.safetensors") if name.endswith(".qweight")]
        assert any(entry.endswith(".gate") for entry in skipped)
        assert not any(entry in name for entry in skipped for name in quantized)


def test_inspection_counts_experts(checkpoint: tuple[Path, Any]) -> None:
    path, _ = checkpoint
    contents = read_contents(open_source(str(path)), "auto", "cpu")
    assert contents.problem is None and contents.bits_per_weight is not None and 4 < contents.bits_per_weight < 5.5
    assert "model.layers.*.mlp.experts" not in contents.left_in_float and "model.layers.*.mlp.gate" in contents.left_in_float
