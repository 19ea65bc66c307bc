"""wgmma in the executor of PTX: against a product of matrices laid out as the PTX ISA has them, and what has to be refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.ptx.machine import Kernel
from tests.kernels.ptx.memory import Global, Violation
from tests.kernels.ptx.parse import UnknownPtx

Array = NDArray[Any]

# left: four words for every thread; right: the image of shared memory, 16 bytes for every thread; out: eight floats for every thread
MODULE = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 left,
	.param .u64 .ptr .global .align 1 right,
	.param .u64 .ptr .global .align 1 out,
	.param .u64 descriptor
)
.reqntid 256
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<29>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [left];
	ld.param.b64 	%rd2, [right];
	ld.param.b64 	%rd3, [out];
	ld.param.b64 	%rd4, [descriptor];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd5, %r1, 16, %rd1;
	mad.wide.u32 	%rd6, %r1, 16, %rd2;
	mad.wide.u32 	%rd7, %r1, 32, %rd3;
	shl.b32 	%r2, %r1, 4;
	mov.b32 	%r3, global_smem;
	add.s32 	%r4, %r3, %r2;
	ld.global.v4.b32 	{%r5, %r6, %r7, %r8}, [%rd6];
	st.shared.v4.b32 	[%r4], {%r5, %r6, %r7, %r8};
	ld.global.v4.b32 	{%r9, %r10, %r11, %r12}, [%rd5];
	bar.sync 	0;
	BODY
	ret;
}
"""
MULTIPLY = (
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%r13,%r14,%r15,%r16,%r17,%r18,%r19,%r20}, {%r9,%r10,%r11,%r12}, %rd4, 0, 1, 1, 0;"
)
FENCES, WAIT = (
    "fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;",
    "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
)
STORE = "st.global.v4.b32 [%rd7], {%r13, %r14, %r15, %r16}; st.global.v4.b32 [%rd7+16], {%r17, %r18, %r19, %r20};"
START = 1024 >> 4  # of shared memory
SWIZZLES = {128: 1 << 62 | 1024 >> 4 << 32 | START, 64: 2 << 62 | 512 >> 4 << 32 | START}  # bytes of a row -> descriptor

RANDOM = np.random.default_rng(0)
A, B = (RANDOM.integers(-8, 9, shape).astype(np.float16) for shape in ((2, 64, 16), (16, 16)))  # of two warpgroups; [n, k]


def image(row: int) -> Array:
    """B in shared memory: rows of `row` bytes, in each of which the pieces of 16 bytes change places by the row's number."""
    memory = np.full((256, 8), np.nan, np.float16)
    for n in range(16):
        for piece in range(2):
            swizzled = piece ^ (n % 8 if row == 128 else n % 8 // 2)
            memory[n * row // 16 + swizzled] = B[n, 8 * piece : 8 * piece + 8]
    return memory


def fragments() -> Array:
    """A for each thread: the matrix fragments of wgmma.m64k16, which has rows 16 w to 16 w + 15 in warp w."""
    words = np.empty((256, 4, 2), np.float16)
    for thread in range(256):
        group, warp, lane = thread // 128, thread % 128 // 32, thread % 32
        for value in range(8):
            row = 16 * warp + lane // 4 + (8 if value // 2 % 2 else 0)
            words[thread, value // 2, value % 2] = A[group, row, lane % 4 * 2 + value % 2 + (8 if value >= 4 else 0)]
    return words


def execute(body: str, row: int = 128, descriptor: int | None = None) -> Array:
    memory, out = Global(), np.zeros((256, 8), np.float32)
    data = (fragments(), image(row), out)
    addresses = [memory.add(str(index), one.reshape(-1).view(np.uint8), 0) for index, one in enumerate(data)]
    Kernel(MODULE.replace("BODY", body), 4096).launch((1,), memory, [*addresses, descriptor or SWIZZLES[row]])
    return out


@pytest.mark.parametrize("row", SWIZZLES)
def test_the_product_has_the_layout_of_the_isa(row: int) -> None:
    product, found = A.astype(np.float32) @ B.astype(np.float32).T, execute(f"{FENCES} {MULTIPLY} {WAIT} {STORE}", row)  # [2, 64, 16]
    for thread in range(256):
        group, warp, lane = thread // 128, thread % 128 // 32, thread % 32
        for value in range(8):
            r, c = 16 * warp + lane // 4 + (8 if value // 2 % 2 else 0), value // 4 * 8 + lane % 4 * 2 + value % 2
            assert found[thread, value] == product[group, r, c]


def test_products_are_added_without_waiting() -> None:
    twice = f"{FENCES} {MULTIPLY} {MULTIPLY.replace('%rd4, 0', '%rd4, 1')} {WAIT} {STORE}"
    assert np.array_equal(execute(twice), 2 * execute(f"{FENCES} {MULTIPLY} {WAIT} {STORE}"))


PROXY, FENCE = FENCES.split(" ", 1)
VIOLATIONS = {
    f"{FENCE} {MULTIPLY}": "wgmma reads what was not fenced",
    f"{PROXY} {MULTIPLY}": "wgmma reads %r9, which was not fenced",
    f"{FENCES} add.s32 %r9, %r9, 0; {MULTIPLY}": "wgmma reads %r9, which was not fenced",
    f"{FENCES} {MULTIPLY} {STORE}": "a result that was not waited for",
    f"{FENCES} {MULTIPLY} wgmma.wait_group.sync.aligned 0; {STORE}": "a result that was not waited for",  # it is in no group
    f"{FENCES} {MULTIPLY} {WAIT.replace('aligned 0', 'aligned 1')} {STORE}": "a result that was not waited for",
    f"{FENCES} {MULTIPLY} bar.sync 0; st.shared.b32 [%r4], %r1;": "that a wgmma may still read",
    f"{FENCES} {MULTIPLY} {WAIT} st.shared.b32 [%r4], %r1;": "a warp writes what another read",
    f"st.shared.b32 [%r4], %r1; {FENCES} {MULTIPLY}": "a warp reads what another wrote",
    f"{FENCES} {MULTIPLY.replace('%rd4, 0', '%rd4, 1')}": "wgmma reads %r13, which was not fenced",  # nothing to add to
    f"setp.lt.s32 %p1, %r1, 7; {FENCES} {MULTIPLY} {MULTIPLY.replace('%rd4, 0', '%rd4, %p1')}": "adds for some threads",
    f"cvt.u64.u32 %rd8, %r1; add.s64 %rd4, %rd4, %rd8; {FENCES} {MULTIPLY}": "differs among the threads",
}


@pytest.mark.parametrize("body", VIOLATIONS)
def test_what_may_not_be_done(body: str) -> None:
    with pytest.raises(Violation) as error:
        execute(body)
    assert VIOLATIONS[body] in str(error.value)


@pytest.mark.parametrize("descriptor", [START, 3 << 62 | START, SWIZZLES[128] | 1 << 49, SWIZZLES[128] | 1 << 15])
def test_descriptors_that_are_not_known(descriptor: int) -> None:
    with pytest.raises(Violation, match="is not known"):
        execute(f"{FENCES} {MULTIPLY}", descriptor=descriptor)


def test_forms_that_are_not_known() -> None:
    with pytest.raises(UnknownPtx, match="a transposed matrix"):
        execute(f"{FENCES} {MULTIPLY.replace('1, 1, 0;', '1, 1, 1;')}")
