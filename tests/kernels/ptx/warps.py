"""What the 32 threads of a warp compute together: shuffles, sums, and the tensor core (PTX ISA 8.8, sections 9.7.9 and 9.7.15)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx import floats

Array = NDArray[Any]

LANES = np.arange(32)


def shuffle(values: Array, mode: str, operand: Array) -> Array:
    """shfl.sync of all lanes of whole warps: each takes the value of the lane that `operand` numbers (idx), or of that whose number
    differs from its own in the operand's bits (bfly)."""
    threads, bits = np.arange(len(values)), operand.astype(np.int64) & 31
    return values[threads ^ bits if mode == "bfly" else threads // 32 * 32 + bits]


def sum_of_warp(values: Array) -> Array:
    """redux.sync.add."""
    return np.repeat(values.reshape(-1, 32).sum(1, dtype=values.dtype), 32)


def row_threads(threads: int, matrices: int) -> Array:
    """The threads that have the addresses of a warp's matrices' rows: matrix i's are lanes 8 i to 8 i + 7. [warps, matrices, 8]."""
    return (np.arange(0, threads, 32)[:, None] + np.arange(8 * matrices)).reshape(-1, matrices, 8)


def store_matrices(registers: list[Array], transposed: bool) -> Array:
    """stmatrix. Inverse of `load_matrices`."""
    pairs = np.stack([register.reshape(-1, 32) for register in registers], 1)  # [warps, matrices, lanes]
    values = pairs.view(np.uint16).reshape(*pairs.shape[:2], 8, 8)
    return np.ascontiguousarray(values.swapaxes(2, 3) if transposed else values).reshape(-1, 8).view(np.uint8)


def load_matrices(rows: Array, matrices: int, transposed: bool) -> list[Array]:
    """ldmatrix: rows of eight 16-bit values, uint8 [warps * matrices * 8, 16] -> a register of each matrix, two neighbours of a row (of a
    column, if transposed) for each lane in turn."""
    values = rows.view(np.uint16).reshape(-1, matrices, 8, 8)
    values = np.ascontiguousarray(values.swapaxes(2, 3) if transposed else values)
    return [*np.ascontiguousarray(values.view(np.uint32).reshape(-1, matrices, 32).swapaxes(0, 1)).reshape(matrices, -1)]


def _fragment(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[Array, Array]:
    """The element (row, column) of each lane's value i, which is rows[i] and columns[i] beyond the lane's own: its group of four gives
    the row, its place in the group the pair of columns. [32, values] each."""
    return LANES[:, None] // 4 + np.array(rows), LANES[:, None] % 4 * 2 + np.array(columns)


# m16n8k16 of 16-bit floats: A 16 x 16, B 16 x 8, held as its transpose, C and D 16 x 8
A = _fragment((0, 0, 8, 8, 0, 0, 8, 8), (0, 1, 0, 1, 8, 9, 8, 9))
B = _fragment((0, 0, 0, 0), (0, 1, 8, 9))
C = _fragment((0, 0, 8, 8), (0, 1, 0, 1))


def widened(halves: Array, kind: str) -> Array:
    """uint16 bits of f16 or bf16 -> float32."""
    return floats.widen_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def _values(registers: list[Array], kind: str) -> Array:
    """uint32 [threads] each -> float32 [warps, 32, values]."""
    halves = np.stack(registers, -1).view(np.uint16)
    return widened(halves, kind).reshape(-1, 32, halves.shape[1])


def left_matrices(registers: list[Array], kind: str) -> Array:
    """A of each warp, [warps, 16, 16]."""
    values = _values(registers, kind)
    matrices = np.empty((len(values), 16, 16), np.float32)
    matrices[:, A[0], A[1]] = values
    return matrices


def result_registers(matrices: Array) -> list[Array]:
    """C or D of each warp, [warps, 16, columns] -> registers: four for every eight columns."""
    parts = [matrices[:, C[0], C[1] + first].reshape(-1, 4).T for first in range(0, matrices.shape[2], 8)]
    return [np.ascontiguousarray(register) for part in parts for register in part]


def multiply(a: list[Array], b: list[Array], c: list[Array], kind: str) -> list[Array]:
    """mma.sync.m16n8k16: D = A B + C. Products are exact and added up in float32, here in an order that a tensor core need not have,
    and with roundings that it need not have: only exact sums can be compared bit for bit."""
    left, warps = left_matrices(a, kind), len(a[0]) // 32
    right, total = np.empty((warps, 8, 16), np.float32), np.empty((warps, 16, 8), np.float32)
    right[:, B[0], B[1]] = _values(b, kind)
    total[:, C[0], C[1]] = np.stack(c, -1).view(np.float32).reshape(warps, 32, 4)
    return result_registers(total + left @ right.transpose(0, 2, 1))
