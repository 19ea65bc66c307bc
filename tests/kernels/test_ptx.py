"""The executor of PTX that executed.py has the kernels' numbers from: small programs that it runs, and such as it has to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.ptx.machine import Kernel
from tests.kernels.ptx.memory import Global, Violation
from tests.kernels.ptx.parse import UnknownPtx

# data is uint32 [64], out has room for as many

MODULE = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 data,
	.param .u64 .ptr .global .align 1 out
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [data];
	ld.param.b64 	%rd2, [out];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;  // of the thread's own data
	add.s64 	%rd5, %rd2, %rd3;
	setp.lt.s32 	%p1, %r1, 40;
	shl.b32 	%r2, %r1, 2;
	mov.b32 	%r3, global_smem;
	add.s32 	%r4, %r3, %r2;  // of the thread's own word
	xor.b32 	%r5, %r4, 128;  // of a thread of the other warp
	xor.b32 	%r6, %r4, 4;  // of a neighbour's
	BODY
	ret;
}
"""
DATA = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)


def execute(body: str, grid: int = 1) -> list[int]:
    memory, out = Global(), np.zeros(64, np.uint32)
    addresses = memory.add("data", DATA.copy().view(np.uint8), 0), memory.add("out", out.view(np.uint8), 0, np.zeros(256, bool))
    Kernel(MODULE.replace("BODY", body), 256).launch((grid,), memory, addresses)
    return out.tolist()


