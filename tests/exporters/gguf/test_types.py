"""Types of tensors: mixes as llama-quantize makes them, what holds the codes of quantized weights, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig

from awq_hf.exporters.gguf.names import Place, Plan
from awq_hf.exporters.gguf.types import assign, check_name, encoding, file_type, most_used, names
from awq_hf.spec import QuantSpec

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PHI = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


class Model:
    """Names and shapes of a model's tensors. kind: of the matrices in the blocks; the rest is float."""

    def __init__(
        self,
        n: int,
        heads: int = 4,
        kind: Any = torch.float16,
        width: int = 4096,
        tied: bool = False,
        parts: Any = PARTS,
        experts: Any = (),
    ) -> None:
        self.config = AutoConfig.for_model(
            "llama", num_hidden_layers=n, num_attention_heads=8 * heads, num_key_value_heads=8, tie_word_embeddings=tied
        )
        for name, value in experts:
            setattr(self.config, name, value)
        found: dict[str, Any] = {"model.embed_tokens": ("token_embd", (100, width), torch.float16)}
        if not tied:
            found["lm_head"] = ("output", (100, width), torch.float16)
        for i in range(n):
            found[f"model.layers.{i}.input_layernorm"] = (f"blk.{i}.attn_norm", (width,), torch.float16)
            for part, name in parts.items():
                found[f"model.layers.{i}.{name}"] = (f"blk.{i}.{part}", (64, width), kind)
        self.kinds = {f"{name}.weight": kind for name, (_, _, kind) in found.items()}
        self.plan = Plan(
            {f"{name}.weight": Place(f"{target}.weight") for name, (target, _, _) in found.items()},
            {f"{target}.weight": shape for target, shape, _ in found.values()},
        )

    def types(self, wanted: str, exact: bool = False) -> dict[str, Type]:
        found = assign(self.plan, self.kinds, self.config, wanted, exact)
        assert list(found) == list(self.plan.shapes)
        return {name.removesuffix(".weight"): kind for name, kind in found.items()}

    def blocks_with(self, wanted: str, part: str, kind: Type) -> list[int]:
        found = self.types(wanted)
        return [i for i in range(self.config.num_hidden_layers) if found[f"blk.{i}.{part}"] is kind]


# What llama.cpp prints of the usual files of Llama 2 7B (heads share nothing), and of Llama 3 8B and Mistral (four share a key head).
@pytest.mark.parametrize(
    ("mix", "heads", "counts"),
    [
        ("Q2_K_M", 1, dict(Q2_K=129, Q3_K=96, Q6_K=1)),
        ("Q2_K_M", 4, dict(Q2_K=129, Q3_K=64, Q4_K=32, Q6_K=1)),
        ("Q3_K_S", 1, dict(Q3_K=225, Q6_K=1)),
        ("Q3_K_M", 1, dict(Q3_K=129, Q4_K=92, Q5_K=4, Q6_K=1)),
        ("Q3_K_L", 1, dict(Q3_K=129, Q5_K=96, Q6_K=1)),
        ("Q4_K_S", 1, dict(Q4_K=217, Q5_K=8, Q6_K=1)),
        ("Q4_K_M", 4, dict(Q4_K=193, Q6_K=33)),
        ("Q5_K_S", 4, dict(Q5_K=225, Q6_K=1)),
        ("Q5_K_M", 4, dict(Q5_K=193, Q6_K=33)),
        ("IQ4_XS", 4, dict(IQ4_XS=193, Q5_K=32, Q6_K=1)),
        ("IQ4_XS", 1, dict(IQ4_XS=225, Q6_K=1)),
        ("IQ4_NL", 4, dict(IQ4_NL=193, Q5_K=32, Q6_K=1)),
    ],
)
def test_mixes_have_the_tensors_of_the_files_that_people_know(mix: str, heads: int, counts: dict[str, int]) -> None:
    found = Counter(kind.name for kind in Model(32, heads).types(mix).values())
    assert found == {"F32": 32, **counts}


def test_which_blocks_get_more() -> None:
    often = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for part in ("attn_v", "ffn_down"):
        assert Model(32).blocks_with("Q4_K_M", part, Type.Q6_K) == often
        assert Model(32).blocks_with("Q5_K_M", part, Type.Q6_K) == often
    assert Model(22).blocks_with("Q4_K_M", "ffn_down", Type.Q6_K) == [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]
    assert Model(2).blocks_with("Q4_K_M", "attn_v", Type.Q6_K) == [1]
    assert Model(24).blocks_with("Q3_K_M", "ffn_down", Type.Q5_K) == [0]  # 24 / 16, rounded down
    assert Model(24).blocks_with("Q3_K_M", "attn_v", Type.Q5_K) == [0, 1]
    assert Model(24).blocks_with("Q4_K_S", "ffn_down", Type.Q5_K) == [0, 1, 2]


