"""The way from an op to its launches on a GPU that need not be there. Run by test_triton.py, in a process of its own.

Tensors are fake ones of the device cuda: shapes without values, so that neither the host nor the size of a launch can depend on values.
Triton does all that it does at a launch (arguments, specialization, options) but compiling and launching, which are recorded. An op that
passes can be captured in a CUDA graph: it waits for nothing, copies nothing from the host, and allocates from torch's allocator only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from awq_hf import QuantSpec
from awq_hf import experts as experts_module
from awq_hf.experts import AwqExperts, ExpertWeights
from awq_hf.kernels import dequantize, dispatch, jit
from awq_hf.kernels.kernel_layout import KernelWeight, to_kernel

DTYPES = [torch.float16, torch.bfloat16]
GPU = torch.device("cuda", 1)  # while 0 is the current one


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    aligned: set[str]  # arguments that the code may take for multiples of 16
    device: int


@dataclass
class Machine:
    """What Triton asks a driver for, and what torch asks CUDA for to change devices."""

    current: int = 0
    address: int = 0  # of every tensor

    def exchange(self, device: int) -> int:
        self.current, before = device, self.current
        return before

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class OnGpuOnly(TorchDispatchMode):
    """Refuses ops that take or give a tensor that is not on the GPU: copies from and to the host. Values are refused by fake tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.addmm.out:  # which fake tensors take apart, into an assignment that asks for the device
            out, func = kwargs.pop("out"), torch.ops.aten.addmm.default
            assert func(*args, **kwargs).shape == out.shape
            return out
        result = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, Tensor) or tensor.device == GPU, f"{func} of a tensor on {tensor.device}"
        return result


class WithoutCuda(TorchFunctionMode):
    """x[...] and contiguous by way of other ops: Python's own switch devices, which a torch that was built without CUDA cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous and not args[0].is_contiguous():
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        dim = 0
        for one in index if isinstance(index, tuple) else (index,):
            if one is ...:
                dim = tensor.ndim - sum(other is not None and other is not ... for other in index)
            elif isinstance(one, int):
                tensor = tensor.select(dim, one)
            elif one is None:
                tensor, dim = tensor.unsqueeze(dim), dim + 1
            elif isinstance(one, slice):
                tensor, dim = torch.ops.aten.slice(tensor, dim, one.start, one.stop, one.step or 1), dim + 1
            else:
                tensor, dim = torch.ops.aten.index.Tensor(tensor, [None] * dim + [one]), dim + 1
        return tensor


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    found = Machine()
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(torch.cuda, "_exchange_device", found.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", found.exchange)
    monkeypatch.setattr(Tensor, "data_ptr", lambda self: found.address)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), WithoutCuda(), OnGpuOnly(), torch.no_grad():
        yield found
    assert found.current == 0, "the device that was the current one is no longer"


@pytest.fixture
def launches(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What was launched."""
    launched: list[Launch] = []

    def compiled(kernel: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool) -> Any:
        class Code:
            function = packed_metadata = None

            def launch_metadata(self, *arguments: Any) -> None: ...

            def run(self, *arguments: Any) -> None:
                (*grid, _, _, _, _, _, _), values = arguments[:9], arguments[9:]
                aligned = {kernel.arg_names[at] for (at,), found in attributes.items() if ["tt.divisibility", 16] in found}
                launched.append(
                    Launch(kernel.__name__, tuple(grid), dict(zip(kernel.arg_names, values, strict=True)), aligned, machine.current)
                )

        return Code()

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    return launched


