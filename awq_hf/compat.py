"""Every touch point with transformers that is not its documented interface."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import itertools
import json
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D as Conv1D
from transformers.quantizers import HfQuantizer, auto
from transformers.utils import logging

METHOD = "awq"
HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
_originals: tuple[Any, Any] | None = None

progress_bar = logging.tqdm  # follows transformers' own switch for progress bars


def register(quantizer: type, config: type) -> None:
    """Take over quant_method "awq". transformers' register_* functions refuse a name that is taken, so the tables are written to."""
    global _originals
    if _originals is None:
        _originals = (auto.AUTO_QUANTIZER_MAPPING[METHOD], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD])
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config


def unregister() -> None:
    """Give quant_method "awq" back to transformers' own loader. Does nothing when it was not taken."""
    global _originals
    if _originals is not None:
        auto.AUTO_QUANTIZER_MAPPING[METHOD], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _originals
        _originals = None


def after_saving(model: Any, action: Callable[[Any, str], None], push: Callable[..., Any]) -> None:
    """Have model.save_pretrained(directory) call action(model, directory) when it is done, and push(model, repo_id, **options) do what
    model.push_to_hub and save_pretrained(push_to_hub=True) do: options of theirs, and those of saving. Of a model with adapters,
    transformers saves those alone, and neither is called.

    There is no hook for either, so that attributes of the instance take the methods' place. They are partials of this module's functions:
    copy.deepcopy makes them the copy's, and pickle keeps them, where of bound methods it keeps the names only. `action` and `push` are
    functions of a module for the same reason.
    """
    model.save_pretrained = functools.partial(_save_pretrained, model, action, push)
    model.push_to_hub = functools.partial(_push_to_hub, model, push)


