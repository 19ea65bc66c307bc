"""Touch points with transformers: taking over and giving back "awq", what core refuses, saving of copies, dequantize()."""

from __future__ import annotations

import copy
import json
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, XGLMConfig
from transformers.quantizers import auto
from transformers.quantizers.quantizer_awq import AwqQuantizer

import awq_hf
from awq_hf import AwqHfQuantizer, AwqLinear, compat
from awq_hf.report import Report

BITS = (2, 3, 8)


def taken_by() -> tuple[Any, Any]:
    return auto.AUTO_QUANTIZER_MAPPING["awq"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["awq"]


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    awq_hf.register()


@pytest.fixture(scope="module")
def widths(llama_dir: Path, small_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """bits -> the model in memory; its checkpoint is at model.saved_at."""
    models = {}
    for bits in BITS:
        model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=small_config(bits=bits, samples=4))
        model.saved_at = tmp_path_factory.mktemp("widths") / str(bits)
        model.save_pretrained(model.saved_at)
        models[bits] = model
    return models


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120)


# Registration


def test_import_takes_over_and_unregister_gives_back(registered: None, quantized_dir: Path) -> None:
    assert taken_by() == (AwqHfQuantizer, awq_hf.AwqConfig)
    awq_hf.unregister()
    assert taken_by() == (AwqQuantizer, transformers.AwqConfig)
    with pytest.raises(ImportError, match="gptqmodel"):  # transformers' own loader needs it, and is asked again
        AutoModelForCausalLM.from_pretrained(quantized_dir)
    awq_hf.register()
    assert taken_by() == (AwqHfQuantizer, awq_hf.AwqConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(quantized_dir).hf_quantizer, AwqHfQuantizer)


def test_registering_twice_does_not_lose_the_original(registered: None) -> None:
    awq_hf.register()
    awq_hf.register()
    awq_hf.unregister()
    awq_hf.unregister()
    assert taken_by() == (AwqQuantizer, transformers.AwqConfig)


# Widths that AutoAWQ's format does not have


@pytest.mark.parametrize("bits", BITS)
def test_widths_round_trip_under_a_version_of_our_own(bits: int, widths: dict[int, Any], prompt: Tensor) -> None:
    model = widths[bits]
    written = json.loads((model.saved_at / "config.json").read_text())["quantization_config"]
    assert (written["bits"], written["version"], written["quant_method"]) == (bits, "awq_hf", "awq")
    loaded = AutoModelForCausalLM.from_pretrained(model.saved_at)
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert torch.isfinite(loaded(prompt).logits).all()
    for name, tensor in load_file(model.saved_at / "model.safetensors").items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_transformers_own_loader_refuses_them(widths: dict[int, Any]) -> None:
    code = (
        "import sys, awq_hf, transformers\n"
        "awq_hf.unregister()\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        transformers.AutoModelForCausalLM.from_pretrained(path)\n"
        "        print('loaded')\n"
        "    except ValueError as error:\n"
        "        print('refused', 'awq_hf' in str(error))\n"
    )
    result = python(code, *(str(model.saved_at) for model in widths.values()))
    assert result.stdout.splitlines() == ["refused True"] * len(BITS), result.stderr


# Saving


def test_save_writes_the_report(llama_dir: Path, small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=small_config(samples=2))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(prompt).logits, model(prompt).logits)
    copied.model.layers[0].input_layernorm.weight.data.mul_(2)
    for name, each in (("model", model), ("copy", copied)):
        each.save_pretrained(tmp_path / name)
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert [layer["name"] for layer in report["layers"]] == [layer.name for layer in model.awq_report.layers]
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / name)(prompt).logits, each(prompt).logits)
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            assert not any("report" in key for key in file.keys())  # noqa: SIM118


def test_saving_again_what_was_loaded_writes_the_same_bytes(quantized_dir: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(quantized_dir).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (quantized_dir / "model.safetensors").read_bytes()
    again, first = (json.loads((path / "config.json").read_text()) for path in (tmp_path, quantized_dir))
    assert again == first


# dequantize()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.0), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_dequantize_gives_a_plain_model(
    dtype: torch.dtype, tolerance: float, llama_dir: Path, small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=small_config(samples=2), dtype=dtype)
    expected = model(prompt).logits.float()
    plain = model.dequantize()
    assert not any(isinstance(module, AwqLinear) for module in plain.modules())
    assert sum(isinstance(module, nn.Linear) for module in plain.modules()) == 15
    assert not hasattr(plain.config, "quantization_config") and not getattr(plain, "is_quantized", False)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert (plain(prompt).logits.float() - expected).abs().max() <= tolerance * expected.abs().max()
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "report.json").exists()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(prompt).logits, plain(prompt).logits)


def test_dequantize_keeps_the_dtype_of_a_model_that_was_cast_in_memory(
    tiny_llama: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor
) -> None:
    model: Any = awq_hf.quantize(tiny_llama().to(torch.bfloat16), small_config(samples=2))
    assert torch.isfinite(model.dequantize()(prompt).logits).all()


