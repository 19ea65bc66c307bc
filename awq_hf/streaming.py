"""Float weights of the blocks that stay in the checkpoint's files until their turn: a model is quantized, or run, in the memory of what it
becomes and one block.

from_pretrained is led to put the blocks' tensors on the meta device: names, shapes and conversions are checked as always, and nothing of
them is read. Each block is then loaded by transformers' own loader when it is needed. What is not its documented interface, like
everything in compat.py, is in this file.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from awq_hf import compat
from awq_hf.blocks import find_blocks
from awq_hf.renaming import conversions_kept, resolver

Placement = dict[str, Any]  # a device_map


class InMemory:
    """Where the blocks' weights are: of a model whose are all there. later: the module whose are not, until `load`."""

    later: str | None = None

    def load(self, index: int) -> None:
        """Have the weights of block `index` in memory; those that are there stay as they are."""

    def unload(self, index: int) -> None:
        """Undo the last `load` of a block whose modules are still the same: changes are lost."""


class Later(InMemory):
    """Of a model whose blocks' tensors are on the meta device, until each block is loaded."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefix, self.blocks = find_blocks(model)
        self.later = self.prefix
        self._empty: dict[int, list[tuple[str, str, Tensor]]] = {}  # by names: modules would keep what is put into them later

    def load(self, index: int) -> None:
        self._empty[index] = list(_on_meta(self.blocks[index]))
        if self._empty[index]:
            self.fill(index)

    def unload(self, index: int) -> None:
        for module, name, tensor in self._empty.pop(index):
            setattr(self.blocks[index].get_submodule(module), name, tensor)

    def fill(self, index: int) -> None:
        """Put what is on the meta device into memory."""
        raise NotImplementedError


class InFiles(Later):
    """Of a model whose blocks are in safetensors files."""

    def __init__(self, model: Any, files: Iterable[str], placement: Placement) -> None:
        """To be made in from_pretrained, before weights are loaded. placement: the device_map that it loads by, of one device, which the
        blocks are taken out of for that time."""
        super().__init__(model)
        self.device = dict(placement)
        self.files = list(files)
        self.conversions: Sequence[Any] = []  # of names and tensors, that the loader applies
        self._keys: list[dict[str, str]] | None = None
        placement[f"{self.prefix}."] = "meta"
        _when_read(model, lambda: placement.pop(f"{self.prefix}."))

    def fill(self, index: int) -> None:
        with ExitStack() as opened, _quietly(), conversions_kept(self.model):
            files = {path: opened.enter_context(safe_open(path, framework="pt", backend="pread")) for path in set(self._of(index).values())}
            state = {name: files[path].get_slice(name) for name, path in self._of(index).items()}
            config = LoadStateDictConfig(device_map=self.device, weight_mapping=list(self.conversions))
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        if missing := [f"{self.prefix}.{index}.{name}" for name, tensor in self.blocks[index].state_dict().items() if tensor.is_meta]:
            raise RuntimeError(f"{missing[0]} could not be loaded from its file: {info.conversion_errors or info.mismatched_keys}")

    def _of(self, index: int) -> dict[str, str]:
        """The tensors of a block, by their names in the checkpoint -> the file that each is in."""
        if self._keys is None:
            self._keys = [{} for _ in self.blocks]
            resolve, known = resolver(self.model, self.conversions), self.model.state_dict()
            for path in self.files:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  (not a dict)
                        target, _ = resolve(name, known)
                        if target in known and target.startswith(f"{self.prefix}."):
                            self._keys[int(target[len(self.prefix) + 1 :].partition(".")[0])][name] = path
        return self._keys[index]


def _on_meta(block: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(Name of a module, name in it, tensor) of all that is not in memory."""
    for place, module in block.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta:
                yield place, name, tensor


def _when_read(model: Any, action: Any) -> None:
    """Have from_pretrained call `action` when it has read the files, before it makes what was not in them.

    The first step of that is a method of the model; one bound to the instance takes its place, once.
    """

    def mark(self: Any, loading_info: Any) -> None:
        del self.__dict__["mark_tied_weights_as_initialized"]
        action()
        self.mark_tied_weights_as_initialized(loading_info)

    model.mark_tied_weights_as_initialized = types.MethodType(mark, model)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the loader's progress bar, which is for a whole model."""
    shown, logging._tqdm_active = logging._tqdm_active, False  # its functions for that speak for huggingface_hub as well
    try:
        yield
    finally:
        logging._tqdm_active = shown


def default_device() -> torch.device:
    """What device_map="auto" comes to for a model that is quantized: the first accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


class LeavesBlocks(HfQuantizer):
    """Hooks of from_pretrained that leave the blocks in their files. placement: what it loads by; source: the blocks, once there is a
    model."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.placement: Placement | None = None
        self.source: InFiles | None = None

    def place(self, device_map: Any) -> Placement | None:
        """A map of one device, which stays ours: loading looks into it again and again. None for one that spreads the model."""
        if not isinstance(device_map, dict):
            device_map = {"": torch.device("cpu") if device_map is None else default_device()}  # "auto", or another way to spread
        devices = {_name_of(device): device for device in device_map.values()}
        if len(devices) == 1 and "disk" not in devices:
            self.placement = {"": devices.popitem()[1]}
        return self.placement

    def leave_blocks(self, model: Any, files: Sequence[str]) -> None:
        """Before weights are loaded: where all are in safetensors files, those of the blocks stay there. Not those that are in several, of
        which the files have one."""
        prefix, _ = find_blocks(model)
        shared = any(name.startswith(f"{prefix}.") for name in compat.tied_weights(model))
        if self.placement is not None and files and all(file.endswith(".safetensors") for file in files) and not shared:
            self.source = InFiles(model, files, self.placement)

    def remove_quantization_config(self, model: Any) -> None:
        with conversions_kept(model):
            super().remove_quantization_config(model)
        compat.forget_that_it_is_quantized(model)

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """How the loader brings tensors into parameters. transformers passes the model from 5.21 on."""
        conversions = super().update_weight_conversions(weight_conversions, *model)
        if self.source is not None:
            self.source.conversions = conversions
        return conversions


def _name_of(device: Any) -> str:
    """One name for what a device_map may write as "cuda:0", 0 or torch.device("cuda", 0)."""
    return f"cuda:{device}" if isinstance(device, int) else str(device)


_METHOD = "awq_hf_float"  # known to transformers for as long as `load_float` takes


class _Float(QuantizationConfigMixin):
    def __init__(self) -> None:
        self.quant_method = _METHOD


class _LeftInFiles(LeavesBlocks):
    """No quantizer: the model stays float."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        return self.place(device_map) or device_map

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_kwargs: Any) -> None:
        try:
            self.leave_blocks(model, checkpoint_files or [])
        except ValueError:  # it has no blocks
            return


def load_float(kind: Any, name: Any, **options: Any) -> tuple[Any, InMemory]:
    """kind.from_pretrained(name, **options) of a float model, and where its blocks' weights are: in their files, if those are safetensors
    and the model goes to one device."""
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _LeftInFiles
    try:
        model = kind.from_pretrained(name, quantization_config=_Float(), **options)
    finally:
        auto.AUTO_QUANTIZER_MAPPING.pop(_METHOD, None)
    quantizer = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    return model, quantizer.source or InMemory()
