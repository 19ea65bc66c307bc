"""What several tests share: tiny random models, token tensors, and the demonstration model of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# Before transformers is imported. Nothing here needs a network, and on tiny matrices threads only wait for each other.
# The exact reference computes, but for tests of the kernels: what a float32 model gives is compared with tight tolerances.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", AWQ_HF_KERNEL="reference")
torch.set_num_threads(1)

from tests.hub.fixtures import hub as hub  # noqa: E402

VOCABULARY = 96
LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attention_bias=True,
    mlp_bias=True,
)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="module")
def usual_kernels() -> Iterator[None]:
    """The kernels that users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWQ_HF_KERNEL")
        yield


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks that were loaded from their files, in that order."""
    from awq_hf.streaming import InFiles

    found: list[int] = []
    load = InFiles.load

    def noted(self: InFiles, index: int) -> None:
        found.append(index)
        load(self, index)

    monkeypatch.setattr(InFiles, "load", noted)
    return found


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """random_model(config, dtype, auto class): its weights, norms and biases are all random: norms at 1 and biases at 0 hide errors."""
    from transformers import AutoModelForCausalLM

    def build(config: Any, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM) -> Any:
        generator = torch.Generator().manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # a norm at 1 (or at 0, where the module adds 1), or a bias
                parameter.data.add_(0.3 * noise)
            else:
                parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
        return model.to(dtype)

    return build


@pytest.fixture(scope="session")
def tiny_llama(random_model: Callable[..., Any]) -> Callable[..., Any]:
    """tiny_llama(dtype, **changes to its config): two blocks, grouped-query attention, biases everywhere."""
    from transformers import LlamaConfig

    def build(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        return random_model(LlamaConfig(**{**LLAMA, **changes}), dtype)

    return build


@pytest.fixture(scope="session")
def tokens() -> list[Tensor]:
    """Calibration samples of different lengths, for models with 96 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (40, 24, 56, 40, 33, 47) * 2]


@pytest.fixture(scope="session")
def prompt() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def small_config(tokens: list[Tensor]) -> Callable[..., Any]:
    """small_config(**options): an AwqConfig that suits the tiny models."""
    from awq_hf import AwqConfig

    return lambda **options: AwqConfig(**{"group_size": 32, "calibration": tokens, "samples": 8, "seq_len": 48, **options})


@pytest.fixture(scope="session")
def llama_dir(tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint of the tiny Llama, without a tokenizer."""
    path = tmp_path_factory.mktemp("llama") / "float"
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def quantized_dir(llama_dir: Path, small_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized to 4 bits."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("llama") / "awq"
    AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=small_config()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def write_awq() -> Callable[..., Any]:
    """write_awq(model, path, quantized, rename, changes, **quantization_config): save `model` as another program would have.

    The Linears whose name contains `quantized` become random 4-bit weights, in the model too, which is returned. rename(name of a
    tensor) is its name in the file; changes are tensors to add, or None to leave one out.
    """
    import json

    from safetensors.torch import save_file
    from torch import nn

    from awq_hf import AwqLinear, QuantizedWeight, QuantSpec
    from awq_hf.affine import dequantize_weight

    def write(
        model: Any,
        path: Path,
        quantized: str = ".layers.",
        rename: Callable[[str], str] = str,
        changes: dict[str, Tensor | None] | None = None,
        **quantization_config: Any,
    ) -> Any:
        generator, group = torch.Generator().manual_seed(3), 32
        tensors: dict[str, Tensor | None] = dict(model.state_dict())
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and quantized in name:
                n_out, n_in = linear.weight.shape
                q, z = (torch.randint(0, 16, (n_out, n), generator=generator, dtype=torch.uint8) for n in (n_in, n_in // group))
                scales = (0.001 + torch.rand(z.shape, generator=generator) / 64).half()
                weight = QuantizedWeight(q, scales, z, QuantSpec(4, group))
                linear.weight.data = dequantize_weight(weight)
                tensors |= {f"{name}.{part}": p.data for part, p in AwqLinear.from_quantized(weight).named_parameters()}
                del tensors[f"{name}.weight"]
        path.mkdir(parents=True)
        kept = {rename(name): tensor.clone() for name, tensor in {**tensors, **(changes or {})}.items() if tensor is not None}
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
        awq = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **quantization_config}
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": awq}))
        return model

    return write


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The package's demonstration: model/, calibration.txt, evaluation.txt."""
    import awq_hf

    return Path(awq_hf.__file__).parent / "data" / "demo"


@pytest.fixture(scope="session")
def two_blocks(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model with the first two of its four blocks, and its tokenizer: half the time, where more would prove no more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("demo") / "model"
    AutoModelForCausalLM.from_pretrained(demo_dir / "model", num_hidden_layers=2).save_pretrained(path)
    AutoTokenizer.from_pretrained(demo_dir / "model").save_pretrained(path)
    return path


class CommandResult(NamedTuple):
    status: int
    out: str
    err: str

    def refused(self, *parts: str) -> bool:
        """Whether it failed, printed nothing but an error, and that says all of `parts`, however the lines are broken."""
        squeezed = "".join(self.err.split())
        return (self.status, self.out) == (1, "") and all("".join(part.split()) in squeezed for part in ("error: ", *parts))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CommandResult]:
    """run("quantize", MODEL, OUT, ...): the console script's main(), in this process. It draws no card: that is model_cards' own."""
    from awq_hf import cli
    from awq_hf.cli import common

    monkeypatch.setattr("awq_hf.model_cards.make_card", lambda *_args, **_options: {"README.md": b"a card"})

    def call(*arguments: object) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["awq-hf", *map(str, arguments)])
        monkeypatch.setattr(common, "debug", False)
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return CommandResult(status, *capsys.readouterr())

    return call


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing is a failure: what is wrong should have been said before."""
    import awq_hf

    def fail(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(awq_hf, "quantize", fail)
