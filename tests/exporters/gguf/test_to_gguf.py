"""to_gguf, in a real llama.cpp: AWQ checkpoints keep their codes, float models are searched, and what is refused is refused at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from awq_hf.affine import dequantize_weight
from awq_hf.exporters.gguf.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from awq_hf.exporters.gguf.writer import export
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.kernels.foreign import pack_gemv, pack_gemv_fast, pad_groups, scale_zeros
from awq_hf.spec import QuantizedWeight
from awq_hf.to_gguf import to_gguf

SIZES = dict(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=3,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(hidden_act="gelu_pytorch_tanh", head_dim=64, query_pre_attn_scalar=64, sliding_window=16)
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama with a wide head": dict(model_type="llama", head_dim=128, num_key_value_heads=4),
    "llama, tied": dict(model_type="llama", tie_word_embeddings=True),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),  # experts stay in float
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=64),
    "gemma2": dict(
        model_type="gemma2",
        **GEMMA,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",  # transformers' choice before 5.21, sdpa, leaves the softcap out
    ),
    "gemma3": dict(model_type="gemma3_text", **GEMMA, num_hidden_layers=6, use_bidirectional_attention=False),
    "phi3": dict(model_type="phi3", sliding_window=None),
}
QUIET: dict[str, Any] = dict(progress=False, metadata=dict(name="Tiny"))  # llama.cpp expects Phi-3's tokens of a file of that name


@pytest.fixture(scope="module")
def build(random_model: Callable[..., Any], byte_level: Callable[..., Any], sentencepiece: Callable[..., Any]) -> Callable[..., Any]:
    """build(name, **changes to the config): a model of MODELS and its tokenizer."""
    tokenizers = {True: sentencepiece(), False: byte_level()}

    def make(name: str, **changes: Any) -> tuple[Any, Any]:
        tokenizer = tokenizers[name.startswith(("llama", "mistral", "gemma"))]
        options = {**SIZES, "vocab_size": len(tokenizer) + 3, **copy.deepcopy(MODELS[name]), **changes}
        return random_model(AutoConfig.for_model(options.pop("model_type"), **options)), tokenizer

    return make


@pytest.fixture(scope="module")
def prompts() -> list[int]:
    return torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def kinds_in(file: Path) -> dict[str, str]:
    return {name: tensor.tensor_type.name for name, tensor in tensors(file).items()}


# Codes that are kept


@pytest.mark.parametrize(("name", "group"), [*((name, 128) for name in MODELS), ("llama", 32), ("qwen2", 32)])
def test_a_repacked_model_computes_the_same(
    name: str, group: int, build: Any, plain: Any, runtime: Any, divergence: Any, prompts: list[int], tmp_path: Path
) -> None:
    model, tokenizer = build(name)
    model = plain(model, group_size=group)
    found = to_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer, **QUIET)
    assert found.files == [tmp_path / "model.gguf"] and found.report is None
    assert kinds_in(found.files[0]) == {name: kind.name for name, kind in found.types.items()}
    kinds = {kind for name, kind in found.types.items() if name.startswith("blk.") and name.endswith(".weight") and "norm" not in name}
    assert kinds == ({Type.Q4_K, Type.F32} if name == "mixtral" else {Type.Q4_K})
    assert {kind for name, kind in found.types.items() if name.startswith(("token_embd", "output."))} == {Type.Q8_0}
    llama = runtime(found.files[0])
    assert divergence(model, llama, prompts) < 3e-3
    written = llama.generate(prompts, 8)
    with torch.no_grad():
        logits = model(torch.tensor([prompts + written])).logits[0, len(prompts) - 1 : -1]
    best, chosen = logits[:, :-3].amax(1), logits[torch.arange(8), written]  # the last rows of the embedding are no tokens
    assert (best - chosen).max() < 0.25  # the same text, but for what is all but equally likely


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("llama", dict(group_size=128), "Q5_0"),
        ("llama", dict(group_size=256), "Q4_K"),
        ("llama", dict(group_size=32, zero_point=False), "Q4_0"),
        ("llama", dict(bits=3, zero_point=False, group_size=-1), "Q3_K"),
        ("llama, tied", dict(bits=8, zero_point=False), "Q8_0"),
        ("qwen2", dict(bits=2, group_size=64), "Q4_0"),
        ("phi3", dict(group_size=64), "Q5_0"),
        ("gemma2", dict(group_size=64), "Q5_0"),
    ],
)
def test_an_exact_file_is_read_as_the_same_bits(
    name: str, options: Any, kind: str, build: Any, plain: Any, byte_level: Any, tmp_path: Path
) -> None:
    """Queries and keys too, whose rows llama.cpp wants in another order."""
    model, tokenizer = build(name)
    model = plain(model, **{"group_size": 128, **options})
    (file,) = to_gguf(model, tmp_path / "model.gguf", exact=True, tokenizer=tokenizer, **QUIET).files
    kinds = kinds_in(file)
    assert {kinds[f"blk.1.{part}.weight"] for part in ("attn_output", "ffn_up", "ffn_down")} == {kind}
    assert kinds["token_embd.weight"] == "F32"
    config = open_checkpoint(model).config
    found = type(model).from_pretrained(tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32).state_dict()
    checked = 0
    for key, value in open_checkpoint(model):
        expected = dequantize_weight(value) if isinstance(value, QuantizedWeight) else value
        atol = 2.0**-22 if name.startswith("gemma") and "norm" in key else 0.0  # stored with 1 added
        torch.testing.assert_close(found[key], expected, rtol=0, atol=atol)
        checked += isinstance(value, QuantizedWeight)
    assert checked >= 8


def test_queries_and_keys_keep_their_codes_in_the_order_of_llama_cpp(build: Any, plain: Any, tmp_path: Path) -> None:
    model, tokenizer = build("llama")
    model = plain(model, group_size=128)
    (file,) = to_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer, **QUIET).files
    values = dict(open_checkpoint(model))
    for part, name, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):
        packed = tensors(file)[f"blk.1.{part}.weight"].data.reshape(-1, 144)[:, 16:].reshape(-1, 4, 1, 32)
        stored = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 256)
        weight = values[f"model.layers.1.self_attn.{name}.weight"]
        assert isinstance(weight, QuantizedWeight)
        q = weight.q.numpy()
        for row in range(len(q)):
            head, i = divmod(row, 64)
            place = 64 * head + (2 * i if i < 32 else 2 * (i - 32) + 1) if heads else row
            assert (stored[place] == q[row]).all()


def test_a_checkpoint_of_another_program_in_every_layout(
    build: Any, write_awq: Any, runtime: Any, divergence: Any, prompts: list[int], tmp_path: Path
) -> None:
    model, tokenizer = build("llama", intermediate_size=192)
    model = write_awq(model, tmp_path / "gemm")  # random codes and scales, groups of 32
    found = to_gguf(tmp_path / "gemm", tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert found.types["blk.0.ffn_down.weight"] is Type.Q4_1 and found.types["blk.0.ffn_up.weight"] is Type.Q4_K
    assert found.files[0].parent == tmp_path / "out" and found.files[0].name.endswith("-Q4_K_S.gguf")
    (exact,) = to_gguf(tmp_path / "gemm", tmp_path / "exact.gguf", exact=True, tokenizer=tokenizer, **QUIET).files
    assert kinds_in(exact)["blk.0.ffn_down.weight"] == "Q5_0"
    assert divergence(model, runtime(exact), prompts) < 3e-3
    (full,) = to_gguf(tmp_path / "gemm", tmp_path / "f32.gguf", type="F32", exact=True, tokenizer=tokenizer, **QUIET).files
    assert divergence(model, runtime(full), prompts) < 1e-6
    expected = tensors(found.files[0])
    for layout in ("gemv", "llm-awq"):
        _lay_out(tmp_path / "gemm", tmp_path / layout, layout)
        other = to_gguf(tmp_path / layout, tmp_path / f"{layout}.gguf", tokenizer=tokenizer, **QUIET)
        assert other.types == found.types
        assert all(np.array_equal(tensor.data, expected[name].data) for name, tensor in tensors(other.files[0]).items())


def _lay_out(gemm: Path, path: Path, layout: str) -> None:
    """The same checkpoint in another layout."""
    stored = load_file(gemm / "model.safetensors")
    for name, value in open_checkpoint(gemm):
        if isinstance(value, QuantizedWeight):
            owner, width = name.removesuffix(".weight"), value.q.shape[1]
            zeros, scales = (pad_groups(values, 32, width) for values in (value.zero_points, value.scales))
            del stored[f"{owner}.qzeros"]
            if layout == "gemv":
                parts = {"qweight": pack_gemv(value.q), "qzeros": pack_gemv(zeros), "scales": scales}
            else:
                scaled = scale_zeros(zeros, scales).T.contiguous()
                parts = {"qweight": pack_gemv_fast(value.q), "scaled_zeros": scaled, "scales": scales.T.contiguous()}
            stored |= {f"{owner}.{part}": tensor for part, tensor in parts.items()}
    path.mkdir()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((gemm / "config.json").read_text())
    config["quantization_config"]["version"] = layout
    (path / "config.json").write_text(json.dumps(config))


# Types that are searched


@pytest.mark.parametrize(("name", "kind", "bound"), [("llama", "Q4_K_M", 0.02), ("qwen2", "IQ4_XS", 0.03), ("phi3", "Q3_K_M", 0.2)])
def test_a_searched_file_is_nearer_to_the_float_model_than_a_plain_one(
    name: str, kind: str, bound: float, build: Any, small_config: Any, runtime: Any, divergence: Any, prompts: list[int], tmp_path: Path
) -> None:
    model, tokenizer = build(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = dict(type=kind, tokenizer=tokenizer, **QUIET)
    tokens = [*torch.randint(3, 90, (64, 48), generator=torch.Generator().manual_seed(0))]
    searched = to_gguf(model, tmp_path / "searched.gguf", config=small_config(calibration=tokens, samples=64), **options)
    plain = to_gguf(model, tmp_path / "plain.gguf", search=False, **options)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert searched.types == plain.types and kinds_in(searched.files[0]) == kinds_in(plain.files[0])
    assert plain.report is None and searched.report is not None
    assert {vars(layer)["kind"] for layer in searched.report.layers} <= {kind.name for kind in searched.types.values()}
    names = [name for name in plain.types if name.startswith(("blk.", "output.")) and name.endswith("weight") and "norm" not in name]
    assert len(searched.report.layers) == len(names)
    lengths = tuple(range(2, 40, 4))
    found, of_plain = (divergence(model, runtime(result.files[0]), prompts, lengths) for result in (searched, plain))
    assert found < min(bound, of_plain)


@pytest.mark.parametrize("name, chosen", [("llama", {}), ("llama, tied", {"target_bpw": 5.0})])
def test_a_directory_is_searched_with_its_own_tokenizer_and_a_block_at_a_time(
    name: str, chosen: Any, build: Any, small_config: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = build(name)
    model.save_pretrained(tmp_path / "Some-Model")
    tokenizer.save_pretrained(tmp_path / "Some-Model")
    config = small_config(calibration=texts * 8, samples=4, seq_len=32)
    seen: list[Any] = []

    def keeping(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(checkpoint.model)
        return export(checkpoint, *args, **kwargs)

    monkeypatch.setattr("awq_hf.to_gguf.export", keeping)
    (file,) = to_gguf(tmp_path / "Some-Model", tmp_path, config=config, progress=False, **chosen).files
    fields = GGUFReader(file).fields
    assert file.name.startswith("Some-Model-")
    if not chosen:
        assert file.name.endswith("-Q4_K_M.gguf")
        assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert "from float weights" in fields["general.description"].contents()
    left = [name for name, parameter in seen[0].named_parameters() if ".layers." in name and not parameter.is_meta]
    assert left and all("norm" in name or name.endswith("bias") for name in left)
    (whole,) = to_gguf(model, tmp_path / "whole.gguf", config=config, tokenizer=tokenizer, progress=False, **chosen).files
    one, other = tensors(file), tensors(whole)
    assert one.keys() == other.keys() and all(np.array_equal(each.data, other[name].data) for name, each in one.items())


def matrix(path: Path, **entries: Any) -> Path:
    """An importance matrix of llama.cpp's. entries: by name, _ for the dots."""
    found = {f"{name.replace('_', '.', 2)}.weight": Entry(mean.astype(np.float32), np.array([1])) for name, mean in entries.items()}
    write_imatrix(path, Imatrix(found, ("text",), 1, 512))
    return path


