"""Loading an AWQ checkpoint: modules that fit its tensors, the check that nothing is lost or left random, the canonical layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from awq_hf import compat, renaming
from awq_hf.expert_checkpoint import ExpertTensors
from awq_hf.experts import holds_experts, reason_against
from awq_hf.headers import Headers, read_headers
from awq_hf.kernels.foreign import to_gemm
from awq_hf.kernels.layout import GEMM, WIDE, pack
from awq_hf.linear import AwqLinear, PackedModule, ScaledActivation
from awq_hf.matrices import is_matrix, shape_of
from awq_hf.spec import QuantSpec
from awq_hf.stored import DTYPES, ZEROS, Stored, declared_layout, is_finite


class Loading(NamedTuple):
    """What is known of a checkpoint between the hooks before and after its weights are loaded."""

    headers: Headers
    layouts: dict[str, str]  # module -> layout of its tensors
    sources: dict[str, str]  # parameter -> tensor of the file


def begin(model: Any, files: Iterable[str | os.PathLike[str]], spec_of: Callable[[str], QuantSpec], version: str | None) -> Loading:
    """Give `model`, empty on the meta device, the modules of the checkpoint, and have its keys checked when they are loaded."""
    headers = read_headers(files, model.config.name_or_path)
    layouts = convert_modules(model, headers, spec_of, version)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}

    def loaded(info: Any) -> None:
        check_keys(model, info)
        compat.cast_renamed(model, dtypes)

    compat.when_loaded(model, loaded)
    return Loading(headers, layouts, match_tensors(model, headers))


# Modules


def convert_modules(model: Any, headers: Headers, spec_of: Callable[[str], QuantSpec], version: str | None) -> dict[str, str]:
    """Replace the Linears and experts that own a .qweight in the checkpoint by empty packed modules, with parameters as the file has them.

    spec_of(module name of the model): what the config says of it. version: what the config calls the layout, None when nothing.
    Returns module name -> layout. Raises ValueError naming the tensor when something is missing, unexpected or of another shape.
    """
    owners: dict[str, str] = {}  # module -> its first tensor
    for tensor in sorted(headers):
        owner, _, part = tensor.rpartition(".")
        if part in ("qweight", *ZEROS):
            owners.setdefault(owner, tensor)
    if not owners:
        raise ValueError("config.json says AWQ, but no tensor of the checkpoint is named *.qweight: it is not quantized")
    declared = declared_layout(version)
    resolve, parameters = renaming.resolver(model), model.state_dict()
    layouts: dict[str, str] = {}
    experts = ExpertTensors(model, headers)
    for owner, tensor in owners.items():
        name, conversion = resolve(f"{owner}.weight", parameters)
        name = name.removesuffix(".weight")
        if conversion is not None and name in parameters and experts.take(owner, name, conversion):
            continue
        if conversion is not None or f"{name}.weight" not in parameters or not is_matrix(model.get_submodule(name)):
            if compat.left_out(model, tensor) or _of_a_new_head(model, name, missing=False):
                continue
            raise ValueError(_no_place(tensor, conversion, name, model))
        matrix = model.get_submodule(name)
        stored = Stored(owner, shape_of(matrix), headers, spec_of(name), getattr(matrix, "bias", None) is not None)
        layouts[name] = stored.layout(declared, version)
        model.set_submodule(name, _empty(stored, layouts[name], matrix))
        compat.untie(model, f"{name}.weight")
    layouts |= experts.place(spec_of, declared, version)
    _scale_activations(model, headers, resolve)
    compat.skip_initialization(model, layouts)
    return layouts


def _no_place(tensor: str, conversion: renaming.Conversion | None, name: str, model: Any) -> str:
    if conversion is not None:
        parent = model.get_submodule(name.rpartition(".")[0]) if name in model.state_dict() else None
        why = reason_against(parent) if parent is not None and holds_experts(parent) else None
        why = why or f"transformers rearranges this module's weight ({conversion.operations}), which packed integers do not allow"
        return f"{tensor} cannot be loaded: {why}"
    return f"{tensor} is in the checkpoint, but {type(model).__name__} has no Linear of this name to hold it"


def _empty(stored: Stored, layout: str, matrix: nn.Module) -> AwqLinear:
    """An AwqLinear on the meta device in place of `matrix`, whose parameters have the shapes and dtypes of the file."""
    n_out, n_in = stored.shape
    bias, dtype = f"{stored.owner}.bias" in stored.headers, matrix.get_parameter("weight").dtype
    awq = AwqLinear(n_in, n_out, stored.spec, bias, dtype, "meta", replaces=type(matrix))
    del awq.qzeros
    for part in ("qweight", stored.zeros_name(layout), "scales"):
        info = stored.headers[f"{stored.owner}.{part}"]
        empty = torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        awq.register_parameter(part, nn.Parameter(empty, requires_grad=False))
    return awq


def _scale_activations(model: Any, headers: Headers, resolve: renaming.Resolve) -> None:
    """Wrap the activations that have scales of their own: AutoAWQ scales so where no weight precedes a Linear (GELU)."""
    parameters = model.state_dict()
    bare = {f"{name}.scales": module for name, module in model.named_modules() if name and next(module.parameters(), None) is None}
    for tensor, info in headers.items():
        if tensor.endswith(".scales") and len(info.shape) == 1:
            target, _ = resolve(tensor, {**parameters, **bare})
            if target in bare:
                model.set_submodule(target.removesuffix(".scales"), ScaledActivation(bare[target], info.shape[0], device="meta"))


# The whole model


def match_tensors(model: Any, headers: Headers) -> dict[str, str]:
    """Parameter of the model -> its tensor in the checkpoint, by transformers' renaming.

    Raises ValueError for shapes and kinds of dtype that do not fit. What is missing or left over is known after loading, see `check_keys`.
    """
    resolve, parameters = renaming.resolver(model), model.state_dict()
    sources: dict[str, str] = {}
    for tensor, info in headers.items():
        name, conversion = resolve(tensor, parameters)
        if conversion is not None or name not in parameters:
            continue
        if name in sources:
            raise ValueError(f"{tensor} and {sources[name]} are both {name} of the model; which is meant cannot be known")
        sources[name] = tensor
        expected = parameters[name]
        if tuple(expected.shape) != info.shape and not _of_a_new_head(model, name, missing=True):
            raise ValueError(f"{tensor} in {info.file} is {info}, but the model's {name} is {list(expected.shape)}")
        if expected.is_floating_point() != info.dtype.startswith(("F", "BF")):
            raise ValueError(f"{tensor} in {info.file} is {info}, but the model's {name} is {expected.dtype}")
    return sources


def check_keys(model: Any, info: Any) -> None:
    """Raise ValueError when loading an AWQ checkpoint left something of the model random, or of the checkpoint unused.

    info: transformers' loading info. A new head on the body of another architecture, which a user asked for, is left to transformers.
    """
    problems = [f"{name} is missing from the checkpoint" for name in sorted(info.missing_keys) if not _of_a_new_head(model, name, True)]
    problems += [
        f"{name} is in the checkpoint, but {type(model).__name__} has no place for it"
        for name in sorted(info.unexpected_keys)
        if not _of_a_new_head(model, name, False)
    ]
    problems += _misshapen(info, lambda name: not _of_a_new_head(model, name, True))
    _refuse(problems, info)


def check_float_keys(model: nn.Module, info: Any) -> None:
    """Raise ValueError when something of the decoder, which is to be quantized, stayed random; the rest is left to transformers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    problems = [f"{name} is missing from the checkpoint" for name in sorted(info.missing_keys) if name.startswith(prefix)]
    _refuse(problems + _misshapen(info, lambda name: name.startswith(prefix)), info)