def _save_pretrained(
    model: Any,
    action: Callable[[Any, str], None],
    push: Callable[..., Any],
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> None:
    kind = type(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        kind.save_pretrained(model, save_directory, *args, **kwargs)
        return
    kwargs |= zip(list(inspect.signature(kind.save_pretrained).parameters)[2:], args, strict=False)
    main = kwargs.get("is_main_process", True)
    pushed = kwargs.pop("push_to_hub", False) and main
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if pushed and name in kwargs}
    if kwargs.get("save_original_format") is False and any(p.ndim == 3 for n, p in model.named_parameters() if n.endswith(".qweight")):
        raise ValueError("quantized experts are saved one by one, the only form that AWQ has; leave out save_original_format=False")
    kind.save_pretrained(model, save_directory, **kwargs)
    if main:
        action(model, os.fspath(save_directory))
    if pushed:
        push(model, hub.pop("repo_id", Path(save_directory).absolute().name), **hub, **kwargs)


def _push_to_hub(model: Any, push: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kind = type(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        return kind.push_to_hub(model, *args, **kwargs)
    given = inspect.signature(kind.push_to_hub).bind(model, *args, **kwargs).arguments
    return push(given.pop("self"), given.pop("repo_id"), **given)


def teach_peft() -> None:
    """Have PEFT's LoRA take AwqLinear, where PEFT is installed: get_peft_model, PeftModel.from_pretrained, model.add_adapter.

    The only register of layers that PEFT has is in each LoraConfig, so functions of its modules are replaced.
    """
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from peft.tuners import tuners_utils
        from peft.tuners.lora import model as lora
    except ImportError:  # of one that does not go with what is installed: who wants it is told so, others have a model to load
        return
    if "config" in inspect.signature(lora.dispatch_awq).parameters:  # before 0.21 it was called otherwise
        from awq_hf.lora import teach  # not above: it needs PEFT, and linear.py

        teach(lora, tuners_utils)


def forget_after_saving(model: Any) -> None:
    for name in ("save_pretrained", "push_to_hub"):
        model.__dict__.pop(name, None)


def forget_that_it_is_quantized(model: Any) -> None:
    """Undo what the quantizers' base class notes in the configs of a model and of the models in it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)


def when_loaded(model: Any, action: Callable[[Any], None]) -> None:
    """Have from_pretrained call action(its loading info) when weights are tied and keys that may be missing are taken out.

    The last step before the report is a method of the model; one bound to the instance takes its place, once.
    """

    def adjust(self: Any, loading_info: Any) -> None:
        del self.__dict__["_adjust_missing_and_unexpected_keys"]
        self._adjust_missing_and_unexpected_keys(loading_info)
        action(loading_info)

    model._adjust_missing_and_unexpected_keys = types.MethodType(adjust, model)


def note_other_shapes(model: Any, loading_info: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Note what was loaded in another shape than the empty model had. Before 5.23, transformers compares none if there is a quantizer."""
    loading_info.mismatched_keys |= {(n, t.shape, shapes[n]) for n, t in model.state_dict().items() if n in shapes and t.shape != shapes[n]}


def cast_renamed(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast what was loaded to the dtypes that the empty model had, by name, but for what its class keeps in float32.

    Before 5.21, transformers leaves what it renames in the dtype of the file when the checkpoint is quantized.
    """
    if hasattr(HfQuantizer, "get_new_dtype"):
        return
    kept = kept_in_float32(model, model.config.dtype)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in dtypes and not tensor.is_meta:
            tensor.data = tensor.to(torch.float32 if name in kept else dtypes[name])


def kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """The tensors that the model's class keeps in float32 when it is loaded in `dtype`: routers' biases, say."""
    patterns = [name.replace("*", ".*") for name in model._get_dtype_plan(dtype)]
    return {name for name in model.state_dict() if any(re.search(pattern, name) for pattern in patterns)}


def left_out(model: Any, name: str) -> bool:
    """Whether the architecture has no use for a tensor that its checkpoints hold: layers that predict further tokens, old buffers."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def tied_weights(model: Any) -> dict[str, str]:
    """Parameters that are, or will be once they are loaded, other parameters of the model: name -> name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie(model: Any, name: str) -> None:
    """Forget that the parameter `name` is another one's: a quantized head shares nothing with the embedding."""
    if model.all_tied_weights_keys.pop(name, None) is not None:
        model.config.get_text_config().tie_word_embeddings = False


def config_on_disk(model: Any) -> dict[str, Any]:
    """The content of the config.json that save_pretrained would write."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return content


def skip_initialization(model: Any, names: Iterable[str]) -> None:
    """Have from_pretrained not initialize the modules that contain `names`: some reach for the .weight of the Linears that were there.

    Not those with tensors of their own that are in no file; what else is missing from a quantized checkpoint is an error.
    """
    above = {".".join(parts[:n]) for name in names for parts in [name.split(".")] for n in range(1, len(parts))}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name in above:
        module = model.get_submodule(name)
        own = [f"{name}.{tensor}" for tensor in (*module._parameters, *module._buffers)]
        if not module._non_persistent_buffers_set and not any(pattern.search(tensor) for pattern in optional for tensor in own):
            module._is_hf_initialized = True


def gguf_file_of(model: Any) -> str | None:
    """The name of the GGUF file that transformers read a model from, which calls it quantized; None for all other models.

    Raises ValueError where its weights are still the file's blocks.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if getattr(getattr(quantizer, "quantization_config", None), "quant_method", None) != "gguf":
        return None
    file = Path(quantizer.quantization_config.gguf_file or "a GGUF file").name
    if packed := list(getattr(quantizer, "packed_modules", ())):
        raise ValueError(
            f"{packed[0]} is in memory as {file} holds it, in blocks that are quantized already; to quantize what they decode to, load it "
            "with quantization_config=transformers.GgufConfig(dequantize=True)"
        )
    return file


def check_is_model(model: Any) -> None:
    """Raise TypeError for what is neither a transformers model nor a name, and ValueError for a model with adapters in it."""
    if not isinstance(model, (str, os.PathLike, PreTrainedModel)):
        raise TypeError(
            f"{type(model).__name__} is neither a transformers model nor the name of one; of a PEFT model give model.merge_and_unload()"
        )
    modules = model.modules() if isinstance(model, PreTrainedModel) else ()
    if getattr(model, "_hf_peft_config_loaded", False) or any(hasattr(module, "base_layer") for module in modules):
        raise ValueError(f"{type(model).__name__} has adapters attached; merge them into the model, or delete them, first")


SPLITS = ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size", "pp_size")  # of a DistributedConfig; 1 where nothing is split


def check_not_split(model: Any) -> None:
    """Raise ValueError for a model that transformers is to split over several processes, or that is split already.

    from_pretrained notes in the config what tp_plan or distributed_config come to; a device_mesh alone has no effect.
    """
    wanted = getattr(model.config, "distributed_config", None)
    sizes = [f"{name}={size}" for name in SPLITS if (size := getattr(wanted, name, None) or 1) > 1]
    if not sizes and any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        sizes = ["its weights are DTensors"]
    if sizes:
        raise ValueError(
            f"{type(model).__name__} is split over several processes ({', '.join(sizes)}), and packed weights are neither made nor loaded "
            'so: leave out tp_plan and distributed_config; device_map="auto" spreads a quantized model over the devices of one process'
        )


def is_offloaded(module: Any) -> bool:
    """Whether accelerate keeps the module's weights elsewhere and brings them for every call."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """What a chat template makes of a conversation, up to where the answer would begin, as a tokenizer's apply_chat_template has it.

    template: Jinja, which transformers runs in a sandbox; variables: special tokens by name, and what else it is to know. Raises whatever
    the template does.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **variables)
    return str(text)
