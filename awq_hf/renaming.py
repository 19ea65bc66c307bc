"""How transformers' loader brings the names and tensors of a checkpoint into the model's, and back when it saves: patterns that rename, and
experts that are fused. What is not its documented interface, like everything in compat.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

PACKED = ("qweight", "qzeros", "scales")


class Conversion(NamedTuple):
    """What the loader does to a tensor on its way. operations: in transformers' words; parts: the names, with * for the expert's number,
    of matrices that it puts on top of each other; part: which of them the tensor is. parts is empty unless the operations do just that.
    """

    operations: str
    parts: tuple[str, ...]
    part: int

    @classmethod
    def of(cls, converter: WeightConverter, part: int) -> Conversion:
        return cls(repr(converter.operations), _stacked(converter), part)


_STACKS = ((MergeModulelist, 0), (Concatenate, 1))  # [out, in] of every expert -> [experts, out, in] -> the parts' outputs joined


def _stacked(converter: WeightConverter) -> tuple[str, ...]:
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    done = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    joins = done == [*_STACKS[: 1 if len(sources) == 1 else 2]] and len(targets) == 1
    return tuple(sources) if joins and all(source.endswith(".weight") and source.count("*") == 1 for source in sources) else ()


def packed_conversions(conversions: Iterable[Any]) -> list[Any]:
    """For each conversion that fuses experts, what does the same with their qweight, qzeros and scales, whose outputs come last.

    They belong behind the others: reverted, they come first, and leave names that the others would match as well.
    """
    found = []
    for converter in conversions:
        if isinstance(converter, WeightConverter) and (sources := _stacked(converter)):
            (target,) = converter._original_target_patterns
            operations = [_Merge(dim=0), Concatenate(dim=2)][: 1 if len(sources) == 1 else 2]
            for part in PACKED:
                renamed = [f"{source.removesuffix('.weight')}.{part}" for source in sources]
                packed = WeightConverter(renamed, [f"{target}.{part}"], operations=list(operations), force_cpu=converter.force_cpu)
                packed.scope_prefix, packed.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
                found.append(packed)
    return found


class _Merge(MergeModulelist):
    """Its inverse keeps the group that is the only one, [experts, 1, out]: before 5.23, transformers drops every dimension of 1."""

    @property
    def reverse_op(self) -> SplitModulelist:
        return _Split(self.dim)


class _Split(SplitModulelist):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        given = next(iter(input_dict.values()))
        shape = (given[0] if isinstance(given, list) else given).shape[1:]
        return {name: part.reshape(shape) for name, part in super().convert(input_dict, *args, **kwargs).items()}


@contextmanager
def conversions_kept(model: Any) -> Iterator[None]:
    """Saving reverts what loaded the checkpoint: not what a part of it was loaded with since, and also when the model is no longer called
    quantized, at which transformers forgets it from 5.24 on."""
    noted = {name: value for name, value in vars(model).items() if name == "_weight_conversions"}
    try:
        yield
    finally:
        vars(model).pop("_weight_conversions", None)
        vars(model).update(noted)


def save_packed_experts(model: Any) -> None:
    """Have the experts of a model that was just quantized saved under the names that they have one by one."""
    own, used = get_model_conversion_mapping(model, add_legacy=False), _conversions(model)
    if not any(map(_is_fusing, used)):  # the checkpoint held the experts fused, and under other names
        prefixes = [conversion for conversion in used if isinstance(conversion, PrefixChange)]
        used = prefixes + [conversion for conversion in own if not isinstance(conversion, PrefixChange)]
    model._weight_conversions = [*used, *packed_conversions(own)]


def save_float_experts(model: Any) -> None:
    """The inverse: of a model that was dequantized."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        packed = [conversion for conversion in used if _is_packed(conversion)]
        fusing = [conversion for conversion in get_model_conversion_mapping(model, add_legacy=False) if _is_fusing(conversion)]
        kept = [conversion for conversion in used if not _is_packed(conversion) and not _is_fusing(conversion)]
        model._weight_conversions = kept + (fusing if packed else [conversion for conversion in used if _is_fusing(conversion)])


def _is_packed(conversion: Any) -> bool:
    return any(pattern.endswith(tuple(f".{part}" for part in PACKED)) for pattern in conversion._original_target_patterns)


def _is_fusing(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and bool(_stacked(conversion))


def _conversions(model: Any) -> list[Any]:
    """What saving reverts: the conversions that loading used, or those that it would."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    return [conversion for conversion in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(conversion, PrefixChange)]


def expert_parts(model: Any, modules: Iterable[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """For modules of experts: parameter -> the last parts of the names of the matrices that the loader fuses into it ("gate_proj",
    "up_proj"), in order. A parameter that checkpoints hold as it is is left out.
    """
    resolve, known = resolver(model), model.state_dict()
    stacked = [_stacked(conversion) for conversion in get_model_conversion_mapping(model) if isinstance(conversion, WeightConverter)]
    found: dict[str, dict[str, tuple[str, ...]]] = {module: {} for module in modules}
    for module, parameters in found.items():
        for leaves in {tuple(map(last_parts, sources)) for sources in stacked if sources}:
            name, conversion = resolve(f"{module}.0.{leaves[0]}.weight", known)
            if conversion is not None and tuple(map(last_parts, conversion.parts)) == leaves and name.rpartition(".")[0] == module:
                parameters[name.rpartition(".")[2]] = leaves
    return found


def last_parts(pattern: str) -> str:
    """What is behind the expert's number in a matrix's name."""
    return pattern.rpartition("*.")[2].removesuffix(".weight")


def name_on_disk(model: Any, name: str) -> str:
    """The name that a module is saved under which no operation changes."""
    for conversion in reversed(_conversions(model)):
        if isinstance(conversion, WeightRenaming):
            name, _ = conversion.reverse_transform().rename_source_key(f"{name}.weight")
            name = name.removesuffix(".weight")
    return name


def quantized_on_disk(model: Any) -> list[str]:
    """The names that quantized modules are saved under."""
    names = {name: torch.empty(1, 1, 2, device="meta") for name in model.state_dict() if name.endswith(".qweight")}
    return [name.removesuffix(".qweight") for name in revert_weight_conversion(model, names)]


Resolve = Callable[[str, Mapping[str, Any]], tuple[str, Conversion | None]]


def resolver(model: Any, transforms: Sequence[Any] | None = None) -> Resolve:
    """resolve(name in a checkpoint, parameters of the model by name) -> (the model's name, what converts it on the way, or None).

    This is the loader's own renaming: the architecture's patterns, and the base model's prefix added or dropped.
    transforms: what the loader applied; None: the architecture's, which only a key_mapping given to from_pretrained adds to.
    """
    transforms = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    conversions = {
        pattern: Conversion.of(converter, part) for converter in converters for part, pattern in enumerate(converter.source_patterns)
    }

    def resolve(name: str, known: Mapping[str, Any]) -> tuple[str, Conversion | None]:
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if found not in known and name in known:
            found, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        return found, None if pattern is None else conversions[pattern]

    return resolve


def state_dict_on_disk(model: Any) -> dict[str, Tensor]:
    """The tensors that save_pretrained would write, under the names of the checkpoint: tied ones once, the loader's renaming reverted."""
    ignored = model._keys_to_ignore_on_save or ()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model))