def test_an_importance_matrix_takes_the_place_of_the_search(build: Any, tmp_path: Path) -> None:
    model, tokenizer = build("llama", num_hidden_layers=1)
    columns = np.ones(256, np.float32)
    columns[::8] = 100
    options = dict(type="Q4_K", tokenizer=tokenizer, **QUIET)
    found = to_gguf(model, tmp_path / "a.gguf", imatrix=matrix(tmp_path / "im.dat", blk_0_ffn_up=columns), **options)
    plain = to_gguf(model, tmp_path / "b.gguf", search=False, **options)
    assert found.report is None
    a, b = tensors(found.files[0]), tensors(plain.files[0])
    assert [name for name in a if not np.array_equal(a[name].data, b[name].data)] == ["blk.0.ffn_up.weight"]
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    errors = [np.square(gguf.dequantize(t["blk.0.ffn_up.weight"].data, Type.Q4_K) - weight)[:, ::8].mean() for t in (a, b)]
    assert errors[0] < 0.9 * errors[1]


def test_types_within_a_budget_and_the_importance_that_was_measured(build: Any, small_config: Any, tmp_path: Path) -> None:
    model, tokenizer = build("llama", num_hidden_layers=2)
    options = dict(config=small_config(samples=4), tokenizer=tokenizer, **QUIET)
    sizes, mixes = [], []
    for bits in (4.5, 6.0):
        found = to_gguf(model, tmp_path / f"{bits}.gguf", target_bpw=bits, save_imatrix=tmp_path / f"{bits}.dat", **options)
        stored = tensors(found.files[0])
        weights = sum(int(np.prod(tensor.shape)) for tensor in stored.values())
        sizes.append(8 * sum(tensor.n_bytes for tensor in stored.values()) / weights)
        mixes.append({name: tensor.tensor_type for name, tensor in stored.items()})
        assert bits - 0.5 < sizes[-1] <= bits and mixes[-1] == found.types
    assert len({kind for name, kind in mixes[0].items() if name.startswith("blk.") and kind is not Type.F32}) > 1
    entries = read_imatrix(tmp_path / "4.5.dat").entries
    assert entries.keys() == {name for name, kind in mixes[0].items() if name.startswith(("blk.", "output.")) and kind is not Type.F32}
    again = to_gguf(model, tmp_path / "again.gguf", type="Q4_K", imatrix=tmp_path / "4.5.dat", tokenizer=tokenizer, **QUIET)
    assert again.report is None


