"""Which type each tensor of a file gets: llama.cpp's usual mixes for float models, the type that holds their codes for quantized weights.

The rules of the mixes are those of llama-quantize (llama.cpp, src/llama-quant.cpp, of 2026), as data: some parts of some blocks get more
bits. Not taken over is what it does where there is no importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedConfig

from awq_hf.exporters.gguf.names import Plan
from awq_hf.exporters.gguf.repack import default_type, is_exact, misfit, types_for
from awq_hf.spec import QuantSpec

FLOATS: dict[Type, torch.dtype] = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
EMBEDDINGS = ("token_embd", "output")
AUTO = "auto"  # each quantized weight in the smallest type that holds its codes
_FLOAT32_PARTS = {"ffn_gate_inp"}  # matrices that llama.cpp wants in float32: the router decides on small differences


@dataclass(frozen=True)
class Spot:
    """A matrix's place: block `i` of `n`; heads: query heads that share a key head."""

    i: int
    n: int
    heads: int

    @property
    def gets_more(self) -> bool:
        """The first and last eighth of the blocks, and every third between."""
        eighth = self.n // 8
        return self.i < eighth or self.i >= 7 * self.n // 8 or (self.i - eighth) % 3 == 2


Rule = Callable[[Spot], Type | None]
MIXES: dict[str, tuple[Type, dict[str, Rule]]] = {
    "Q2_K_M": (
        Type.Q2_K,
        {
            "attn_v": lambda at: Type.Q4_K if at.heads >= 4 else Type.Q3_K,
            "attn_output": lambda at: Type.Q3_K,
            "ffn_down": lambda at: Type.Q3_K,
        },
    ),
    "Q3_K_S": (Type.Q3_K, {}),
    "Q3_K_M": (
        Type.Q3_K,
        {
            "attn_v": lambda at: Type.Q5_K if at.i < 2 else Type.Q4_K,
            "attn_output": lambda at: Type.Q4_K,
            "ffn_down": lambda at: Type.Q5_K if at.i < at.n // 16 else Type.Q4_K,
        },
    ),
    "Q3_K_L": (
        Type.Q3_K,
        {
            "attn_v": lambda at: Type.Q5_K,
            "attn_output": lambda at: Type.Q5_K,
            "ffn_down": lambda at: Type.Q5_K,
        },
    ),
    "Q4_K_S": (
        Type.Q4_K,
        {"attn_v": lambda at: Type.Q5_K if at.i < 4 else None, "ffn_down": lambda at: Type.Q5_K if at.i < at.n // 8 else None},
    ),
    "Q4_K_M": (
        Type.Q4_K,
        {
            "attn_v": lambda at: Type.Q6_K if at.gets_more else None,
            "ffn_down": lambda at: Type.Q6_K if at.gets_more else None,
        },
    ),
    "Q5_K_S": (Type.Q5_K, {}),
    "Q5_K_M": (
        Type.Q5_K,
        {
            "attn_v": lambda at: Type.Q6_K if at.gets_more else None,
            "ffn_down": lambda at: Type.Q6_K if at.gets_more else None,
        },
    ),
    "IQ4_NL": (Type.IQ4_NL, {"attn_v": lambda at: Type.Q5_K if at.heads >= 4 else None}),
    "IQ4_XS": (Type.IQ4_XS, {"attn_v": lambda at: Type.Q5_K if at.heads >= 4 else None}),
}
_EIGHT_EXPERTS = {"attn_k": Type.Q8_0, "attn_v": Type.Q8_0, "attn_output": Type.Q5_K}  # small beside the experts
_SAME_RULE = {"attn_qkv": "attn_v"}
_SEVENTY_BILLION = 80  # blocks: eight query heads share what attn_v computes, which is small for what depends on it

# What a row gets that superblocks of 256 do not divide: of Q2_K and Q3_K, the better of two types of 4.5 bits.
_NARROW = {
    Type.Q2_K: Type.IQ4_NL,
    Type.Q3_K: Type.IQ4_NL,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}

UNSEARCHED = (*(kind.name for kind in FLOATS), "Q8_0")  # of a float model: types for all matrices that importance makes no better

_PLAIN: tuple[Type, ...] = (Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q5_1, Type.Q5_0, Type.Q4_K, Type.Q4_1, Type.Q4_0, Type.Q3_K, Type.Q2_K)

# What general.file_type calls a file whose matrices are mostly of a type, where that has no name of its own.
_FILE_TYPES = {"Q2_K_M": "Q2_K", "Q2_K": "Q2_K_S", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}


def names() -> list[str]:
    """What can be asked for, beside "auto": types for all matrices alike, and mixes."""
    kinds: list[Type] = [*FLOATS, *_PLAIN]
    return [*(kind.name for kind in kinds), *MIXES]


def check_name(wanted: str) -> str:
    """The name as it is written here. Raises ValueError for one that is not known."""
    found = {name.upper(): name for name in [AUTO, *names()]}.get(wanted.upper())
    if found is None:
        raise ValueError(f"type {wanted!r} is not written to GGUF files; choose one of {', '.join(names())}, or auto")
    return found


def file_type(wanted: str, types: Mapping[str, Type]) -> gguf.LlamaFileType:
    """general.file_type for matrices of these types, that were asked for as `wanted`."""
    name = wanted if wanted != AUTO else most_used(types).name
    return gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{_FILE_TYPES.get(name, name)}"]


def encoding(kind: gguf.LlamaFileType) -> str:
    """What file names call it, and the Hub and llama.cpp find files by."""
    return kind.name.partition("_")[2]


def most_used(types: Mapping[str, Type]) -> Type:
    """The type of most matrices of the blocks."""
    inside: list[Type] = [kind for name, kind in types.items() if name.startswith("blk.") and kind is not Type.F32]
    inside = inside or [*types.values()]
    return max(dict.fromkeys(inside), key=inside.count)


def assign(
    plan: Plan, kinds: Mapping[str, QuantSpec | torch.dtype], config: PreTrainedConfig, wanted: str, exact: bool = False
) -> dict[str, Type]:
    """The type of every tensor of the file. kinds: of the checkpoint's tensors; wanted: as `check_name` returns it.

    exact: quantized weights in types that stand for them bit for bit, and float matrices as they are. Raises ValueError for a quantized
    weight whose codes do not fit what is wanted, with the types that they fit.
    """
    sources = {place.target: (name, kinds[name]) for name, place in plan.places.items()}
    types = {}
    for target, shape in plan.shapes.items():
        name, kind = sources[target]
        if len(shape) == 1 or _part(target) in _FLOAT32_PARTS:
            types[target] = Type.F32
        elif isinstance(kind, QuantSpec):
            kept = None if wanted == AUTO else _wanted(target, config, wanted, plan)
            types[target] = _of_quantized(name, kind, shape[-1], kept, exact)
        elif wanted == AUTO or exact:
            types[target] = _same(kind) if exact else _fitting(Type.Q8_0, shape[-1])
        else:
            types[target] = _fitting(_wanted(target, config, wanted, plan), shape[-1])
    return types


def _same(kind: torch.dtype) -> Type:
    return next((t for t, dtype in FLOATS.items() if dtype == kind), Type.F32)


def _part(target: str) -> str:
    return target.split(".")[-2]


def _wanted(target: str, config: PreTrainedConfig, wanted: str, plan: Plan) -> Type:
    base, rules = MIXES[wanted] if wanted in MIXES else (Type[wanted], {})
    head = target == "output.weight" or (target == "token_embd.weight" and "output.weight" not in plan.shapes)
    if head and base not in FLOATS and base is not Type.Q8_0:
        return Type.Q6_K
    if not target.startswith("blk."):
        return base
    part = _part(target)
    part = _SAME_RULE.get(part, part).removesuffix("_exps")
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if wanted in MIXES and experts == 8 and part in _EIGHT_EXPERTS:
        return _EIGHT_EXPERTS[part]
    at = Spot(int(target.split(".")[1]), config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads)
    found = (rules[part](at) if part in rules else None) or base
    if wanted in MIXES and part == "attn_v" and at.n == _SEVENTY_BILLION and at.heads > 1 and found in (Type.Q3_K, Type.Q4_K):
        return Type.Q5_K
    return found


def _fitting(kind: Type, width: int) -> Type:
    """`kind`, or what comes nearest to it for rows of `width`."""
    if width % gguf.GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    narrow = _NARROW.get(kind)
    return narrow if narrow is not None and width % gguf.GGML_QUANT_SIZES[narrow][0] == 0 else Type.F16


def _of_quantized(name: str, spec: QuantSpec, width: int, wanted: Type | None, exact: bool) -> Type:
    """wanted: None for whatever holds the codes."""
    fits = [kind for kind in types_for(spec, width) if not exact or is_exact(spec, width, kind)]
    if wanted is None:
        best = next(iter(fits), None) if exact else default_type(spec, width)
        if best is None:
            how = f"{spec.bits} bits, groups of {spec.group_size}, {'symmetric' if spec.symmetric else 'with zero points'}"
            keeps = "F32 keeps" if exact else "F16 holds"
            raise ValueError(f"{name}: no type of blocks holds its codes ({how}; rows of {width}); {keeps} the dequantized weights")
        return best
    if wanted not in FLOATS and (reason := misfit(spec, width, wanted)):
        raise ValueError(f"{name}: {reason}")
    if exact and wanted not in (*fits, Type.F32):
        those = ", ".join([*(kind.name for kind in fits), "F32"])
        raise ValueError(f"{name}: {wanted.name} does not hold its weights bit for bit; exact are {those}")
    return wanted
