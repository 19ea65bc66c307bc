"""Checkpoints as AutoAWQ, llm-awq, IPEX and GPTQModel write them, built by loops over single codes, loaded and saved again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from awq_hf import AwqLinear, QuantizedWeight
from awq_hf.affine import dequantize_weight
from awq_hf.exporters.opening import open_checkpoint

SIZES = dict(vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1)
IDS = torch.arange(20)[None]
Module = dict[str, Tensor]


# Writers: W [out, in] = (q - z) * s, from the descriptions of the formats


def signed(word: int, bits: int) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def gemm(q: list[list[int]], z: list[list[int]], scales: Tensor) -> Module:
    """int32 [in, out / 8]; nibble i of word c holds column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; zeros alike; scales [groups, out]."""

    def words(matrix: list[list[int]]) -> Tensor:  # [out, n] -> [n, out / 8]
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        columns = [[matrix[o][i] for o in range(len(matrix))] for i in range(len(matrix[0]))]
        rows = [[signed(sum(c[8 * w + o] << 4 * i for i, o in enumerate(order)), 32) for w in range(len(c) // 8)] for c in columns]
        return torch.tensor(rows, dtype=torch.int32)

    return {"qweight": words(q), "qzeros": words(z), "scales": scales.T.contiguous()}


def room(groups: int, width: int) -> int:
    """Groups after padding: whole words of 8, of which there are a multiple of 2 for groups of 64, of 4 for groups of 32."""
    words, multiple = math.ceil(groups / 8), {64: 2, 32: 4}.get(width, 1)
    return 8 * math.ceil(words / multiple) * multiple


def gemv(q: list[list[int]], z: list[list[int]], scales: Tensor) -> Module:
    """int32 [out, in / 8], nibbles in order; zeros [out, words] and scales [out, 8 words], zero after the last group."""
    places = room(scales.shape[1], len(q[0]) // scales.shape[1])
    padded = torch.zeros(len(q), places, dtype=scales.dtype)
    padded[:, : scales.shape[1]] = scales
    rows = [row + [0] * (places - len(row)) for row in z]
    words = lambda m: torch.tensor(  # noqa: E731
        [[signed(sum(r[8 * w + i] << 4 * i for i in range(8)), 32) for w in range(len(r) // 8)] for r in m], dtype=torch.int32
    )
    return {"qweight": words(q), "qzeros": words(rows), "scales": padded}


def gemv_fast(q: list[list[int]], z: list[list[int]], scales: Tensor, zeros_name: str = "qzeros") -> Module:
    """int16 [out / 4, in]: four rows interleaved; scales and -scales * zeros [padded groups, out] in floating point."""
    n_out, n_in = len(q), len(q[0])
    qweight = torch.zeros(n_out // 4, n_in, dtype=torch.int16)
    for quad in range(n_out // 4):
        for start in range(0, n_in, 64):
            flat = []
            for row in q[4 * quad : 4 * quad + 4]:
                for block in (start, start + 32):
                    pairs = [row[block + 8 * octet + 2 * pair + i] for pair in range(4) for octet in range(4) for i in range(2)]
                    flat += [pairs[eight + place] for eight in range(0, 32, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
            for w in range(64):
                qweight[quad, start + w] = signed(sum(flat[4 * w + i] << 4 * i for i in range(4)), 16)
    groups = scales.shape[1]
    stored = torch.zeros(2, room(groups, n_in // groups), n_out, dtype=scales.dtype)
    stored[0, :groups] = scales.T
    stored[1, :groups] = -(scales.T.float() * torch.tensor(z).T.float()).to(scales.dtype)
    return {"qweight": qweight, "scales": stored[0].clone(), zeros_name: stored[1].clone()}


def llm_awq(q: list[list[int]], z: list[list[int]], scales: Tensor) -> Module:
    return gemv_fast(q, z, scales, "scaled_zeros")


WRITERS = {"gemm": gemm, "gemv": gemv, "gemv_fast": gemv_fast, "llm-awq": llm_awq}


# Whole checkpoints


def write(
    path: Path, writer: str, group: int = 64, dtype: torch.dtype = torch.float16, bias: bool = False, **quantization_config: Any
) -> LlamaForCausalLM:
    """A random checkpoint in `path`; returns the model that it stands for, with plain Linears in float32."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=False, dtype="float32")
    model = LlamaForCausalLM(config).eval()
    tensors = model.state_dict()
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            n_out, n_in = linear.weight.shape
            width = n_in if group == -1 else group
            q = torch.randint(0, 16, (n_out, n_in), generator=generator)
            z = torch.randint(0, 16, (n_out, n_in // width), generator=generator)
            scales = (0.001 + torch.rand(z.shape, generator=generator) / 64).to(dtype)
            linear.weight.data = (q - z.repeat_interleave(width, 1)) * scales.float().repeat_interleave(width, 1)
            del tensors[f"model.layers.{name}.weight"]
            for part, tensor in WRITERS[writer](q.tolist(), z.tolist(), scales).items():
                tensors[f"model.layers.{name}.{part}"] = tensor
            if bias:
                linear.bias.data = torch.randn(n_out, generator=generator).half().float()
                tensors[f"model.layers.{name}.bias"] = linear.bias.data.to(dtype)
                linear.bias.data = tensors[f"model.layers.{name}.bias"].float()
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    written = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": writer, **quantization_config}
    config.architectures = ["LlamaForCausalLM"]
    (path / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": drop_none(written)}))
    return model


def drop_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def written_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return config


def assert_loads_and_saves(path: Path, expected: LlamaForCausalLM, dtype: torch.dtype, again: Path) -> Any:
    """It computes what the plain model does, bit for bit in its weights; and is saved as gemm with nothing lost."""
    model, streamed = load(path), dict(open_checkpoint(path).items())  # what exporters read
    for name, module in model.named_modules():
        if isinstance(module, AwqLinear):
            weight = streamed[f"{name}.weight"]
            assert isinstance(weight, QuantizedWeight) and torch.equal(dequantize_weight(weight), expected.get_submodule(name).weight)
            assert torch.equal(module.dequantize(torch.float32), expected.get_submodule(name).weight)
            shapes = {part: tuple(p.shape) for part, p in module.named_parameters()}
            groups = module.in_features // module.spec.group_width(module.in_features)
            assert shapes.pop("bias", None) == ((module.out_features,) if expected.get_submodule(name).bias is not None else None)
            words = module.out_features // 8
            assert shapes == {"qweight": (module.in_features, words), "qzeros": (groups, words), "scales": (groups, module.out_features)}
            assert module.scales.dtype == dtype and not any(p.requires_grad for p in module.parameters())
    assert sum(isinstance(module, AwqLinear) for module in model.modules()) == 7
    logits = model(IDS).logits
    torch.testing.assert_close(logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(again)
    assert written_config(again)["version"] == "gemm"
    assert torch.equal(load(again)(IDS).logits, logits)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_layout_and_dtype(writer: str, dtype: torch.dtype, bias: bool, tmp_path: Path) -> None:
    expected = write(tmp_path / "in", writer, dtype=dtype, bias=bias)
    assert_loads_and_saves(tmp_path / "in", expected, dtype, tmp_path / "out")


@pytest.mark.parametrize("writer, group_size", [(w, g) for w in WRITERS for g in (32, 64, -1)] + [("gemm", 16)])
def test_every_group_size(writer: str, group_size: int, tmp_path: Path) -> None:
    expected = write(tmp_path / "in", writer, group_size)
    assert_loads_and_saves(tmp_path / "in", expected, torch.float16, tmp_path / "out")


@pytest.mark.parametrize(
    "writer, named",
    [
        ("gemm", {"version": None}),
        ("gemv", {"version": None}),
        ("gemv_fast", {"version": None}),
        ("llm-awq", {"version": None}),
        ("gemm", {"version": "GEMM"}),
        ("gemm", {"version": "exllama"}),
        ("gemm", {"version": "ipex"}),
        ("gemv", {"version": None, "format": "gemv"}),
        ("gemv_fast", {"version": None, "checkpoint_format": "gemv_fast"}),
        ("llm-awq", {"version": "gemv_fast"}),
        ("gemv", {"version": "llm-awq"}),  # what llm-awq wrote before
        ("gemm", {"version": "llm-awq"}),  # and at first
        ("llm-awq", {"version": "gemv", "backend": "llm-awq"}),  # its script says gemv whatever the tensors are
    ],
)
def test_every_way_to_name_the_layout(writer: str, named: dict[str, Any], tmp_path: Path) -> None:
    expected = write(tmp_path / "in", writer, **named)
    assert_loads_and_saves(tmp_path / "in", expected, torch.float16, tmp_path / "out")


def test_gemm_tensors_are_saved_as_they_came(tmp_path: Path) -> None:
    write(tmp_path / "in", "gemm", dtype=torch.bfloat16, bias=True)
    load(tmp_path / "in").save_pretrained(tmp_path / "out")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        stays = not name.endswith(".bias")  # biases have the model's dtype
        assert torch.equal(again[name], tensor) if stays else torch.equal(again[name], tensor.float()), name
        assert again[name].dtype == tensor.dtype or not stays


def test_scales_of_either_sign(tmp_path: Path) -> None:
    """auto-round's symmetric grids may run either way."""
    expected = write(tmp_path, "gemm")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"] *= -1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(tmp_path).get_submodule(name).dequantize(torch.float32), -expected.get_submodule(name).weight)


# The config, when it is written again


GPTQMODEL: dict[str, Any] = {
    "checkpoint_format": "gemv_fast",
    "format": "gemv_fast",
    "method": "awq",
    "desc_act": False,
    "sym": False,
    "lm_head": False,
    "pack_dtype": "int16",
    "dynamic": None,
    "meta": {"quantizer": ["gptqmodel:5.0.0"], "damp_percent": 0.05},
}


def test_keys_of_others_are_kept_and_say_what_is_true(tmp_path: Path) -> None:
    write(tmp_path / "in", "gemv_fast", **GPTQMODEL)
    load(tmp_path / "in").save_pretrained(tmp_path / "out")
    again = written_config(tmp_path / "out")
    changed = {"version": "gemm", "format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32", "modules_to_not_convert": None}
    assert again == {**written_config(tmp_path / "in"), **changed}


def test_old_names_are_kept_beside_the_new_ones(tmp_path: Path) -> None:
    names: dict[str, Any] = {"bits": None, "group_size": None, "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    expected = write(tmp_path / "in", "gemm", 32, **names)
    assert_loads_and_saves(tmp_path / "in", expected, torch.float16, tmp_path / "out")
    again = written_config(tmp_path / "out")
    assert (again["w_bit"], again["bits"], again["q_group_size"], again["group_size"], again["version"]) == (4, 4, 32, 32, "gemm")


def test_llm_awqs_backend_is_not_left_in_a_gemm_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "in", "llm-awq", backend="llm-awq", version="gemv")
    load(tmp_path / "in").save_pretrained(tmp_path / "out")
    assert written_config(tmp_path / "out")["backend"] == "autoawq"


@pytest.mark.parametrize("said", [{"zero_point": False}, {"zero_point": None, "sym": True}])
def test_zero_points_that_the_config_denies_are_used_and_admitted(said: dict[str, Any], tmp_path: Path) -> None:
    expected = write(tmp_path / "in", "gemm", **said)
    model = assert_loads_and_saves(tmp_path / "in", expected, torch.float16, tmp_path / "out")
    assert not any(m.spec.symmetric for m in model.modules() if isinstance(m, AwqLinear))
    again = written_config(tmp_path / "out")
    assert again["zero_point"] is True and again.get("sym", False) is False


def test_symmetric_zero_points_are_recognised(tmp_path: Path) -> None:
    write(tmp_path, "gemm", zero_point=None, sym=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if name.endswith(".qzeros"):
            tensors[name].fill_(signed(0x88888888, 32))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    assert all(m.spec.symmetric for m in model.modules() if isinstance(m, AwqLinear))
    assert model.config.quantization_config.zero_point is False


# Refused


def test_real_valued_zero_points_are_named(tmp_path: Path) -> None:
    """A LoRA merged into llm-awq's floating zero points moves them off the grid."""
    write(tmp_path, "llm-awq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    tensors[f"{name}.scaled_zeros"][0, 3] += 0.4 * tensors[f"{name}.scales"][0, 3]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: 1 of 64 zero points are no integers from 0 to 15"):
        load(tmp_path)


@pytest.mark.parametrize("declared", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("writer", ["gemm", "gemv", "gemv_fast"])
def test_a_layout_that_the_tensors_deny(writer: str, declared: str, tmp_path: Path) -> None:
    write(tmp_path, writer, version=declared)
    if writer == declared:
        assert load(tmp_path) is not None
        return
    told = rf"_proj\.\w+ is .*, expected .* version '{declared}'; the tensors look like bits=4, group_size=64, version '{writer}'"
    with pytest.raises(ValueError, match=told):
        load(tmp_path)


@pytest.mark.parametrize("version, words", [("marlin", "gemm version"), ("bitblas", "gemm version"), ("turbo", "'turbo' is not known")])
def test_versions_that_cannot_be_read(version: str, words: str, tmp_path: Path) -> None:
    write(tmp_path, "gemm", version=version)
    with pytest.raises(ValueError, match=f"{version}.*{words}|{words}.*versions that can be read"):
        load(tmp_path)


def test_tensors_of_marlin_and_gptq_are_recognised(tmp_path: Path) -> None:
    write(tmp_path, "gemm", version=None)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    for shape, part, words in (((128 // 16, 256), "scales", "marlin"), ((128 // 8, 128), "g_idx", "GPTQ")):
        damaged = {**tensors, f"{name}.qweight": torch.zeros(shape, dtype=torch.int32)}
        damaged.setdefault(f"{name}.{part}", torch.zeros(128, dtype=torch.int32))
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{name}.qweight is .*look like.*{words}"):
            load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="device_map would choose the GPU")
def test_a_layout_that_is_converted_cannot_stay_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "in", "gemv")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(ValueError, match=r"stored as gemv, which is converted while loading.*device_map=\"cpu\""):
        load(tmp_path / "in", device_map=places, offload_folder=tmp_path / "offload")