def on_gpu(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def weight_of(n: int, k: int, groups: int, bits: int, *experts: int) -> KernelWeight:
    """Shaped as the layout shapes it; for experts stacked."""
    codes = lambda columns: on_gpu(n, columns, dtype=torch.uint8)  # noqa: E731
    parts = to_kernel(codes(k), on_gpu(n, groups, dtype=torch.float16), codes(groups), bits)
    return KernelWeight(*(part.new_empty(*experts, *part.shape) for part in parts))


def check(launches: Sequence[Launch], kernels: list[str], out: Tensor, inputs: Sequence[Tensor | None]) -> None:
    """What holds for every launch: on the GPU of its tensors, of a size CUDA takes, each pointer to memory that torch has, dense."""
    assert [launch.kernel for launch in launches] == kernels
    for launch in launches:
        assert launch.device == GPU.index, "launched on the current GPU, which is not that of the tensors"
        x, y, z = (*launch.grid, 1, 1)[:3]
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16
        tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
        assert all(tensor.is_contiguous() and tensor.device == GPU for tensor in tensors)
        assert all(-(2**31) <= value < 2**31 for value in launch.arguments.values() if isinstance(value, int)), "an argument of 64 bits"
    assert out.device == GPU and out.is_contiguous()
    assert all(out is not tensor for tensor in inputs)


KERNELS = {  # tokens -> what is launched
    1: ["gemv_kernel"],
    3: ["gemm_kernel", "reduce_kernel"],
    8: ["gemm_kernel", "reduce_kernel"],
    64: ["gemm_kernel", "reduce_kernel"],
    256: ["gemm_kernel", "reduce_kernel"],
    2048: ["dequantize_kernel"],
}
POINTERS = {
    "gemv_kernel": {"x", "words", "scales", "zeros", "bias", "y"},
    "gemm_kernel": {"x", "words", "scales", "zeros", "bias", "out"},
    "reduce_kernel": {"workspace", "bias", "y"},
    "dequantize_kernel": {"words", "scales", "zeros", "out"},
    "experts_kernel": {"x", "offsets", "words", "scales", "zeros", "bias", "out"},
}
STRIDES = {"gemv_kernel": {"row_words"}, "gemm_kernel": {"k", "row_words"}, "dequantize_kernel": {"columns", "row_words"}}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", KERNELS)
def test_linear(m: int, dtype: torch.dtype, bits: int, has_bias: bool, launches: list[Launch]) -> None:
    n, k, groups = 1024, 4096, 32
    x, weight, bias = on_gpu(m, k, dtype=dtype), weight_of(n, k, groups, bits), on_gpu(n, dtype=torch.float32) if has_bias else None
    y = dispatch.linear(x, weight, bias, n, groups, bits, "triton")
    assert (y.shape, y.dtype) == ((m, n), dtype)
    check(launches, KERNELS[m], y, [x])
    for launch in launches:
        assert POINTERS[launch.kernel] <= launch.aligned, "16-byte loads need aligned pointers"
        assert STRIDES.get(launch.kernel, set()) <= launch.aligned, "16-byte loads need rows that start at multiples of 16"


@pytest.mark.parametrize("kernel, m", [("triton-gemv", 1), ("triton-gemm", 1), ("triton-gemm", 4096), ("triton-dequantize", 1)])
def test_forced_kernels(kernel: str, m: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, kernel)
    x, weight = on_gpu(m, 8192, dtype=torch.bfloat16), weight_of(28672, 8192, 64, 4)
    y = dispatch.linear(x, weight, None, 28672, 64, 4, "triton")
    chunks = -(-28672 * 8192 * 2 // dequantize.CHUNK)
    expected = {"triton-gemv": ["gemv_kernel"], "triton-gemm": ["gemm_kernel"], "triton-dequantize": ["dequantize_kernel"] * chunks}
    check(launches, expected[kernel], y, [x])


@pytest.mark.parametrize("shape, groups", [((72, 160), 5), ((40, 192), 3), ((40, 200), 1), ((136, 512), 1), ((1 << 17, 256), 2)])
@pytest.mark.parametrize("m", [1, 5, 600])  # twice as many tokens
def test_odd_shapes(m: int, shape: tuple[int, int], groups: int, launches: list[Launch]) -> None:
    (n, k), dtype = shape, torch.float16
    x = on_gpu(k, 2, m, dtype=dtype).permute(2, 1, 0)  # [m, 2, k], not contiguous
    y = dispatch.linear(x, weight_of(n, k, groups, 4), None, n, groups, 4, "triton")
    assert y.shape == (m, 2, n)
    check(launches, ["dequantize_kernel"] if m == 600 else ["gemm_kernel"], y, [x])


def test_a_token_that_starts_in_the_middle_of_a_word_is_copied(machine: Machine, launches: list[Launch]) -> None:
    x, weight = on_gpu(1, 128, dtype=torch.float16), weight_of(8, 128, 1, 4)
    for machine.address, copied in ((4, False), (2, True)):
        dispatch.linear(x, weight, None, 8, 1, 4, "triton")
        assert torch._C._is_alias_of(launches[-1].arguments["x"], x) != copied  # type: ignore[attr-defined]
        assert not launches[-1].aligned & POINTERS["gemv_kernel"], "the kernel for aligned tensors was taken for others"


@pytest.mark.parametrize("tokens", [(0,), (2, 0)])
def test_no_tokens(tokens: tuple[int, ...], launches: list[Launch]) -> None:
    weight = weight_of(72, 160, 5, 4)
    y = dispatch.linear(on_gpu(*tokens, 160, dtype=torch.float16), weight, None, 72, 5, 4, "triton")
    dx = dispatch.input_grad(on_gpu(*tokens, 72, dtype=torch.float16), weight, 160, 5, 4, "triton")
    assert (y.shape, dx.shape, launches) == ((*tokens, 72), (*tokens, 160), [])
    offsets, stacked = on_gpu(4, dtype=torch.int32), weight_of(72, 160, 5, 4, 3)
    y = dispatch.experts_linear(on_gpu(0, 160, dtype=torch.float16), offsets, stacked, None, 72, 5, 4, "triton")
    check(launches, ["experts_kernel"], y, [])  # which finds no token to do


@pytest.mark.parametrize("m", [1, 8, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_grad(dtype: torch.dtype, m: int, launches: list[Launch]) -> None:
    n, k = 8192, 28672
    dy = on_gpu(m, n, dtype=dtype)
    dx = dispatch.input_grad(dy, weight_of(n, k, 224, 4), k, 224, 4, "triton")
    check(launches, ["dequantize_kernel"] * -(-n * k * 2 // dequantize.CHUNK), dx, [dy])


MIXTURES = [(8, 512, 256, 2), (128, 2048, 768, 8)]  # experts, hidden, inner, top_k


@pytest.mark.parametrize("tokens", [1, 8, 600])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_of_experts_with_its_routing(
    bits: int, mixture: tuple[int, int, int, int], tokens: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "ops", dispatch)  # for fake tensors the registered op computes shapes only
    experts, hidden, inner, top_k = mixture

    def projection(n: int, k: int) -> ExpertWeights:
        module = ExpertWeights(experts, k, n, QuantSpec(bits, 128), device=GPU)
        module._hold(dispatch.TRITON, weight_of(n, k, k // 128, bits, experts))
        return module

    class Gate(torch.nn.Module):
        def _apply_gate(self, x: Tensor) -> Tensor:
            gate, up = x.chunk(2, -1)
            return torch.nn.functional.silu(gate) * up

    layer = AwqExperts(Gate(), projection(2 * inner, hidden), projection(hidden, inner))
    x = on_gpu(tokens, hidden, dtype=torch.bfloat16)
    share, chosen = on_gpu(tokens, experts, dtype=torch.bfloat16).softmax(-1).topk(top_k)
    y = layer(x, chosen, share)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    check(launches, ["experts_kernel"] * 2, y, [x])
    assert all(POINTERS[launch.kernel] | {"k", "row_words"} <= launch.aligned for launch in launches)
    assert len({launch.grid[1] for launch in launches}) == 1


def test_experts_beyond_32_bits_together(launches: list[Launch]) -> None:
    """128 experts whose words are more than 2^31; each has less."""
    weight = weight_of(28672, 8192, 64, 4, 128)
    assert weight.words.numel() > 2**31
    offsets = on_gpu(129, dtype=torch.int32)
    y = dispatch.experts_linear(on_gpu(4096, 8192, dtype=torch.float16), offsets, weight, None, 28672, 64, 4, "triton")
    check(launches, ["experts_kernel"], y, [])


def test_what_experts_do_one_by_one_says_that_it_cannot_be_captured(machine: Machine) -> None:
    weight, offsets = weight_of(72, 160, 5, 4, 3), on_gpu(4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot hold"):
        dispatch.experts_linear(on_gpu(4, 160, dtype=torch.float32), offsets, weight, None, 72, 5, 4, "triton")
    with pytest.raises(RuntimeError, match="gradients have no such kernel"):
        dispatch.experts_input_grad(on_gpu(4, 72, dtype=torch.float16), offsets, weight, 160, 5, 4, "triton")


WAITS: dict[str, tuple[Callable[[Tensor], object], type[Exception]]] = {
    "item": (lambda x: x.sum().item(), DataDependentOutputException),
    "tolist": (lambda x: x.tolist(), DataDependentOutputException),
    "a condition": (lambda x: bool(x.sum() > 0), DataDependentOutputException),
    "cpu": (lambda x: x.cpu(), AssertionError),
    "a copy from the host": (lambda x: x + torch.ones(3).to(x.device), AssertionError),
    "a list": (lambda x: torch.tensor([1.0, 2.0], device=x.device), AssertionError),
    "a mask": (lambda x: x.masked_select(x > 0), DynamicOutputShapeException),
    "unique": (lambda x: torch.unique(x), DynamicOutputShapeException),
}


@pytest.mark.parametrize("wait, error", WAITS.values(), ids=WAITS.keys())
def test_what_no_graph_can_hold_is_found(wait: Callable[[Tensor], object], error: type[Exception], machine: Machine) -> None:
    x = on_gpu(3, dtype=torch.float32)
    with pytest.raises(error):
        wait(x)


def test_a_launch_on_the_current_device_is_found(machine: Machine, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = on_gpu(1, 128, dtype=torch.float16), weight_of(8, 128, 1, 4)
    dispatch.linear(x, weight, None, 8, 1, 4, "triton")
    with pytest.raises(AssertionError, match="which is not that of the tensors"):
        check([launch._replace(device=0) for launch in launches], ["gemv_kernel"], x, [])


def test_this_is_the_compiler() -> None:
    assert not jit.INTERPRETED