# What is refused


def test_bad_input_is_refused_in_a_sentence_and_leaves_nothing(
    build: Any, plain: Any, small_config: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = build("llama", num_hidden_layers=1)
    matrices = tmp_path_factory.mktemp("importance")
    quantized, eight = plain(copy.deepcopy(model), group_size=128), plain(copy.deepcopy(model), group_size=128, bits=8)
    for work in ("encode_model", "measure", "calibration_windows"):
        monkeypatch.setattr(f"awq_hf.to_gguf.{work}", lambda *_, **__: pytest.fail("work was done first"))
    (tmp_path / "there.gguf").write_text("old")
    other, narrow = matrix(matrices / "other.gguf", blk_7_ffn_up=np.ones(256)), matrix(matrices / "narrow", blk_0_ffn_up=np.ones(64))
    for given, options, error, message in (
        (
            model,
            dict(exact=True),
            ValueError,
            "exact keeps the codes of a quantized checkpoint; this model is float: type F32, F16 or BF16",
        ),
        (model, dict(type="auto"), ValueError, "type auto is for quantized checkpoints.*Q4_K_M"),
        (model, dict(type="Q9_K"), ValueError, "type 'Q9_K' is not written to GGUF files; choose one of F32"),
        (quantized, dict(type="Q9_K"), ValueError, "type 'Q9_K' is not written to GGUF files; choose one of F32"),
        (
            quantized,
            dict(type="Q3_K_M"),
            ValueError,
            r"^model.layers.0.mlp.gate_proj.weight: Q3_K cannot hold these codes: .*; types that do: Q4_K",
        ),
        (quantized, dict(type="Q4_K", exact=True), ValueError, "Q4_K does not hold its weights bit for bit; exact are Q5_0"),
        (model, dict(imatrix=other), ValueError, "other.gguf has no entry for any matrix of this model: it is of another one"),
        (quantized, dict(imatrix=other), ValueError, "has no entry for any matrix of this model"),
        (model, dict(imatrix=narrow), ValueError, "has 64 values for blk.0.ffn_up.weight .*: it is another model's"),
        (model, dict(target_bpw=4.5, search=False), ValueError, "target_bpw is about the search .*: search=False leaves it out"),
        (quantized, dict(target_bpw=4.5), ValueError, "target_bpw is about the search .*: a quantized checkpoint keeps its codes"),
        (model, dict(target_bpw=1.0), ValueError, r"target_bpw=1.0 is too little: .* takes at least \d\.\d+ bits a weight"),
        (quantized, dict(save_imatrix=matrices / "new"), ValueError, "save_imatrix is about the search of a float model"),
        (model, dict(save_imatrix=narrow), ValueError, "narrow exists; choose another name"),
        (eight, {}, ValueError, r"down_proj.weight: no type of blocks holds its codes \(8 bits, .*\); F16 holds"),
        (model, dict(tokenizer=None), ValueError, "has no tokenizer that can be read .*: copy the original's files there"),
        (model, dict(metadata={"licence": "x"}), ValueError, "metadata has no field 'licence'"),
        (model, dict(shards=3), TypeError, "shards"),
    ):
        with pytest.raises(error, match=message) as caught:
            to_gguf(given, tmp_path / "model.gguf", **{"tokenizer": tokenizer, **QUIET, **options})
        assert "\n" not in str(caught.value)
    for given in (model, quantized):
        with pytest.raises(FileExistsError, match=r"there.gguf exists; choose another name, or say overwrite=True"):
            to_gguf(given, tmp_path / "there.gguf", tokenizer=tokenizer, **QUIET)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("there.gguf", "old")]
    assert to_gguf(eight, tmp_path / "f16.gguf", type="F16", tokenizer=tokenizer, **QUIET).types["blk.0.ffn_up.weight"] is Type.F16