STORED = "ld.global.b32 %r7, [%rd4]; st.shared.b32 [%r4], %r7;"
COPIED = "cp.async.ca.shared.global [%r4], [%rd4], 0x4, %r10;"
ARRIVED = f"{COPIED} cp.async.commit_group; cp.async.wait_group 0;"
PROGRAMS: dict[str, Callable[[int], Any]] = {  # body -> which of the data comes out
    "ld.global.b32 %r7, [%rd4]; st.global.b32 [%rd5], %r7;": lambda i: DATA[i],
    "mov.b32 %r7, 0; @%p1 ld.global.b32 %r7, [%rd4]; st.global.b32 [%rd5], %r7;": lambda i: DATA[i] if i < 40 else 0,
    "mov.b32 %r7, 0; @!%p1 ld.global.b32 { %r7 }, [ %rd4 + 0 ]; st.global.b32 [%rd5], %r7;": lambda i: DATA[i] if i >= 40 else 0,
    f"{STORED} bar.sync 0; ld.shared.b32 %r8, [%r5]; st.global.b32 [%rd5], %r8;": lambda i: DATA[i ^ 32],
    f"{STORED} bar.warp.sync -1; ld.shared.b32 %r8, [%r6]; st.global.b32 [%rd5], %r8;": lambda i: DATA[i ^ 1],
    "ld.global.b32 %r7, [%rd4]; shfl.sync.bfly.b32 %r8, %r7, 2, 31, -1; st.global.b32 [%rd5], %r8;": lambda i: DATA[i ^ 2],
    "xor.b32 %r8, %r1, 3; shfl.sync.idx.b32 %r7, %r1, %r8, 31, -1; st.global.b32 [%rd5], %r7;": lambda i: i ^ 3,
    "redux.sync.add.s32 %r7, %r1, -1; st.global.b32 [%rd5], %r7;": lambda i: 496 + (i // 32) * 1024,
    "{ .reg .b32 d; mov.b32 d, 0x5; mov.b32 {%rs1, %rs2}, d; } cvt.u32.u16 %r7, %rs1; st.global.b32 [%rd5], %r7;": lambda i: 5,
    f"mov.b32 %r10, 4; {ARRIVED} bar.sync 0; ld.shared.b32 %r8, [%r5]; st.global.b32 [%rd5], %r8;": lambda i: DATA[i ^ 32],
    f"selp.b32 %r10, 4, 0, %p1; {ARRIVED} ld.shared.b32 %r8, [%r4]; st.global.b32 [%rd5], %r8;": lambda i: DATA[i] if i < 40 else 0,
    "mov.b32 %r7, 0; $L_again: add.s32 %r7, %r7, 3; setp.lt.s32 %p2, %r7, 10; @%p2 bra $L_again; st.global.b32 [%rd5], %r7;": lambda i: 12,
}


@pytest.mark.parametrize("body", PROGRAMS)
def test_programs(body: str) -> None:
    assert execute(body) == [int(PROGRAMS[body](i)) for i in range(64)]


VIOLATIONS = {
    "ld.global.b32 %r7, [%rd4+4];": "4 bytes at 256 of data, which has 256",
    "ld.global.b32 %r7, [%rd4+-4];": "4 bytes at -4 of data",
    "ld.global.b32 %r7, [%rd3];": "is in no tensor",
    "ld.global.b32 %r7, [%rd4+2];": "not a multiple of 4",
    "ld.global.v2.b32 {%r7, %r8}, [%rd4];": "not a multiple of 8",
    "ld.global.b32 %r7, [%rd5];": "a read of out where nothing was written",
    "st.global.b32 [%rd5], %r1; ld.global.b32 %r7, [%rd5];": "a read of out where the same launch writes",
    "st.global.b32 [%rd5], %r1; st.global.b32 [%rd5], %r1;": "out is written twice",
    "st.global.b32 [%rd2], %r1;": "out is written twice",
    "ld.shared.b32 %r7, [%r4];": "where nothing was written",
    "st.shared.b32 [%r4+256], %r1;": "4 bytes at 256 of shared memory, which has 256",
    f"{STORED} ld.shared.b32 %r8, [%r5];": "a warp reads what another wrote",
    f"{STORED} bar.warp.sync -1; ld.shared.b32 %r8, [%r5];": "a warp reads what another wrote",
    f"{STORED} ld.shared.b32 %r8, [%r6];": "a thread reads what another wrote",
    f"{STORED} bar.sync 0; ld.shared.b32 %r8, [%r5]; st.shared.b32 [%r4], %r8;": "a warp writes what another read",
    "st.shared.b32 [%r3], %r1;": "different values to the same place",
    f"mov.b32 %r10, 4; {COPIED} ld.shared.b32 %r8, [%r4];": "still on its way",
    f"mov.b32 %r10, 4; {COPIED} cp.async.wait_group 0; ld.shared.b32 %r8, [%r4];": "still on its way",  # it is in no group
    f"mov.b32 %r10, 4; {COPIED} cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r8, [%r4];": "still on its way",
    f"mov.b32 %r10, 4; {ARRIVED} ld.shared.b32 %r8, [%r5];": "a warp reads what another wrote",
    f"{STORED} bar.sync 0; ld.shared.b32 %r8, [%r5]; mov.b32 %r10, 4; {COPIED}": "a warp writes what another read",
    f"mov.b32 %r10, 2; {COPIED}": "a part of 4 bytes",
    "@%p1 bra $L_end; $L_end:": "a branch that some threads take",
    "add.s32 %r7, %r8, 1;": "%r8 is read and was never written",
    "shfl.sync.bfly.b32 %r8, %r1, 2, 31, 15;": "that do not take part",
}


@pytest.mark.parametrize("body", VIOLATIONS)
def test_programs_that_do_what_they_may_not(body: str) -> None:
    with pytest.raises(Violation) as error:
        execute(body)
    assert VIOLATIONS[body] in str(error.value)


def test_two_programs_may_not_write_the_same() -> None:
    with pytest.raises(Violation, match="out is written twice"):
        execute("st.global.b32 [%rd5], %r1;", grid=2)


def test_what_a_predicate_left_unwritten_is_poison() -> None:
    found = execute("@%p1 mov.b32 %r7, 1; st.global.b32 [%rd5], %r7;")
    assert found[:40] == [1] * 40 and np.isnan(np.array(found[40:], np.uint32).view(np.float32)).all()


UNKNOWN = {
    "add.rz.f32 %r7, %r1, %r2;": "the instruction add.rz.f32",
    "atom.global.add.u32 %r7, [%rd5], %r1;": "the instruction atom.global.add.u32",
    "add.s32 %r7, %rs1, %r1;": "%rs1 of 16 bits for 32",
    "add.s32 %r7, %r1;": "2 operands",
    "ld.global.v2.b32 {%r7}, [%rd4];": "for 2 registers",
    "mov.u32 %r7, %clock;": "the operand %clock",
    "bar.sync 1;": "the barrier",
    "@%p1 bar.sync 0;": "a predicate before what all threads take part in",
    "cp.async.cg.shared.global [%r4], [%rd4], 0x4, %r1;": "4 bytes",
    '.pragma "nounroll";': ".pragma",
}


@pytest.mark.parametrize("body", UNKNOWN)
def test_what_is_not_known_is_named(body: str) -> None:
    with pytest.raises(UnknownPtx) as error:
        execute(body)
    assert UNKNOWN[body] in str(error.value)
