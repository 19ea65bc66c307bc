"""Gates on what the Triton kernels compile to, for GPUs that need not be there. Run by test_triton.py, in a process of its own.

The machine code is read with the tools in triton's wheel. A change that loses what a kernel is fast by fails here: spilled
registers, narrow loads, weights that pass through shared memory on the way to the tensor core.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from awq_hf.kernels import dequantize, experts, gemm, gemv, jit, reduce, tuning

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHIPS = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that programs may have (CUDA C programming guide, compute capabilities)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES = list(NAMES)


def alternating(values: Sequence[Any]) -> list[tuple[int, torch.dtype, Any]]:
    """Every one of `values` for every chip. The dtypes take turns: each chip meets both, and so does each value."""
    return [(sm, DTYPES[(1 + i + j) % 2], value) for i, sm in enumerate(CHIPS) for j, value in enumerate(values)]


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes; what spills
    shared: int  # bytes
    operations: list[tuple[str, str]]  # of the machine code: name and operands
    ptx: str

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, name)) for name, _ in self.operations)


def disassemble(cubin: bytes, path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    path.write_bytes(cubin)
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", run(TOOLS / "cuobjdump", "-res-usage", path))}
    code = run(TOOLS / "nvdisasm", "-c", path)
    return usage, re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", code, re.MULTILINE)


@cache
def compiled(
    kernel: Any, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], options: tuple[tuple[str, Any], ...], sm: int
) -> Compiled:
    """kernel's tensors and integers have `types` in order. Everything is a multiple of 16, as a model's matrices are."""
    signature = dict(zip(kernel.arg_names, (*types, *["constexpr"] * len(constants)), strict=True))
    aligned = {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)}
    source = ASTSource(kernel, signature, dict(constants), aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(options))
    path = Path(triton.knobs.cache.dir) / "gate.cubin"
    usage, operations = disassemble(binary.asm["cubin"], path)
    return Compiled(usage["REG"], usage["STACK"], binary.metadata.shared, operations, binary.asm["ptx"])


def compile_gemv(sm: int, dtype: torch.dtype, group: int, config: tuning.GemvConfig, bits: int = 4) -> Compiled:
    x = f"*{NAMES[dtype]}"
    constants = gemv.constants(bits, group, True, config)
    types = (x, "*i32", "*fp16", "*u8", x, x, *["i32"] * 5)
    return compiled(gemv.gemv_kernel, types, tuple(constants.items()), tuple(config.options().items()), sm)


def compile_gemm(sm: int, dtype: torch.dtype, group: int, config: tuning.GemmConfig, bits: int = 4, split: bool = False) -> Compiled:
    x = f"*{NAMES[dtype]}"
    constants = gemm.constants(bits, group, not split, dtype, config)
    types = (x, "*i32", "*fp16", "*u8", x, "*fp32" if split else x, *["i32"] * 7)
    return compiled(gemm.gemm_kernel, types, tuple(constants.items()), tuple(config.options().items()), sm)


def check_resources(code: Compiled, sm: int, warps: int, programs: int) -> None:
    """At least `programs` fit a multiprocessor, by registers and by shared memory, and nothing spills.

    The column LOCAL of cuobjdump stays 0 when registers spill; STACK and the instructions tell.
    """
    assert code.operations, "no machine code was read"
    assert code.stack == 0 and code.count("STL|LDL") == 0, f"registers spill: {code.stack} bytes of stack"
    assert code.registers * warps * 32 * programs <= 65536, f"{code.registers} registers"
    assert code.shared * programs <= SHARED[sm], f"{code.shared} bytes of shared memory"
    assert code.count(r"(RED|ATOMG?)(\.|$)") == 0, "atomics make results depend on timing"


@pytest.mark.parametrize("sm, dtype, config", alternating([config for _, config in tuning.GEMV]), ids=str)
def test_gemv(sm: int, dtype: torch.dtype, config: tuning.GemvConfig) -> None:
    code = compile_gemv(sm, dtype, 128, config)
    check_resources(code, sm, config.warps, 16 // config.warps)  # 128 registers
    assert code.count(r"LDG\.E(\.EF)?(\.\w+)*\.128") >= config.rows, "a row's words are not read 16 bytes at a time"
    assert code.count(r"LDG\.E(\.CONSTANT)?\.128") >= 4, "x is not read 8 values at a time, once for all rows"
    assert code.count(r"LDG") <= 3 * config.rows + 4 + 1, "more loads than words, scales and zeros of each row, x, and the bias"
    assert code.count("I2F") <= 2 * config.rows, "codes are converted to floats one by one"
    assert len(code.operations) <= (920 if sm == 80 else 850), "more than 7 instructions a weight, in the loop and around it"


@pytest.mark.parametrize("group, bits", [(32, 4), (0, 4), (32, 8), (128, 8)])
def test_gemv_of_other_groups_and_bits(group: int, bits: int) -> None:
    config = tuning.gemv_config(4096, 4096)
    code = compile_gemv(90, torch.float16, group, config, bits)
    check_resources(code, 90, config.warps, 16 // config.warps)
    assert code.count(r"LDG\.E(\.EF)?(\.\w+)*\.128") >= config.rows


def check_tensor_core(code: Compiled, sm: int, config: tuning.GemmConfig, bits: int = 4) -> None:
    """The weights reach the tensor core in registers: unpacked where they are used, never stored on the way."""
    steps = 32 // bits  # of 16 columns in a unit of words
    if sm == 90:
        wgmma = [operands for name, operands in code.operations if name.startswith("HGMMA")]
        assert len(wgmma) == steps, f"{len(wgmma)} wgmma for {16 * steps} columns, 16 each"
        assert all(re.match(r"\s*R\d+, R\d+, gdesc", operands) for operands in wgmma), f"W comes from shared memory: {wgmma[0]}"
    elif sm == 80:
        assert code.count("HMMA.16816") == steps * (config.bn // 16) * max(1, config.bm // 8) // config.warps
    else:
        assert code.count("UTCHMMA") == steps
    if sm < 100:  # tcgen05 takes W from tensor memory
        # 4: of the output, in the smallest tiles
        assert code.count(r"STS\.U16") <= 4 and code.count("LDSM") <= 16, "unpacked weights pass through shared memory"
    assert code.count("HADD2|HFMA2") <= 80, "zero points are not subtracted two at a time"
    assert code.count("PRMT") <= (90 if sm == 80 else 40), "codes are taken apart and put together again"
    assert code.count("I2F") == 0, "codes are converted to floats one by one"
    assert code.count(r"LDGSTS\.E\.BYPASS\.128") > 0 and code.count(r"LDGSTS\.E ?$") == 0, "x or W is copied in pieces below 8 bytes"


@pytest.mark.parametrize("sm, dtype, config", alternating([config for _, config in tuning.GEMM]), ids=str)
def test_gemm(sm: int, dtype: torch.dtype, config: tuning.GemmConfig) -> None:
    code = compile_gemm(sm, dtype, 128, config, split=config.bm < 64)
    check_resources(code, sm, config.warps, 1 if config.warps == 8 else 2)
    check_tensor_core(code, sm, config)
    if config.bm == 8:  # issues instructions as fast as W arrives, or not
        assert len(code.operations) <= 560, "more than 9 instructions a weight, in the loop and around it"


@pytest.mark.parametrize("group", [32, 64, 0])
def test_gemm_of_other_groups(group: int) -> None:
    config = tuning.gemm_config(64)
    code = compile_gemm(90, torch.float16, group, config)
    check_resources(code, 90, config.warps, 1)
    check_tensor_core(code, 90, config)


@pytest.mark.parametrize("sm, dtype, tokens", alternating([8, 512]), ids=str)
def test_gemm_of_8_bits(sm: int, dtype: torch.dtype, tokens: int) -> None:
    config = tuning.gemm_config(tokens)
    code = compile_gemm(sm, dtype, 128, config, bits=8, split=config.bm < 64)
    check_resources(code, sm, config.warps, 1)
    check_tensor_core(code, sm, config, bits=8)


@pytest.mark.parametrize("tokens", [8, 512])
@pytest.mark.parametrize(
    "sm, dtype, bits", [(80, torch.bfloat16, 4), (90, torch.float16, 4), (90, torch.bfloat16, 8), (100, torch.bfloat16, 4)]
)
def test_experts(sm: int, dtype: torch.dtype, bits: int, tokens: int) -> None:
    config, x = tuning.gemm_config(tokens), f"*{NAMES[dtype]}"
    types = (x, "*i32", "*i32", "*fp16", "*u8", x, x, *["i32"] * 6)
    constants = experts.constants(128, bits, 128, False, dtype, config)
    code = compiled(experts.experts_kernel, types, tuple(constants.items()), tuple(config.options().items()), sm)
    check_resources(code, sm, config.warps, 1 if config.warps == 8 else 2)
    check_tensor_core(code, sm, config, bits)


@pytest.mark.parametrize(
    "sm, dtype, group, bits", [(80, torch.float16, 32, 4), (90, torch.bfloat16, 128, 4), (100, torch.bfloat16, 128, 8)]
)
def test_dequantize(sm: int, dtype: torch.dtype, group: int, bits: int) -> None:
    types = ("*i32", "*fp16", "*u8", f"*{NAMES[dtype]}", *["i32"] * 5)
    constants, options = dequantize.constants(bits, group), dequantize.OPTIONS
    code = compiled(dequantize.dequantize_kernel, types, tuple(constants.items()), tuple(options.items()), sm)
    check_resources(code, sm, options["num_warps"], 8)
    weights = dequantize.ROWS * 128 // (options["num_warps"] * 32)  # of a thread
    assert code.count(r"STG\.E\.128$") == code.count("STG") == weights // 8, "the matrix is not written 16 bytes at a time"
    assert code.count(r"LDG\.E(\.64|\.128)?$") <= weights // 4, "words are read more than once"
    assert len(code.operations) <= 12 * weights


def test_reduce() -> None:
    constants = {"HAS_BIAS": True, "SIZE": reduce.SIZE}
    code = compiled(
        reduce.reduce_kernel, ("*fp32", "*fp16", "*fp16", "i32", "i32", "i32"), tuple(constants.items()), tuple(reduce.OPTIONS.items()), 90
    )
    check_resources(code, 90, 4, 8)
    assert code.count(r"LDG\.E\.128") > 0, "partial sums are not read 16 bytes at a time"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_magic_numbers_are_exact(dtype: torch.dtype) -> None:
    for bits in (4, 8):
        carrier = getattr(torch, gemm.carrier(bits, dtype))
        codes = torch.arange(2**bits, dtype=torch.int32)
        floats = (codes * 0x10001 | gemm.magic(bits, dtype)) if carrier != torch.float32 else codes | gemm.magic(bits, dtype)
        for half in floats.view(carrier).view(2**bits, -1).T:
            assert torch.equal((half[:, None] - half[None]).to(dtype).int(), codes[:, None] - codes[None])


# The one statement in assembly, which the interpreter cannot run: what is between the compiler's markers of it, executed here

STATEMENT = re.compile(
    r"\{ \.reg \.b32 (?P<d>\w+); mov\.b32 (?P=d), (?P<factor>0x[0-9a-f]{8}); "
    r"fma\.rn\.(?P<type>f16x2|bf16x2) (?P=d), (?P<b>%r\d+), (?P=d), (?P<a>%r\d+); "
    r"mov\.b32 \{(?P<low>%rs\d+), (?P<high>%rs\d+)\}, (?P=d); \}"
)


def halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 [..] -> float64 [.., 2], low half first: how PTX orders them in f16x2 and when it unpacks a .b32."""
    return torch.stack((words, words >> 16), -1).to(torch.int16).view(dtype).double()


