"""Random damage: a checkpoint loads as what its files say, or is refused in a sentence. Nothing else: no other error, no random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

REFUSALS = (ValueError, OSError)
IDS = torch.arange(3, 9)[None]

quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[..., Any], write_awq: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("fuzz") / "m"
    write_awq(tiny_llama(num_hidden_layers=1, intermediate_size=64, vocab_size=48), path)
    return path


@contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def assert_true_or_refused(file: Path) -> None:
    """Every parameter is the file's tensor of that name, or loading ended in a sentence."""
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent)
    except REFUSALS as error:
        assert str(error)
        return
    found = load_file(file)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, found[name].to(parameter.dtype)), name
        assert not parameter.is_floating_point() or bool(torch.isfinite(parameter).all()), name
    assert model(IDS).logits.shape == (1, 6, 48)


@given(cut=st.floats(0, 1))
@quick
def test_truncated(cut: float, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    with replaced(file, whole[: int(cut * (len(whole) - 1))]), pytest.raises(REFUSALS, match=file.name):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), in_header=st.booleans())
@quick
def test_changed_bytes(changes: list[tuple[float, int]], in_header: bool, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(damaged[:8], "little") if in_header else len(damaged)
    for place, byte in changes:
        damaged[int(place * (end - 1))] = byte
    with replaced(file, bytes(damaged)):
        assert_true_or_refused(file)


DTYPES = ["F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "C64", "F4", "", 7]


@st.composite
def lies(draw: st.DrawFn) -> Callable[[dict[str, Any]], None]:
    """A change to a parsed header: of a shape, a dtype, a name, an offset, or an entry."""
    pick = draw(st.integers(0, 999))
    kind = draw(st.sampled_from(["shape", "dtype", "name", "offsets", "drop", "swap", "add", "transpose"]))
    shape = draw(st.lists(st.one_of(st.integers(-1, 70), st.just(2**62)), max_size=4))
    dtype, other = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999))
    suffix = draw(st.sampled_from(["qweight", "qzeros", "scales", "bias", "weight", "scaled_zeros", "g_idx", "x"]))

    def change(header: dict[str, Any]) -> None:
        names = sorted(name for name in header if name != "__metadata__")
        name, second = names[pick % len(names)], names[other % len(names)]
        entry = header[name]
        if kind == "shape":
            entry["shape"] = shape
        elif kind == "transpose":
            entry["shape"] = entry["shape"][::-1]
        elif kind == "dtype":
            entry["dtype"] = dtype
        elif kind == "name":
            header[f"{name.rpartition('.')[0]}.{suffix}"] = header.pop(name)
        elif kind == "offsets":
            entry["data_offsets"] = [shape[0] if shape else 0, entry["data_offsets"][1]]
        elif kind == "drop":
            del header[name]
        elif kind == "swap":
            header[name], header[second] = header[second], header[name]
        else:
            header[f"extra.{suffix}"] = {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}

    return change


@given(changes=st.lists(lies(), min_size=1, max_size=2))
@settings(quick, max_examples=120)
def test_headers_that_lie(changes: list[Callable[[dict[str, Any]], None]], checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for change in changes:
        change(header)
    text = json.dumps(header).encode()
    with replaced(file, len(text).to_bytes(8, "little") + text + whole[8 + size :]):
        assert_true_or_refused(file)


KEYS = "bits w_bit group_size q_group_size zero_point sym version format checkpoint_format backend modules_to_not_convert pack_dtype meta x"
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["gemm", "gemv", "marlin", "llm-awq", "4", ""])),
    lambda values: st.one_of(st.lists(values, max_size=2), st.dictionaries(st.text(max_size=2), values, max_size=2)),
    max_leaves=4,
)
SENSIBLE = st.sampled_from([2, 3, 4, 8, -1, 32, 64, 128, True, False, "gemm", "GEMM", "awq_hf", "gemv_fast", ["lm_head"]])


@given(changes=st.dictionaries(st.sampled_from(KEYS.split()), st.one_of(JSON, SENSIBLE), max_size=3))
@settings(quick, max_examples=120)
def test_configs_that_lie(changes: dict[str, Any], checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    found = json.loads(file.read_bytes())
    found["quantization_config"].update(changes)
    with replaced(file, json.dumps(found).encode()):
        assert_true_or_refused(checkpoint / "model.safetensors")
