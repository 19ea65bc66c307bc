"""What is said of servers: slow kernels, refusals, and how many GPUs the groups allow."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

import awq_hf
from awq_hf.linear import AwqLinear
from awq_hf.serving import serving, serving_notes, tensor_parallel
from awq_hf.spec import QuantSpec

PLAN = {"model.layers.*.mlp.down_proj": "rowwise", "model.layers.*.mlp.up_proj": "colwise", "model.embed_tokens": "embedding_rowwise"}


def linears(in_features: int = 18944, spec: QuantSpec | None = None, **others: QuantSpec) -> dict[str, AwqLinear]:
    """Of one block's MLP; 18944 is Qwen2-7B's."""
    down = AwqLinear(in_features, 64, spec or QuantSpec(), device="meta")
    up = {name: AwqLinear(256, 64, other, device="meta") for name, other in others.items()}
    return {f"model.layers.0.mlp.{name}": module for name, module in {"down_proj": down, **up}.items()}


def test_groups_have_to_stay_whole_on_every_gpu() -> None:
    assert tensor_parallel(linears(), PLAN, 28) == (
        "tensor parallelism over 2 or 4 GPUs; not 8: 28 attention heads"  # what is nearest at hand
    )
    assert tensor_parallel(linears(), PLAN, None) == (
        "tensor parallelism over 2 or 4 GPUs; not 8: the 18944 inputs of model.layers.0.mlp.down_proj do not fall into 8 parts of whole "
        "groups of 128; groups of 32 or 64 would"
    )
    assert tensor_parallel(linears(spec=QuantSpec(group_size=64)), PLAN, None) == "tensor parallelism over 2, 4 or 8 GPUs"
    assert tensor_parallel(linears(spec=QuantSpec(group_size=-1)), PLAN, 32) == "tensor parallelism over 2, 4 or 8 GPUs"
    none = tensor_parallel(linears(384, QuantSpec(group_size=128)), PLAN, 3)
    assert none == "no tensor parallelism; not 2, 4 or 8: 3 attention heads"
    assert tensor_parallel(linears(), {}, 32) is None  # nobody knows


def test_heads_of_keys_and_values_are_dealt_out_evenly() -> None:
    """Phi-4 has 40 attention heads and 10 of those, and is not served over 4 or 8 GPUs."""
    config = lambda kv: LlamaConfig(hidden_size=5120, num_attention_heads=40, num_key_value_heads=kv)  # noqa: E731
    model = lambda kv: SimpleNamespace(tp_plan=PLAN, config=config(kv))  # noqa: E731
    (said,) = serving(model(10), linears(10240))
    assert said == "tensor parallelism over 2 GPUs; not 4 or 8: 10 heads of keys and values"
    for copied_or_dealt_out in (1, 2, 4, 8, 40):
        assert serving(model(copied_or_dealt_out), linears(10240)) == ["tensor parallelism over 2, 4 or 8 GPUs"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (QuantSpec(), None),
        (QuantSpec(group_size=-1), None),
        (QuantSpec(group_size=16), "groups of 16"),
        (QuantSpec(symmetric=True), "symmetric: vLLM and SGLang run it with slow kernels as AWQ"),
        (QuantSpec(bits=8), "8 bits with zero points"),
        (QuantSpec(bits=8, symmetric=True), None),
    ],
)
def test_slow_kernels_are_said_before(spec: QuantSpec, said: str | None) -> None:
    notes = serving_notes(linears(512, spec))
    assert notes == [] if said is None else len(notes) == 1 and notes[0].startswith(said)


def test_what_is_loaded_as_one_has_to_be_stored_alike() -> None:
    notes = serving_notes(linears(512, gate_proj=QuantSpec(bits=8, symmetric=True), up_proj=QuantSpec()))
    assert notes == [
        "vLLM loads gate_proj, up_proj as one matrix and refuses model.layers.0.mlp: "
        "gate_proj has 8 symmetric bits in groups of 128, up_proj 4 bits in groups of 128"
    ]
    assert serving_notes(linears(512, gate_proj=QuantSpec(), up_proj=QuantSpec())) == []


def test_widths_that_servers_do_not_read_are_said() -> None:
    model = SimpleNamespace(tp_plan=PLAN, config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=8)))
    assert serving(model, {}) == []
    assert serving(model, linears(512, QuantSpec(bits=3))) == ["vLLM has no kernels for 3 bits, only for 4 and 8"]
    assert serving(model, linears(512, other=QuantSpec(bits=2))) == ["vLLM has no kernels for 2 bits, only for 4 and 8"]
    for other in (QuantSpec(bits=8), QuantSpec(group_size=64)):
        assert serving(model, linears(512, other=other))[0] == (
            "AWQ's format is 4 bits and one group size; vLLM and SGLang read this as compressed-tensors"
        )
    assert serving(model, linears(512)) == ["tensor parallelism over 2 or 4 GPUs; not 8: the 512 inputs of model.layers.0.mlp.down_proj do "
        "not fall into 8 parts of whole groups of 128; groups of 32 or 64 would"]  # fmt: skip


def test_the_report_has_it(tiny_llama: Callable[..., Any], small_config: Callable[..., Any]) -> None:
    report = awq_hf.quantize(tiny_llama(), small_config(samples=2, zero_point=False)).awq_report
    assert any(note.startswith("symmetric: vLLM") for note in report.notes)