@pytest.mark.parametrize(
    "sm, dtype, bits", [(80, torch.bfloat16, 4), (90, torch.float16, 4), (90, torch.float16, 8), (100, torch.bfloat16, 4)]
)
def test_the_assembly_subtracts_all_codes_and_zero_points(sm: int, dtype: torch.dtype, bits: int) -> None:
    """fma.rn of two halves is b * factor + c in each, rounded once (PTX ISA, half precision instructions); float64 holds it exactly."""
    code = compile_gemm(sm, dtype, 128, tuning.gemm_config(8), bits=bits, split=True)
    statements = [match for text in re.findall(r"// begin inline asm\n(.*fma.*)\n\s*// end", code.ptx) if (match := STATEMENT.search(text))]
    assert len(statements) == code.ptx.count("fma.rn." + ("bf16x2" if dtype == torch.bfloat16 else "f16x2")) == 128 // bits
    codes = torch.arange(2**bits, dtype=torch.int32)
    pairs = codes << 16 | codes.flip(0) | gemm.magic(bits, dtype)  # of codes: every one in either half
    zeros = codes * 0x10001 | gemm.magic(bits, dtype)
    for statement in statements:
        kind = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}[statement["type"]]
        factor = halves(torch.tensor(int(statement["factor"], 16)).to(torch.int32), kind)
        exact = halves(zeros, kind)[None] * factor + halves(pairs, kind)[:, None]
        found = exact.to(kind)
        wanted = torch.stack((codes.flip(0), codes), -1)[:, None] - codes[None, :, None]
        assert torch.equal(found.double(), exact) and torch.equal(found.int(), wanted)
    for statement in statements:  # a tensor core has the first of two columns in the low half
        assert re.search(rf"mov\.b32\s+%r\d+, \{{{statement['low']}, {statement['high']}\}};", code.ptx), "halves change places"
    assert len({s["a"] for s in statements}) == len(statements) and len({s["b"] for s in statements}) <= 2, "codes are what is taken off"
    machine = [operands for name, operands in code.operations if re.match("HFMA2", name)]
    assert len(machine) == len(statements) and all(re.search(r", -1, -1, R\d+\s*$", operands) for operands in machine), machine


def test_this_is_the_compiler() -> None:
    assert not jit.INTERPRETED
