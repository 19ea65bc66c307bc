"""The block types that need no package beside gguf, and their encoders."""

from __future__ import annotations

from collections.abc import Callable

from gguf import GGMLQuantizationType as Type

from awq_hf.exporters.gguf.blocks import iq4, k_affine, k_symmetric, legacy
from awq_hf.exporters.gguf.blocks.legacy import Bytes
from awq_hf.exporters.gguf.blocks.search import Floats

ENCODERS: dict[Type, Callable[[Floats, Floats | None], Bytes]] = {
    Type.Q4_0: legacy.encode_q4_0,
    Type.Q4_1: legacy.encode_q4_1,
    Type.Q5_0: legacy.encode_q5_0,
    Type.Q5_1: legacy.encode_q5_1,
    Type.Q8_0: legacy.encode_q8_0,
    Type.Q2_K: k_affine.encode_q2_k,
    Type.Q3_K: k_symmetric.encode_q3_k,
    Type.Q4_K: k_affine.encode_q4_k,
    Type.Q5_K: k_affine.encode_q5_k,
    Type.Q6_K: k_symmetric.encode_q6_k,
    Type.IQ4_NL: iq4.encode_iq4_nl,
    Type.IQ4_XS: iq4.encode_iq4_xs,
}
