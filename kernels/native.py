"""y = x W^T on x86 with AVX-512 or AVX2, in C++ (native.cpp): faster than `cpu`, and exact where that is not.

Built only on request, by AWQ_HF_NATIVE=1: compiling takes 10 to 30 seconds, which nobody should meet unasked. torch.utils.cpp_extension
compiles, so a C++ compiler and ninja are needed; the library then stays in torch's folder of extensions, named by all it was made
from. Where it is not asked for or cannot be had, `cpu` does the same with what torch has.

Weights are those of `reference.linear` bit for bit: (q - z) s in float32, rounded once to bfloat16 for bfloat16 activations. Sums are
float32. float16 activations compute in float32, which is more than the reference does.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
from .kernel_layout import BLOCK, unsupported
from .problem import Problem
from .products import computed_in

VARIABLE = "AWQ_HF_NATIVE"
SOURCE = Path(__file__).with_name("native.cpp")
OPENMP = "-fopenmp"  # without it at::parallel_for is a plain loop
# Not -march=native: homes are shared between machines. By torch's name of what a CPU has.
INSTRUCTIONS = {"AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl"), "AVX2": ("-mavx2",)}
FLAGS = ("-O3", OPENMP, "-mf16c", "-mfma")
CHUNK = 1 << 20  # weights dequantized at a time: 2 or 4 MB, about the caches
# Tokens up to which the kernel is used, and above which dequantizing and torch's matmul are faster; as in `cpu`.
CROSSOVER = {
    "AVX512": {torch.bfloat16: 32, torch.float32: 128, torch.float16: 128},
    "AVX2": {torch.bfloat16: 56, torch.float32: 80, torch.float16: 80},
}

logger = logging.getLogger(__name__)


def crossover(dtype: torch.dtype) -> int:
    return CROSSOVER[torch.backends.cpu.get_cpu_capability()][dtype]


class NativeWeight(NamedTuple):
    """W ~ (q - zeros) * scales, 4 bits. Rows are zero-padded to blocks of 128 columns, nibble i of word j of a block being column 16 i + j:
    one shift yields 16 columns in order.
    """

    words: Tensor  # int32 [out, 16 * blocks]
    scales: Tensor  # float16 [out, groups], padded groups 0
    zeros: Tensor  # uint8 [out, groups]


def pack(q: Tensor, scales: Tensor, zeros: Tensor) -> NativeWeight:
    """Canonical uint8 codes q [out, in], scales and uint8 zeros [out, groups] -> NativeWeight, for a problem that `supports` accepts."""
    (rows, columns), groups = q.shape, scales.shape[1]
    if reason := unsupported(columns, groups, 4):
        raise ValueError(reason)
    nibbles = torch.nn.functional.pad(q, (0, -columns % BLOCK)).view(rows, -1, 8, 16).transpose(2, 3)  # [rows, blocks, word j, nibble i]
    octets = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous()  # memory is little-endian
    missing = 0 if groups == 1 else -(-columns // BLOCK) * BLOCK // (columns // groups) - groups
    pad = lambda t: torch.nn.functional.pad(t, (0, missing)).contiguous()  # noqa: E731
    return NativeWeight(octets.view(torch.int32).view(rows, -1), pad(scales), pad(zeros))


def unpack(weight: NativeWeight, columns: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, scales and zeros of the canonical weight [out, columns]. Inverse of `pack`."""
    octets = weight.words.contiguous().view(torch.uint8).view(len(weight.words), -1, 16, 4)
    nibbles = torch.stack((octets & 15, octets >> 4), -1).flatten(-2)  # [rows, blocks, word j, nibble i]
    q = nibbles.transpose(2, 3).reshape(len(nibbles), -1)[:, :columns]
    return q, weight.scales[:, :groups].contiguous(), weight.zeros[:, :groups].contiguous()


@cache
def missing() -> str | None:
    """Why there is no kernel in this process, or None when it is loaded. The first call builds it if it was asked for and is not there."""
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return f"the kernel is compiled on request only: set {VARIABLE}=1"
    if torch.backends.cpu.get_cpu_capability() not in INSTRUCTIONS:
        return "the kernel needs a CPU with AVX-512 or AVX2"
    try:
        library = _library()
        if library.exists():
            torch.ops.load_library(str(library))
        else:
            _build(library)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f"the kernel could not be built: {error}"
        logger.warning("%s\ntorch's own kernels are used, which are slower", reason)
        return reason
    return None


def _flags() -> list[str]:
    instructions = torch.backends.cpu.get_cpu_capability()
    has_bf16 = instructions == "AVX512" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return [*FLAGS, *INSTRUCTIONS[instructions], *(["-mavx512bf16"] if has_bf16 else [])]


def _library() -> Path:
    """Where the library of this source, these flags and this torch is or will be."""
    from torch.utils.cpp_extension import get_default_build_root

    made_from = SOURCE.read_text(encoding="utf-8"), *_flags(), torch.__version__, torch.version.git_version
    digest = hashlib.sha256("\0".join(map(str, made_from)).encode()).hexdigest()[:16]
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "awq_hf" / f"native-{digest}.so"


def _build(library: Path) -> None:
    """Compile in a folder of this process's own and move the result into place whole: no lock that a killed process would leave behind."""
    from torch.utils.cpp_extension import load

    logger.warning("Compiling the CPU kernel, once: 10 to 30 seconds.")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        load("awq_hf_native", str(SOURCE), extra_cflags=_flags(), extra_ldflags=[OPENMP], build_directory=folder, is_python_module=False)
        shutil.move(Path(folder) / "awq_hf_native.so", library)


def supports(problem: Problem) -> str | None:
    """Why this kernel cannot do `problem`, or None."""
    p = problem
    if reason := cpu.unsupported(p):
        return reason
    if p.scales != torch.float16:
        return f"the kernel reads scales in float16, not {str(p.scales).removeprefix('torch.')}"
    return unsupported(p.k, p.groups, p.bits) or missing()


def linear(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias for a problem that `supports` accepts.

    x: [tokens, in], float32, bfloat16 or float16; words, scales, zeros: as in `NativeWeight`; bias: [out], any float dtype.
    Returns [tokens, out] in x's dtype. The same bits every run; up to `crossover` tokens also whatever the number of threads and tokens.
    """
    if x.shape[0] <= crossover(x.dtype):
        y: Tensor = torch.ops.awq_hf_native.linear(x.contiguous(), words, scales, zeros, None if bias is None else bias.float())
        return y
    (rows, columns), padded = (words.shape[0], x.shape[1]), words.shape[1] * 8
    operand = x.to(computed_in(x.dtype, x.device))
    y = x.new_empty(x.shape[0], rows)
    step = max(1, CHUNK // padded)
    memory = torch.empty(min(step, rows), padded, dtype=operand.dtype)
    for start in range(0, rows, step):
        weight = memory[: rows - start]
        torch.ops.awq_hf_native.dequantize(words, scales, zeros, start, weight)
        y[:, start : start + step] = torch.nn.functional.linear(operand, weight[:, :columns])
    return y if bias is None else y.add_(bias)
