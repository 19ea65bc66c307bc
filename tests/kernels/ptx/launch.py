"""Triton's launches carried out by the executor: kernels are compiled to PTX as for a GPU, and run on tensors of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.ptx.machine import Kernel
from tests.kernels.ptx.memory import Global

POINTERS_OF_TRITON = 2  # to scratch memory, at the end of the parameters; our kernels use none


def without_assembler(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """A hook of Triton's compiler, which asks first for what to tell the results in its cache apart by. compiled.py has the assembler."""
    if stages is None:
        return "without assembler", ""
    stages["cubin"] = lambda ptx, metadata: b""
    return None


@functools.cache
def compiled(
    kernel: Any, signature: tuple[tuple[str, str], ...], constants: Any, attributes: Any, options: Any, sm: int
) -> tuple[str, int]:
    """PTX, and bytes of shared memory. The arguments are those of Triton's compiler, as tuples."""
    runtime = triton.knobs.runtime
    before, runtime.add_stages_inspection_hook = runtime.add_stages_inspection_hook, without_assembler
    try:
        source = ASTSource(kernel, dict(signature), dict(constants), {path: [*map(list, found)] for path, found in attributes})
        binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(options))
    finally:
        runtime.add_stages_inspection_hook = before
    return binary.asm["ptx"], binary.metadata.shared


assemble = functools.cache(Kernel)


@dataclass
class Device:
    """What Triton asks a driver for. change: what is done to the PTX before it runs. launched: names of the kernels."""

    sm: int = 80
    change: Callable[[str], str] = str
    launched: list[str] = field(default_factory=list)
    allocations: list[tuple[Tensor, NDArray[np.bool_]]] = field(default_factory=list)  # and which bytes something was written to

    def get_current_device(self) -> int:
        """Triton takes the target of a device for the first it sees."""
        return self.sm

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def allocate(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that nothing was written to: NaN for the host. Integers are not a kernel's output."""
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        tensor = torch.full(shape, float("nan"), dtype=dtype)
        self.allocations.append((tensor, np.zeros(tensor.nbytes, bool)))
        return tensor

    def known(self, tensor: Tensor) -> NDArray[np.bool_] | None:
        for memory, known in self.allocations:
            if 0 <= (start := tensor.data_ptr() - memory.data_ptr()) < memory.nbytes:
                return known[start : start + tensor.nbytes]
        return None

    def launch(self, kernel: Any, text: str, shared: int, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        memory, addresses, values = Global(), dict[int, int](), []
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                if value.data_ptr() not in addresses:
                    data = value.view(-1).view(torch.uint8).numpy()
                    addresses[value.data_ptr()] = memory.add(name, data, value.data_ptr() % 256, self.known(value))
                value = addresses[value.data_ptr()]
            values.append(value)
        assemble(self.change(text), shared).launch(grid, memory, [*values, *[0] * POINTERS_OF_TRITON])
        self.launched.append(kernel.__name__)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()

    def do_compile(kernel: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool) -> Any:
        frozen = tuple((path, tuple(map(tuple, values))) for path, values in attributes.items())
        chosen = tuple(options.__dict__.items())
        text, shared = compiled(kernel, tuple(signature.items()), tuple(constants.items()), frozen, chosen, found.sm)
        names = [name for name, kind in signature.items() if kind != "constexpr"]

        class Code:
            function = packed_metadata = None

            def launch_metadata(self, *arguments: Any) -> None: ...

            def run(self, *arguments: Any) -> None:
                grid, values = arguments[:3], dict(zip(kernel.arg_names, arguments[9:], strict=True))
                found.launch(kernel, text, shared, grid, {name: values[name] for name in names})

        return Code()

    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: found.allocate(*shape, dtype=dtype))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape: found.allocate(*shape, dtype=self.dtype))
    yield found
