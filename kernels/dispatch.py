"""Which kernel runs a quantized Linear: one table of layouts, each with the kernels that read it.

A weight is brought into a layout once, after loading; which kernel reads it is chosen at every call, by the number of tokens.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from . import chunked, cpu, kernel_layout, native, reference
from .installed import INTERPRETED
from .layout import pack, unpack
from .problem import Problem

GEMM_TOKENS = 512  # beyond which Triton's weight is dequantized for a library's product; from operation counts, not from timings
VARIABLE = "AWQ_HF_KERNEL"  # environment: the start of the names of the kernels that may be used

Parts = Sequence[Tensor]  # of a weight, in a layout's order
Codes = tuple[Tensor, Tensor, Tensor]  # q uint8 [out, in], scales [out, groups], zero points uint8 [out, groups]


class Kernel(NamedTuple):
    """name: as `awq-hf inspect` shows it; supports(problem): why the kernel cannot do it, or None; run(x [m, in], parts, bias, problem) ->
    [m, out]; tokens: up to which it is used.
    """

    name: str
    supports: Callable[[Problem], str | None]
    run: Callable[[Tensor, Parts, Tensor | None, Problem], Tensor]
    tokens: float = math.inf


class Layout(NamedTuple):
    """parts: names of the tensors; pack(q, scales, zero_points, bits) makes them; unpack(parts, problem) is its inverse, bit for bit;
    rows(parts, which, problem) -> those rows of the weight, float32 [rows, in], exact: with it every layout does what its kernels,
    which are in order of preference, do not. devices: that the kernels run on. input_grad(dy [m, out], parts, problem): dy W for the dtypes
    of the kernels, if there is a faster way than by rows. caution(problem): what a user has to know of results, or None.
    """

    name: str
    parts: tuple[str, ...]
    pack: Callable[[Tensor, Tensor, Tensor, int], Parts]
    unpack: Callable[[Parts, Problem], Codes]
    rows: Callable[[Parts, slice, Problem], Tensor]
    kernels: tuple[Kernel, ...] = ()
    devices: tuple[str, ...] = ()
    input_grad: Callable[[Tensor, Parts, Problem], Tensor] | None = None
    caution: Callable[[Problem], str | None] = lambda problem: None


def _rows_of(unpack: Callable[[Parts, Problem], Codes]) -> Callable[[Parts, slice, Problem], Tensor]:
    """For layouts whose parts all begin with the rows."""

    def rows(parts: Parts, which: slice, problem: Problem) -> Tensor:
        return reference.scaled(*unpack([part[which] for part in parts], problem))

    return rows


# What is stored: AutoAWQ's order for 4 bits


def pack_canonical(q: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Parts:
    """qweight, qzeros and scales, as `reference.dequantize` takes them."""
    columns = lambda codes: pack(codes.T.contiguous(), bits)  # noqa: E731  [in or groups, words]
    return columns(q), columns(zero_points), scales.T.contiguous()


def unpack_canonical(parts: Parts, bits: int) -> Codes:
    """Inverse of `pack_canonical`."""
    qweight, qzeros, scales = parts
    codes = lambda words: unpack(words, bits, scales.shape[1]).T.contiguous()  # noqa: E731
    return codes(qweight), scales.T.contiguous(), codes(qzeros)


CANONICAL = Layout(
    "canonical",
    ("qweight", "qzeros", "scales"),
    pack_canonical,
    lambda parts, problem: unpack_canonical(parts, problem.bits),
    lambda parts, which, problem: reference.dequantize(parts[0], parts[1], parts[2], problem.bits, which).T,
)


# Triton's. Its modules are imported when a weight on a GPU asks for them: importing triton takes a while.


def _triton(module: str) -> Any:
    return importlib.import_module(f".{module}", __package__)


def _on_triton(module: str, function: str, tokens: float = math.inf) -> Kernel:
    def run(x: Tensor, parts: Parts, bias: Tensor | None, problem: Problem) -> Tensor:
        return getattr(_triton(module), function)(x, *parts, bias, problem.bits)

    return Kernel(f"triton-{module}", lambda problem: _triton(module).supports(problem), run, tokens)


def _unpack_triton(parts: Parts, problem: Problem) -> Codes:
    return kernel_layout.from_kernel(kernel_layout.KernelWeight(*parts), problem.k, problem.groups, problem.bits)


def _triton_grad(dy: Tensor, parts: Parts, problem: Problem) -> Tensor:
    return _triton("dequantize").input_grad(dy.contiguous(), *parts, problem.k, problem.bits)


TRITON = Layout(
    "triton",
    ("words", "scales", "zeros"),
    kernel_layout.to_kernel,
    _unpack_triton,
    _rows_of(_unpack_triton),
    (_on_triton("gemv", "gemv", tokens=1), _on_triton("gemm", "gemm", tokens=GEMM_TOKENS), _on_triton("dequantize", "matmul_dequantized")),
    ("cuda", "cpu") if INTERPRETED else ("cuda",),
    _triton_grad,
)


# CPUs


def _unpack_native(parts: Parts, problem: Problem) -> Codes:
    return native.unpack(native.NativeWeight(*parts), problem.k, problem.groups)


def _cpu_rows(parts: Parts, which: slice, problem: Problem) -> Tensor:
    start, stop, _ = which.indices(problem.n)
    words, steps, scales, zeros = parts
    some = cpu.CpuWeight(words[start : stop + -stop % cpu.ROWS], steps, scales[start:stop], zeros[start:stop])
    return reference.scaled(*cpu.unpack(some, problem.k))


def _unpack_cpu(parts: Parts, problem: Problem) -> Codes:
    return cpu.unpack(cpu.CpuWeight(*parts), problem.k)


NATIVE = Layout(
    "native",
    ("words", "scales", "zeros"),
    lambda q, scales, zero_points, bits: native.pack(q, scales, zero_points),
    _unpack_native,
    _rows_of(_unpack_native),
    (Kernel("cpu-native", native.supports, lambda x, parts, bias, problem: native.linear(x, *native.NativeWeight(*parts), bias)),),
    ("cpu",),
)
CPU = Layout(
    "cpu",
    ("words", "steps", "scales", "zeros"),
    lambda q, scales, zero_points, bits: cpu.pack(q, scales, zero_points),
    _unpack_cpu,
    _cpu_rows,
    (Kernel("cpu-torch", cpu.supports, lambda x, parts, bias, problem: cpu.linear(x, *cpu.CpuWeight(*parts), bias)),),
    ("cpu",),
    caution=cpu.caution,
)


# The choice

LAYOUTS = {layout.name: layout for layout in (TRITON, NATIVE, CPU, CANONICAL)}  # by preference
KERNELS = [kernel for layout in LAYOUTS.values() for kernel in layout.kernels]
REFERENCE = "reference"


def forced() -> str:
    """The value of the environment variable, "" when it is not set. Raises ValueError when no kernel's name starts so."""
    wanted = os.environ.get(VARIABLE, "")
    names = [*(kernel.name for kernel in KERNELS), REFERENCE]
    if not any(name.startswith(wanted) for name in names):
        raise ValueError(f"{VARIABLE}={wanted}: no kernel's name starts so; choose of {', '.join(names)}")
    return wanted


