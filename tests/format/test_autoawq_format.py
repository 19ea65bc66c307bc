"""A saved checkpoint, decoded from the description of the format alone: numpy and loops, nothing of the package's own layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import awq_hf

# AutoAWQ "gemm": bits 4i..4i+3 of int32 word c hold logical output column 8c + NIBBLES[i]
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
HIDDEN, INNER, KEYS = 64, 128, 32
SHAPES = {"q_proj": (64, 64), "k_proj": (64, KEYS), "v_proj": (64, KEYS), "o_proj": (64, 64)}  # in, out
SHAPES |= {"gate_proj": (64, INNER), "up_proj": (64, INNER), "down_proj": (INNER, 64)}

Codes = np.ndarray[Any, np.dtype[np.int64]]


def decode_gemm(words: torch.Tensor, columns: int) -> Codes:
    codes = np.zeros((words.shape[0], columns), np.int64)
    for row, row_words in enumerate(words.tolist()):
        for c, word in enumerate(row_words):
            for i, column in enumerate(NIBBLES):
                codes[row, 8 * c + column] = ((word & 0xFFFFFFFF) >> (4 * i)) & 0xF
    return codes


def decode_stream(words: torch.Tensor, columns: int, bits: int) -> Codes:
    """2, 3 and 8 bits: a row is one bit stream, low bits first, columns in order."""
    codes = np.zeros((words.shape[0], columns), np.int64)
    for row, row_words in enumerate(words.tolist()):
        stream = "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in row_words)
        for column in range(columns):
            codes[row, column] = int(stream[column * bits : (column + 1) * bits][::-1], 2)
        assert "1" not in stream[columns * bits :], "the rest of the last word is zero"
    return codes


def decode(tensors: dict[str, torch.Tensor], name: str, n_out: int, bits: int) -> torch.Tensor:
    """w[o, i] = (q[i, o] - z[i // G, o]) * s[i // G, o] in float32: [out, in]."""
    unpack = (lambda w: decode_gemm(w, n_out)) if bits == 4 else (lambda w: decode_stream(w, n_out, bits))
    q, z = unpack(tensors[f"{name}.qweight"]), unpack(tensors[f"{name}.qzeros"])
    scales = tensors[f"{name}.scales"].numpy().astype(np.float32)
    group = np.arange(len(q)) // (len(q) // len(scales))
    weight = (q - z[group]).astype(np.float32) * scales[group]
    return torch.from_numpy(weight.T.copy())


def llama(bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=bias,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def quantized(directory: Path, bias: bool = False, **options: Any) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor], dict[str, Any]]:
    """The model after quantization, and what save_pretrained wrote: tensors and config.json."""
    tokens = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(1))
    config = awq_hf.AwqConfig(calibration=list(tokens), samples=6, seq_len=32, **options)
    model = awq_hf.quantize(llama(bias), config)
    model.save_pretrained(directory)
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return model, tensors, json.loads((directory / "config.json").read_text())


CASES = [
    (4, 16, True),
    (4, 32, True),
    (4, -1, True),
    (4, 32, False),
    (4, -1, False),
    (2, 16, True),
    (3, 32, True),
    (3, -1, False),
    (8, 32, True),
]


@pytest.mark.parametrize(("bits", "group_size", "zero_point"), CASES)
def test_a_saved_checkpoint_decodes_to_the_dequantized_model(bits: int, group_size: int, zero_point: bool, tmp_path: Path) -> None:
    model, tensors, config = quantized(tmp_path, bits=bits, group_size=group_size, zero_point=zero_point)
    model.config.dtype = torch.float32  # saving leaves its name there
    plain = model.dequantize()

    stored = config["quantization_config"]
    assert stored["quant_method"] == "awq" and stored["version"] == ("gemm" if bits == 4 else "awq_hf")
    assert (stored["bits"], stored["group_size"], stored["zero_point"]) == (bits, group_size, zero_point)
    assert "lm_head" in stored["modules_to_not_convert"]

    linears = {name: m for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    assert len(linears) == 2 * len(SHAPES)
    for name, linear in linears.items():
        n_in, n_out = SHAPES[name.rsplit(".", 1)[-1]]
        groups, words = 1 if group_size == -1 else n_in // group_size, -(-n_out * bits // 32)
        expected = {"qweight": ((n_in, words), torch.int32), "qzeros": ((groups, words), torch.int32)}
        expected["scales"] = ((groups, n_out), torch.float16)
        for suffix, (shape, dtype) in expected.items():
            tensor = tensors[f"{name}.{suffix}"]
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), f"{name}.{suffix}"
        assert f"{name}.weight" not in tensors
        assert linear.weight.dtype == torch.float32
        assert torch.equal(decode(tensors, name, n_out, bits), linear.weight), f"{name} is bit for bit what was saved"
        if not zero_point:
            zeros = tensors[f"{name}.qzeros"]
            decoded = decode_gemm(zeros, n_out) if bits == 4 else decode_stream(zeros, n_out, bits)
            assert (decoded == 2 ** (bits - 1)).all()


def test_a_model_can_be_dequantized_after_it_was_saved(tmp_path: Path) -> None:
    model, tensors, _ = quantized(tmp_path, bits=4, group_size=32)
    name = "model.layers.1.self_attn.k_proj"
    assert torch.equal(model.dequantize().get_submodule(name).weight, decode(tensors, name, KEYS, 4))


def test_what_is_not_quantized_is_stored_as_it_is(tmp_path: Path) -> None:
    model, tensors, _ = quantized(tmp_path, bias=True, bits=4, group_size=32, modules_to_not_convert=["mlp"], scale=False)
    original = llama(bias=True).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"):
        assert torch.equal(tensors[name], original[name]), name
    assert not any("mlp" in name and name.endswith("qweight") for name in tensors)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(tensors[f"model.layers.1.self_attn.{name}.bias"], original[f"model.layers.1.self_attn.{name}.bias"])
    assert sum(name.endswith(".qweight") for name in tensors) == 8
    assert {t.dtype for n, t in tensors.items() if n.endswith(("weight", "bias"))} <= {torch.float32, torch.int32}
    assert model.awq_report.left_in_float["model.layers.0.mlp.up_proj"] == "modules_to_not_convert"


def test_the_quantized_model_computes_with_the_saved_weights(tmp_path: Path) -> None:
    """The stored integers, put into a plain model with the folded norms, give the quantized model's logits."""
    model, tensors, _ = quantized(tmp_path, bits=4, group_size=16)
    plain, ids = llama(), torch.arange(20)[None]
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.qweight" in tensors:
            module.weight.data = decode(tensors, name, module.out_features, 4)
    plain.load_state_dict({k: v for k, v in tensors.items() if k in plain.state_dict()}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
