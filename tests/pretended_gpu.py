"""A GPU that is not there: tensors that say they are on it compute on the CPU, and refuse to meet tensors that do not.

What a GPU would refuse, this refuses: operations on tensors of two devices (but for scalars and indices, as CUDA allows), and
reading values without copying them to the host first. What it does not tell is whether kernels are right or fast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
REGISTRY, CUDA, META = "_ZN3c104impl26device_guard_impl_registryE", 1, 14  # of c10; numbers of DeviceType
aten = torch.ops.aten
MIXING = {aten._to_copy.default, aten.copy_.default}  # take tensors of two devices
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # indices may be the host's


class OnGpu(Tensor):
    """held: the tensor on the CPU that it really is."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        assert held.device.type == "cpu"
        shown = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, layout=held.layout, device=GPU,
        )  # fmt: skip
        shown.held = held
        return shown

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # which is refused to subclasses, and waits for a GPU as .cpu() does
            args = (args[0].held,)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})


def _held(value: Any) -> Any:
    return tree_map(lambda each: each.held if isinstance(each, OnGpu) else each, value)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target, rest = kwargs.get("device"), {name: value for name, value in kwargs.items() if name != "device"}
    on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors) if target is None else torch.device(target).type == "cuda"
    if func not in MIXING:
        checked = tensors[:1] if func in INDEXING else tensors
        host = [t for t in checked if not isinstance(t, OnGpu) and t.device.type == "cpu" and t.ndim]
        assert not host or not any(isinstance(t, OnGpu) for t in tensors), f"{func} of tensors on the GPU and on the CPU"
    if func is aten.copy_.default:
        on_gpu = isinstance(args[0], OnGpu)
    if target is not None and (on_gpu or any(isinstance(tensor, OnGpu) for tensor in tensors)):
        rest["device"] = torch.device("cpu") if on_gpu else target
    elif target is not None:
        rest = kwargs
    held_args, held_rest = _held((args, rest))
    if func is aten._to_copy.default and rest.get("device", None) == torch.device("cpu"):
        copied = held_args[0].clone() if held_args[0].device.type == "cpu" else held_args[0]
        result = func(copied, **held_rest)
    elif func is aten.histc.default and not held_args[0].is_floating_point():  # which only CUDA has
        result = func(held_args[0].float(), *held_args[1:], **held_rest).to(held_args[0].dtype)
    else:
        result = func(*held_args, **held_rest)
    wrap = lambda each: OnGpu(each) if isinstance(each, Tensor) and on_gpu and each.device.type == "cpu" else each  # noqa: E731
    wrapped = tree_map(wrap, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on_gpu and tensors and target is None else wrapped


class Machine(TorchDispatchMode):
    """One that has the GPU: tensors can be made on it and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return _compute(func, args, kwargs)
        return func(*args, **kwargs)


def _set_device_guard() -> None:
    """Have torch switch to the GPU and back without doing anything, as for the device "meta", whose guard serves here."""
    registry = (ctypes.c_void_p * 32).in_dll(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so")), REGISTRY)
    if registry[CUDA] is None:
        registry[CUDA] = registry[META]
    torch._C._ensureCUDADeviceGuardSet()  # where torch was built with CUDA, and there is none


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Within, the device that is given exists, in every thread that a forward is paused in as well."""
    import transformers.modeling_utils

    from awq_hf.calibration import paused

    run = paused._Forward.run

    def run_there(forward: Any) -> None:
        with Machine():
            run(forward)

    patch.setattr(paused._Forward, "run", run_there)
    patch.setattr(transformers.modeling_utils, "caching_allocator_warmup", lambda *_: None)
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in threads
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    _set_device_guard()
    patch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 1)
    patch.setattr(torch.cuda, "get_device_name", lambda _device: "pretended")
    with Machine():
        yield GPU


def on_cpu(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, as they are on the host."""
    return {name: tensor.data.held if isinstance(tensor.data, OnGpu) else tensor for name, tensor in tensors.items()}