def choose_layout(problem: Problem) -> tuple[Layout, str | None]:
    """The layout to bring a weight into, and why no kernel reads it where it is the canonical one; None if that was asked for.

    problem: with m = 1.
    """
    wanted = forced()
    if wanted and REFERENCE.startswith(wanted):
        return CANONICAL, None
    reasons: list[str | None] = [f"there are no kernels for {problem.device}"]
    for layout in LAYOUTS.values():
        found = [k.supports(problem) for k in layout.kernels if problem.device in layout.devices and k.name.startswith(wanted)]
        if None in found:
            return layout, None
        reasons = found or reasons
    return CANONICAL, "; ".join(dict.fromkeys(map(str, reasons)))


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, layout: Layout, wanted: str = "") -> Kernel | None:
    """The kernel for a weight in `layout`, None for the product by rows. wanted: what `forced` says."""
    able = [kernel for kernel in layout.kernels if kernel.supports(problem) is None]
    if wanted and (named := [kernel for kernel in able if kernel.name.startswith(wanted)]):
        able = named
    return next((kernel for kernel in able if problem.m <= kernel.tokens), able[-1] if wanted and able else None)


def by_tokens(problem: Problem, layout: Layout) -> dict[int, str]:
    """Tokens of a call -> name of what computes it from there on; for the problem with any m."""
    rest, wanted = REFERENCE if layout is CANONICAL else "dequantize", forced()
    names: dict[int, str] = {}
    for m in sorted({1, *(int(kernel.tokens) + 1 for kernel in layout.kernels if kernel.tokens < math.inf)}):
        kernel = choose(replace(problem, m=m), layout, wanted)
        name = rest if kernel is None else kernel.name
        if name not in list(names.values())[-1:]:
            names[m] = name
    return names