@pytest.mark.parametrize(("loaded", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dequantize_to_another_dtype(loaded: torch.dtype, wanted: torch.dtype, quantized_dir: Path, prompt: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_dir, dtype=loaded)
    rope = model.model.rotary_emb.inv_freq.clone()
    model = model.dequantize(wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted} and model(prompt).logits.dtype == wanted
    assert torch.equal(model.model.rotary_emb.inv_freq, rope)  # which is kept in float32


@pytest.mark.parametrize("wanted", [torch.float16, torch.float32])
def test_dequantize_brings_computed_positions_along(
    wanted: torch.dtype, random_model: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    """XGLM's are a buffer of the model's dtype, which no checkpoint holds."""
    sizes = dict(vocab_size=96, d_model=64, ffn_dim=96, num_layers=1, attention_heads=4, max_position_embeddings=128)
    model: Any = awq_hf.quantize(random_model(XGLMConfig(**sizes), torch.bfloat16), small_config(samples=2))
    model.dequantize(wanted).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {buffer.dtype for buffer in model.buffers()} == {buffer.dtype for buffer in loaded.buffers()} == {wanted}
    assert (model(prompt).logits - loaded(prompt).logits).abs().max() < 0.05 * loaded(prompt).logits.abs().max()


def test_dequantize_keeps_in_float32_what_loading_would(
    random_model: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    latent = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1, first_k_dense_replace=0)
    model = random_model(DeepseekV3Config(**sizes, **latent, **experts, max_position_embeddings=128))
    plain = awq_hf.quantize(model, small_config(samples=2)).dequantize(torch.bfloat16)
    assert plain.state_dict()["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {n: t.dtype for n, t in plain.state_dict().items()}
    assert torch.equal(plain(prompt).logits, loaded(prompt).logits)


def test_offloaded_models_are_not_dequantized_and_stay_as_they_are(quantized_dir: Path, prompt: Tensor, tmp_path: Path) -> None:
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    model: Any = AutoModelForCausalLM.from_pretrained(
        quantized_dir, device_map={**devices, "model.layers.1": "disk"}, offload_folder=str(tmp_path)
    )
    expected = model(prompt).logits
    with pytest.raises(ValueError, match=r'model\.layers\.1\..* is offloaded; load the model with device_map="cpu"'):
        model.dequantize()
    assert torch.equal(model(prompt).logits, expected)


def test_only_the_main_process_adds_to_what_is_saved(quantized_dir: Path, tmp_path: Path) -> None:
    """As accelerate's users save: every process calls it, and the others write no config.json."""
    model = AutoModelForCausalLM.from_pretrained(quantized_dir)
    model.awq_report = Report({}, {})
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, is_main_process=True)
    assert (tmp_path / "report.json").is_file()


def test_dequantize_after_saving(quantized_dir: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_dir)
    expected = model(prompt).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(model.dequantize()(prompt).logits, expected)


def test_dequantized_models_can_be_trained_and_quantized_again(
    quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(quantized_dir).dequantize()
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert torch.isfinite(awq_hf.quantize(plain, small_config(samples=2))(prompt).logits).all()


from_gguf_is_known = pytest.mark.skipif(
    "gguf" not in auto.AUTO_QUANTIZER_MAPPING, reason="this transformers leaves no sign on what it reads from a GGUF file"
)


def from_gguf(demo_dir: Path, tmp_path: Path) -> Any:
    """The demonstration model as transformers reads it from a file: in float, and still called quantized."""
    awq_hf.export(demo_dir / "model", "gguf", tmp_path / "m.gguf", type="Q8_0", search=False, progress=False)
    return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")


@from_gguf_is_known
def test_what_came_out_of_a_gguf_file_can_be_quantized(demo_dir: Path, prompt: Tensor, tmp_path: Path, caplog: Any) -> None:
    model = from_gguf(demo_dir, tmp_path)
    config = awq_hf.AwqConfig.plain_rounding(samples=2, seq_len=16, tokenizer=demo_dir / "model")
    with pytest.raises(ValueError, match="'nothing' is in no module's name"):  # which leaves it what it was
        awq_hf.quantize(model, awq_hf.AwqConfig(modules_to_not_convert=["nothing"]))
    quantized: Any = awq_hf.quantize(model, config, output_dir=tmp_path / "awq")
    assert any("came out of m.gguf" in note for note in quantized.awq_report.notes) and "came out of m.gguf" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "awq")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, AwqLinear)
    assert torch.equal(loaded(prompt).logits, quantized(prompt).logits)
    assert "m.gguf" in (tmp_path / "awq" / "report.json").read_text()


@from_gguf_is_known
def test_blocks_of_a_gguf_file_are_not_quantized_again(demo_dir: Path, tmp_path: Path) -> None:
    model = from_gguf(demo_dir, tmp_path)
    model.hf_quantizer.packed_modules = {"model.layers.0.mlp.up_proj.weight": None}  # as where there is a kernel that computes with them
    with pytest.raises(ValueError, match=r"up_proj.weight is in memory as m.gguf holds it.*GgufConfig\(dequantize=True\)"):
        awq_hf.quantize(model, awq_hf.AwqConfig(tokenizer=demo_dir / "model"))


def test_saved_weights_follow_the_umask(quantized_dir: Path) -> None:
    """Of save_pretrained itself; a server under another user reads them."""
    modes = {stat.S_IMODE(path.stat().st_mode) for path in quantized_dir.iterdir()}
    (quantized_dir.parent / "new").touch()
    assert modes == {stat.S_IMODE((quantized_dir.parent / "new").stat().st_mode)}


def test_chats_are_rendered_as_a_tokenizer_does(demo_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}"
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ messages[-1].content }}:{% endif %}"
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert compat.render_chat(tokenizer.chat_template, messages, **tokenizer.special_tokens_map) == expected
    assert expected == '<|begin_of_text|>{"role": "user", "content": "<é>"}b:'


def test_a_dequantized_checkpoint_needs_no_plugin(quantized_dir: Path, prompt: Tensor, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(quantized_dir).dequantize()
    plain.save_pretrained(tmp_path)
    torch.save({"prompt": prompt, "logits": plain(prompt).logits.detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "torch.set_num_threads(1)\n"
        "logits = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])(expected['prompt']).logits\n"
        "print(torch.allclose(logits, expected['logits'], atol=1e-5), 'awq_hf' in sys.modules)\n"
    )
    result = python(code, str(tmp_path))
    assert result.stdout.split() == ["True", "False"], result.stderr
