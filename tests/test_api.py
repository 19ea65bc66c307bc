"""awq_hf.quantize: models in memory, finished directories, calibration in every shape, and failures that leave nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import awq_hf
from awq_hf import AwqConfig, AwqLinear, hf_quantizer

WRITTEN = [
    *("config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "report.json"),
    *("tokenizer.json", "tokenizer_config.json"),
]
LINEARS = 14


def files_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def tokenizer(demo_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_dir / "model")


# Where the model comes from


def test_in_memory_gives_what_from_pretrained_gives(
    tiny_llama: Callable[..., Any], quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama()
    quantized = awq_hf.quantize(model, small_config())
    assert quantized is model and model.is_quantized
    assert sum(isinstance(module, AwqLinear) for module in model.modules()) == LINEARS == len(model.awq_report.layers)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (quantized_dir / "model.safetensors").read_bytes()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(prompt).logits, model(prompt).logits)


def test_a_directory(llama_dir: Path, quantized_dir: Path, small_config: Callable[..., Any], prompt: Tensor) -> None:
    model = awq_hf.quantize(llama_dir, small_config(), dtype=torch.float32, device_map="cpu")
    assert torch.equal(model(prompt).logits, AutoModelForCausalLM.from_pretrained(quantized_dir)(prompt).logits)


def test_training_mode_does_not_reach_the_result(
    random_model: Callable[..., Any], small_config: Callable[..., Any], prompt: Tensor
) -> None:
    """Dropout is off while calibrating, whatever mode the model comes in, and the model goes back in that mode."""
    sizes = dict(vocab_size=96, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.OPTConfig(**sizes, max_position_embeddings=128, dropout=0.5)
    expected = awq_hf.quantize(random_model(config), small_config())
    model = random_model(config).train()
    model.lm_head.eval()
    trained = awq_hf.quantize(model, small_config())
    assert trained is model and [name for name, module in trained.named_modules() if not module.training] == ["lm_head"]
    assert torch.equal(trained.eval()(prompt).logits, expected(prompt).logits)


def test_what_is_quantized_already_is_refused(quantized_dir: Path, small_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"quantized already.*dequantize\(\)"):
        awq_hf.quantize(AutoModelForCausalLM.from_pretrained(quantized_dir), small_config())


def test_loading_options_are_refused_for_a_model_in_memory(tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="dtype"):
        awq_hf.quantize(tiny_llama(), small_config(), dtype=torch.float16)


# Calibration


def quantize_demo(demo_dir: Path, calibration: Any, **options: Any) -> dict[str, Any]:
    """What the report says about the calibration. Plain rounding, for it is quick."""
    config = AwqConfig.plain_rounding(calibration=calibration, samples=4, seq_len=32, **options)
    model: Any = awq_hf.quantize(demo_dir / "model", config)
    assert len(model.awq_report.layers) == 28
    return dict(model.awq_report.calibration)


def test_calibration_on_the_text_of_the_package(demo_dir: Path) -> None:
    said = quantize_demo(demo_dir, None)
    assert said["source"] == "awq-hf's embedded multi-domain text" and (said["windows"], said["tokens"]) == (4, 128)


def test_calibration_on_a_file(demo_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The Union, and the States that are in it. " * 40, encoding="utf-8")
    for path in (tmp_path / "notes.txt", str(tmp_path / "notes.txt")):
        assert quantize_demo(demo_dir, path)["source"] == "notes.txt"


def test_calibration_on_strings_and_on_their_tokens_is_the_same(demo_dir: Path, tokenizer: Any) -> None:
    texts = ["In the beginning God created the heaven and the earth. " * n for n in (1, 7, 3)]
    tokens = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    from_texts, from_tokens = quantize_demo(demo_dir, texts), quantize_demo(demo_dir, tokens)
    assert from_texts["sha256"] == from_tokens["sha256"] and from_texts["tokens"] == from_tokens["tokens"]
    assert (from_texts["source"], from_tokens["source"]) == ("3 texts", "3 token tensors")


def test_calibration_uses_every_token_whatever_the_lengths(tiny_llama: Callable[..., Any], tokens: list[Tensor]) -> None:
    config = AwqConfig(group_size=32, calibration=tokens, samples=100, seq_len=50)
    model: Any = awq_hf.quantize(tiny_llama(), config)
    said = model.awq_report.calibration
    assert said["tokens"] == sum(len(sample) for sample in tokens) and said["windows"] == 10


@pytest.mark.parametrize("shape", [(20,), (3, 20), (1, 2)])
def test_calibration_on_one_tensor(shape: tuple[int, ...], tiny_llama: Callable[..., Any], prompt: Tensor) -> None:
    calibration: Any = torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(0))
    model: Any = awq_hf.quantize(tiny_llama(), AwqConfig(group_size=32, calibration=calibration, samples=4, seq_len=16))
    assert model.awq_report.calibration["tokens"] == calibration.numel() and torch.isfinite(model(prompt).logits).all()


@pytest.mark.parametrize("given", ["object", "path"])
def test_another_tokenizer(given: str, demo_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(demo_dir / "model").save_pretrained(tmp_path / "bare")
    config = AwqConfig.plain_rounding(calibration=["some text"] * 20, samples=2, seq_len=16)
    other = tokenizer if given == "object" else str(demo_dir / "model")
    awq_hf.quantize(tmp_path / "bare", config, tokenizer=other, output_dir=tmp_path / "out")
    assert files_in(tmp_path / "out") == WRITTEN


@pytest.mark.parametrize("calibration", [[], ["", "  \n"], [1, 2], [torch.rand(8)], "no-such-file.txt", ["x", torch.arange(3)]])
def test_calibration_that_is_none(calibration: Any, demo_dir: Path) -> None:
    with pytest.raises(ValueError, match="calibration"):
        quantize_demo(demo_dir, calibration)


# The directory that is written


def test_writes_a_whole_directory(demo_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    config = AwqConfig.plain_rounding(calibration=demo_dir / "calibration.txt", samples=2, seq_len=32)
    (tmp_path / "out").mkdir()  # empty: fine
    model: Any = awq_hf.quantize(demo_dir / "model", config, output_dir=tmp_path / "out")
    assert files_in(tmp_path / "out") == WRITTEN and files_in(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(model.awq_report.to_dict()))
    prompt = tokenizer("The state of our Union", return_tensors="pt")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(**prompt).logits, model(**prompt).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Union").input_ids == tokenizer("Union").input_ids


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_model_without_tokenizer_is_written_too(
    in_memory: bool, llama_dir: Path, tiny_llama: Callable[..., Any], small_config: Callable[..., Any], tmp_path: Path
) -> None:
    """Calibrated on tokens it needs none; work that is done is not thrown away."""
    awq_hf.quantize(tiny_llama() if in_memory else llama_dir, small_config(samples=2), output_dir=tmp_path / "out")
    assert files_in(tmp_path / "out") == WRITTEN[:5]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_exists_is_refused_before_any_work_and_left_alone(kind: str, small_config: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = out / "precious.txt" if kind == "directory" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match="out exists"):
        awq_hf.quantize("no-such-model", small_config(), output_dir=out)
    assert kept.read_text() == "mine" and files_in(tmp_path) == ["out"]


# Failures in the middle


@pytest.mark.parametrize("exception", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("empty_directory", [False, True])
def test_a_failure_while_saving_leaves_nothing(
    exception: BaseException, empty_directory: bool, demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, directory: Path, *_args: Any, **_kwargs: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise exception

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    if empty_directory:
        (tmp_path / "out").mkdir()
    config = AwqConfig.plain_rounding(calibration=demo_dir / "calibration.txt", samples=2, seq_len=16)
    with pytest.raises(type(exception)):
        awq_hf.quantize(demo_dir / "model", config, output_dir=tmp_path / "out")
    assert files_in(tmp_path) == (["out"] if empty_directory else [])
    assert not empty_directory or files_in(tmp_path / "out") == []


def test_a_failure_while_quantizing_leaves_nothing(
    llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(hf_quantizer, "quantize_model", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        awq_hf.quantize(llama_dir, small_config(), output_dir=tmp_path / "out")
    assert files_in(tmp_path) == []


def test_a_damaged_weight_is_named(tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        awq_hf.quantize(model, small_config())
    assert not model.is_quantized and not {"quantization_config", "_is_quantized"} & vars(model.config).keys()


@pytest.mark.parametrize("exception", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["awq_hf.block.BlockWork.round_groups", "awq_hf.hf_quantizer.prepare_kernels"])
def test_a_model_that_is_left_half_quantized_is_known(
    exception: BaseException,
    where: str,
    tiny_llama: Callable[..., Any],
    small_config: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: Any) -> None:
        raise exception

    model = tiny_llama()
    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(exception)):
            awq_hf.quantize(model, small_config())
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    for again in (lambda: awq_hf.quantize(model, small_config()), lambda: awq_hf.export(model, "dense", tmp_path / "out")):
        with pytest.raises(ValueError, match="a quantization of this LlamaForCausalLM broke off .* load the model again"):
            again()
    assert files_in(tmp_path) == []


def test_what_failed_before_the_work_can_be_tried_again(tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="is in no module's name"):
        awq_hf.quantize(model, small_config(modules_to_not_convert=["vision"]))
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        awq_hf.quantize(model, small_config())
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = 0
    quantized: Any = awq_hf.quantize(model, small_config())
    assert quantized.is_quantized
    again: Any = awq_hf.quantize(quantized.dequantize(), small_config())
    assert again.is_quantized


def test_what_prepares_images_comes_along(llama_dir: Path, small_config: Callable[..., Any], tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama_dir, tmp_path / "float"))
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    awq_hf.quantize(source, small_config(), output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'
    assert not (tmp_path / "out" / "processor_config.json").exists()