def linear(x: Tensor, weight: Parts, bias: Tensor | None, out_features: int, groups: int, bits: int, layout: str) -> Tensor:
    """y = x W^T + b. x: [..., in]; weight: the parts of `layout`; bias: [out] or None. Returns [..., out] in x's dtype."""
    stored, flat = LAYOUTS[layout], x.reshape(-1, x.shape[-1])
    problem = Problem(flat.shape[0], out_features, flat.shape[1], groups, x.dtype, x.device.type, bits)
    if not problem.m:
        return x.new_empty(*x.shape[:-1], out_features)
    kernel = choose(problem, stored, os.environ.get(VARIABLE, ""))
    if kernel is None:
        y = chunked.linear(flat, lambda which: stored.rows(weight, which, problem), out_features, bias)
    else:
        y = kernel.run(flat.contiguous(), weight, bias, problem)
    return y.resize_(*x.shape[:-1], out_features)  # no view: autograd refuses to let one that an op returns be changed in place


def input_grad(dy: Tensor, weight: Parts, in_features: int, groups: int, bits: int, layout: str) -> Tensor:
    """dx = dy W: the gradient of `linear` with respect to its input. dy: [..., out]. Returns [..., in] in dy's dtype."""
    stored, flat = LAYOUTS[layout], dy.reshape(-1, dy.shape[-1])
    problem = Problem(flat.shape[0], flat.shape[1], in_features, groups, dy.dtype, dy.device.type, bits)
    if not problem.m:
        return dy.new_empty(*dy.shape[:-1], in_features)
    if stored.input_grad is not None and any(kernel.supports(problem) is None for kernel in stored.kernels):
        dx = stored.input_grad(flat, weight, problem)
    else:
        dx = chunked.input_grad(flat, lambda which: stored.rows(weight, which, problem), in_features)
    return dx.resize_(*dy.shape[:-1], in_features)


def experts_linear(
    x: Tensor, offsets: Tensor, weight: Parts, bias: Tensor | None, out_features: int, groups: int, bits: int, layout: str
) -> Tensor:
    """y[t] = x[t] W[e]^T + b[e] for tokens sorted by expert, those of expert e being offsets[e] to offsets[e + 1].

    x: [tokens, in]; offsets: int32 [experts + 1], as `routing.route` makes them; weight: the parts of `layout`, each stacked to
    [experts, ..]; bias: [experts, out] or None. Returns [tokens, out] in x's dtype. On a GPU the host does not wait for offsets.
    """
    problem = Problem(x.shape[0], out_features, x.shape[1], groups, x.dtype, x.device.type, bits)
    if layout == TRITON.name and x.device.type in TRITON.devices and _triton("experts").supports(problem) is None:
        return _triton("experts").experts_linear(x.contiguous(), offsets, *weight, bias, bits)

    def multiply(some: Tensor, e: int) -> Tensor:
        return linear(some, [part[e] for part in weight], None if bias is None else bias[e], out_features, groups, bits, layout)

    return chunked.by_expert(x, offsets, out_features, multiply)


def experts_input_grad(dy: Tensor, offsets: Tensor, weight: Parts, in_features: int, groups: int, bits: int, layout: str) -> Tensor:
    """dx[t] = dy[t] W[e]: the gradient of `experts_linear` with respect to its input, expert by expert. dy: [tokens, out]."""

    def multiply(some: Tensor, e: int) -> Tensor:
        return input_grad(some, [part[e] for part in weight], in_features, groups, bits, layout)

    return chunked.by_expert(dy, offsets, in_features, multiply)