def _misshapen(info: Any, counts: Callable[[str], bool]) -> list[str]:
    shapes = [f"{n} is {list(found)}, expected {list(shape)}" for n, found, shape in sorted(info.mismatched_keys) if counts(n)]
    errors = [f"{n} could not be converted: {text.splitlines()[-1]}" for n, text in info.conversion_errors.items() if counts(n)]
    return shapes + errors


def _refuse(problems: list[str], info: Any) -> None:
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        for found in (info.missing_keys, info.unexpected_keys, info.mismatched_keys, info.conversion_errors):
            found.clear()  # transformers would report them as well, and raise an error of its own over this one
        raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems[:8]) + more)


def _of_a_new_head(model: Any, name: str, missing: bool) -> bool:
    """Whether a tensor is outside the body of a model whose class is not the checkpoint's: a head to be trained, or one left behind."""
    if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
        return False
    if missing and (model.base_model is model or model.get_submodule(name.rpartition(".")[0]) is model.get_output_embeddings()):
        return False
    return not name.startswith(f"{model.base_model_prefix}.")


# After loading


def finish(model: nn.Module, loading: Loading) -> None:
    """Check the values that were loaded, and bring every module into the canonical layout and its spec into line with its zero points.

    Raises ValueError for values that are not finite, for zero points that are no integers, and for weights that are not in memory
    but would have to be converted.
    """
    check_finite(model, loading.headers, loading.sources)
    for name, layout in loading.layouts.items():
        module = model.get_submodule(name)
        assert isinstance(module, PackedModule)
        if layout not in (GEMM, WIDE):
            assert isinstance(module, AwqLinear)  # experts in other layouts are refused
            _repack(name, module, layout)
        module.requires_grad_(False)  # the loader re-creates floating parameters with gradients
        if module.spec.symmetric and not module.qzeros.is_meta and not _is_symmetric(module):
            module.spec = replace(module.spec, symmetric=False)  # the zero points are what they are, whatever the config says


def check_finite(model: nn.Module, headers: Headers, sources: dict[str, str]) -> None:
    """Raise ValueError naming a floating parameter that holds NaN or infinity; of offloaded ones the file is read."""
    for name, parameter in model.named_parameters():
        tensor = sources.get(name)
        if not parameter.is_floating_point() or (parameter.is_meta and tensor is None):
            continue
        if not is_finite(_from_file(headers[tensor].file, tensor) if parameter.is_meta and tensor else parameter):
            where = f"{tensor} in {headers[tensor].file}" if tensor else name
            raise ValueError(
                f"{where} holds NaN or infinity, or values beyond {parameter.dtype}: damaged, or to be loaded in another dtype"
            )


def _from_file(file: str, tensor: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(tensor)


def _repack(name: str, module: AwqLinear, layout: str) -> None:
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"{name} is stored as {layout}, which is converted while loading, but device_map keeps it elsewhere until it runs; "
            'load with device_map="cpu", save, and load what was saved'
        )
    zeros = module._parameters.pop(ZEROS[1], None)
    width = module.spec.group_width(module.in_features)
    try:
        parts = to_gemm(layout, module.qweight.data, (module.qzeros if zeros is None else zeros).data, module.scales.data, width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for part, tensor in zip(("qweight", "qzeros", "scales"), parts, strict=True):
        setattr(module, part, nn.Parameter(tensor, requires_grad=False))


def _is_symmetric(module: PackedModule) -> bool:
    middle = torch.full((1, module.out_features), module.spec.middle_code, dtype=torch.uint8, device=module.qzeros.device)
    return bool((module.qzeros == pack(middle, module.spec.bits)).all())