def test_a_fused_projection_is_treated_as_what_it_holds_of_most_weight() -> None:
    phi = Model(32, 1, parts=PHI)
    assert phi.blocks_with("Q4_K_M", "attn_qkv", Type.Q6_K) == Model(32).blocks_with("Q4_K_M", "attn_v", Type.Q6_K)
    assert phi.blocks_with("Q3_K_M", "attn_qkv", Type.Q5_K) == [0, 1]
    assert phi.blocks_with("Q2_K_M", "attn_qkv", Type.Q3_K) == list(range(32))


def test_models_of_seventy_billion_get_more_where_eight_heads_share_a_value() -> None:
    assert Model(80, 8).blocks_with("Q4_K_M", "attn_v", Type.Q4_K) == []
    assert Model(80, 8).blocks_with("Q3_K_S", "attn_v", Type.Q5_K) == list(range(80))
    assert Model(80, 1).blocks_with("Q3_K_S", "attn_v", Type.Q3_K) == list(range(80))  # of 65 billion
    assert Model(80, 8).blocks_with("Q4_K", "attn_v", Type.Q4_K) == list(range(80))


@pytest.mark.parametrize("mix", ["Q3_K_S", "Q4_K_M", "IQ4_XS"])
@pytest.mark.parametrize("attribute", ["num_local_experts", "num_experts"])
def test_what_is_small_beside_eight_experts_gets_more(mix: str, attribute: str) -> None:
    parts = {**PARTS, "ffn_down_exps": "mlp.experts", "ffn_gate_inp": "mlp.gate"}
    found = Model(32, parts=parts, experts=[(attribute, 8)]).types(mix)
    assert [found[f"blk.9.{part}"] for part in ("attn_k", "attn_v", "attn_output")] == [Type.Q8_0, Type.Q8_0, Type.Q5_K]
    assert found["blk.9.ffn_gate_inp"] is Type.F32
    assert found["blk.9.ffn_down_exps"] is found["blk.9.ffn_down"]  # of block 9, Q6_K in Q4_K_M
    four = Model(32, parts=parts, experts=[(attribute, 4)]).types(mix)
    assert four["blk.8.attn_k"] is found["blk.8.attn_q"] is four["blk.8.attn_q"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_1", "Q2_K"])
def test_a_plain_type_is_that_of_all_matrices(kind: str) -> None:
    found = Model(4).types(kind)
    assert {found["token_embd"], *(found[f"blk.{i}.{part}"] for i in range(4) for part in PARTS)} == {Type[kind]}
    assert found["output"] is (Type[kind] if kind in ("F32", "F16", "BF16", "Q8_0") else Type.Q6_K)
    assert found["blk.3.attn_norm"] is Type.F32
    assert Model(4, tied=True).types(kind)["token_embd"] is found["output"]


@pytest.mark.parametrize(
    ("wanted", "width", "expected"),
    [
        *[(kind, 288, other) for kind, other in dict(Q2_K="IQ4_NL", Q3_K="IQ4_NL", Q4_K="Q5_0", Q5_K="Q5_1", Q6_K="Q8_0").items()],
        *[(kind, 288, kind) for kind in ("Q8_0", "Q5_0", "Q4_1", "Q4_0", "F16", "F32")],
        *[(kind, 72, "F16") for kind in ("Q4_K", "Q8_0", "Q4_0")],
        *[(kind, 72, kind) for kind in ("F32", "BF16")],
    ],
)
def test_rows_that_blocks_do_not_divide(wanted: str, width: int, expected: str) -> None:
    found = Model(2, width=width).types(wanted)
    assert found["blk.0.ffn_up"].name == found["token_embd"].name == expected
    if wanted in ("Q4_K", "Q4_0") and width == 288:
        assert found["output"] is Type.Q8_0
    assert Model(2, width=288).types("IQ4_XS")["blk.0.ffn_up"] is Type.IQ4_NL


SMALLEST = {  # of all that hold the codes; those that do so bit for bit, for rows of 512 and of 96
    (4, 128, False): ("Q4_K", "Q5_0"),
    (4, 128, True): ("Q4_0", "Q4_0"),
    (4, 256, False): ("Q4_K", "Q4_K"),
    (4, -1, False): ("Q4_K", "Q4_K"),
    (4, 32, False): ("Q4_K", "Q5_0"),
    (4, 16, False): ("Q6_K", None),
    (3, 128, False): ("Q4_0", "Q4_0"),
    (3, 128, True): ("Q3_K", "Q4_0"),
    (3, 256, True): ("Q3_K", "Q3_K"),
    (2, 128, False): ("Q2_K", "Q4_0"),
    (2, 256, False): ("Q2_K", "Q2_K"),
    (2, 32, False): ("Q3_K", "Q4_0"),
    (8, 128, True): ("Q8_0", "Q8_0"),
    (8, 128, False): (None, None),
}


@pytest.mark.parametrize("spec", SMALLEST)
@pytest.mark.parametrize("exact", [False, True])
def test_auto_takes_the_smallest_type_that_holds_the_codes(spec: tuple[int, int, bool], exact: bool) -> None:
    expected, model = SMALLEST[spec][exact], Model(2, kind=QuantSpec(*spec), width=512)
    if expected is None:
        with pytest.raises(
            ValueError, match=f"^model.layers.0.self_attn.q_proj.weight: no type of blocks holds its codes .*{spec[0]} bits"
        ):
            model.types("auto", exact)
        found = model.types("F32" if exact else "F16", exact)  # what the message names
        assert found["blk.1.ffn_up"].name == ("F32" if exact else "F16")
    else:
        found = model.types("auto", exact)
        assert {found[f"blk.1.{part}"].name for part in PARTS} == {expected}
        assert most_used(found) is Type[expected]
        assert (found["token_embd"], found["output"]) == ((Type.F16, Type.F16) if exact else (Type.Q8_0, Type.Q8_0))


def test_float_matrices_stay_as_they_are_when_all_is_to_be_exact() -> None:
    model = Model(2, kind=QuantSpec(4, 128))
    for dtype, kind in ((torch.bfloat16, Type.BF16), (torch.float32, Type.F32), (torch.float16, Type.F16)):
        model.kinds["lm_head.weight"] = model.kinds["model.layers.0.mlp.up_proj.weight"] = dtype
        found = model.types("auto", exact=True)
        assert (found["output"], found["blk.0.ffn_up"], found["token_embd"]) == (kind, kind, Type.F16)
        assert model.types("auto")["blk.0.ffn_up"] is Type.Q8_0


def test_what_cannot_hold_codes_is_refused_with_what_can() -> None:
    quantized = Model(2, kind=QuantSpec(4, 128))
    first = r"^model.layers.0.self_attn.q_proj.weight: "
    with pytest.raises(ValueError, match=first + r"Q3_K cannot hold these codes: .*; types that do: Q4_K, Q4_1, Q5_0, Q6_K, Q8_0$"):
        quantized.types("Q3_K")
    with pytest.raises(ValueError, match=first + r"Q4_K does not hold its weights bit for bit; exact are Q5_0, Q8_0, F32$"):
        quantized.types("Q4_K", exact=True)
    with pytest.raises(ValueError, match=first + r"F16 does not hold .*; exact are Q5_0, Q8_0, F32$"):
        quantized.types("F16", exact=True)
    with pytest.raises(ValueError, match=first + r"BF16 does not hold .*; exact are F32$"):
        Model(2, kind=QuantSpec(8, 128)).types("BF16", exact=True)
    assert quantized.types("F32", exact=True)["blk.0.ffn_up"] is quantized.types("F32")["blk.0.ffn_up"] is Type.F32
    assert quantized.types("Q4_K_M")["blk.0.attn_v"] is Type.Q4_K and quantized.types("Q4_K_M")["blk.1.attn_v"] is Type.Q6_K


@pytest.mark.parametrize(
    ("wanted", "called"),
    [
        ("F32", "F32"),
        ("BF16", "BF16"),
        ("Q8_0", "Q8_0"),
        ("Q5_1", "Q5_1"),
        ("Q6_K", "Q6_K"),
        ("Q4_K", "Q4_K_S"),
        ("Q2_K", "Q2_K_S"),
        ("Q2_K_M", "Q2_K"),
        ("Q3_K_L", "Q3_K_L"),
        ("IQ4_XS", "IQ4_XS"),
        ("IQ4_NL", "IQ4_NL"),
    ],
)
def test_files_are_called_what_llama_cpp_and_the_hub_call_them(wanted: str, called: str) -> None:
    kind = file_type(wanted, Model(4).types(wanted))
    assert kind is gguf.LlamaFileType["ALL_F32" if called == "F32" else f"MOSTLY_{called}"]
    assert encoding(kind) == called


def test_a_file_of_kept_codes_is_called_by_the_type_of_most_matrices() -> None:
    model = Model(4, kind=QuantSpec(4, 128))
    assert encoding(file_type("auto", model.types("auto"))) == "Q4_K_S"
    assert encoding(file_type("auto", model.types("auto", exact=True))) == "Q5_0"


def test_names() -> None:
    assert (check_name("q4_k_m"), check_name("AUTO"), check_name("Bf16")) == ("Q4_K_M", "auto", "BF16")
    for name in names():
        types = Model(4).types(check_name(name))
        assert isinstance(file_type(name, types), gguf.LlamaFileType)
    with pytest.raises(
        ValueError, match=r"^type 'Q4_K_XL' is not written to GGUF files; choose one of F32, F16, BF16, Q8_0, .*Q4_K_M, .*, or auto$"
    ):
        check_name("Q4_K_XL")
