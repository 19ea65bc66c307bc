"""LoRA on quantized Linears: what PEFT puts around an AwqLinear. Imported where PEFT is, see compat.teach_peft."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers import PreTrainedModel

from awq_hf.experts import FUSED, AwqExperts
from awq_hf.linear import AwqLinear, packed_modules

logger = logging.getLogger("awq_hf")

WITHOUT_WEIGHT = (True, False, "gaussian", "eva")  # values of init_lora_weights that do not read the weight


class AwqLoraLinear(Linear):
    """PEFT's own layer, which calls what is below it; it is merged when that is dense."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        config = options["config"]
        if config.use_dora or config.init_lora_weights not in WITHOUT_WEIGHT:
            option = "use_dora=True" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
            raise ValueError(
                f"{option} computes with the weight itself, which an AwqLinear holds as packed integers; leave it out, or train on "
                "model.dequantize()"
            )
        super().__init__(base_layer, adapter_name, **options)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, AwqLinear)
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, AwqLinear):
            raise ValueError(
                "an adapter cannot be added to packed integers: they would have to be rounded again, which loses most of it. Call "
                "model.dequantize() first, then merge; what comes out is a float model, which can be quantized anew"
            )
        self.fan_in_fan_out = not isinstance(base, nn.Linear)  # but a Conv1D, whose weight is [in, out]
        super().merge(safe_merge, adapter_names)


def teach(lora: ModuleType, tuners: ModuleType) -> None:
    """Replace PEFT's functions that look for layers by ones that know AwqLinear too. lora: peft.tuners.lora.model; tuners:
    peft.tuners.tuners_utils. What was taught already stays as it is.
    """
    if lora.dispatch_awq.__module__ != __name__:
        lora.dispatch_awq = _dispatch(lora.dispatch_awq)  # type: ignore[attr-defined]
        all_linear = _all_linear(tuners._maybe_include_all_linear_layers)
        for module in (tuners, conversion):  # the latter, which sees mixtures of experts first, has imported it by name
            setattr(module, "_maybe_include_all_linear_layers", all_linear)  # noqa: B010
        lora.LoraModel._prepare_model = _prepare(lora.LoraModel._prepare_model)


def _dispatch(others: Callable[..., nn.Module | None]) -> Callable[..., nn.Module | None]:
    """The layer to put around an AWQ layer, None around what is no such."""

    def dispatch_awq(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, AwqLinear):
            return AwqLoraLinear(target, adapter_name, config=config, **options)
        return others(target, adapter_name, config=config, **options)

    return dispatch_awq


def _all_linear(others: Callable[[Any, nn.Module], Any]) -> Callable[[Any, nn.Module], Any]:
    """What target_modules="all-linear" stands for: all but the head."""

    def include_all(config: Any, model: nn.Module) -> Any:
        asked = str(getattr(config, "target_modules", None)).lower() == "all-linear"
        found = others(config, model)
        if asked:
            head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
            found.target_modules |= {n for n, module in model.named_modules() if isinstance(module, AwqLinear) and module is not head}
        return found

    return include_all


def _prepare(others: Callable[[Any, Any, nn.Module], None]) -> Callable[[Any, Any, nn.Module], None]:
    """What PEFT does to a model before it puts an adapter in: where one would be wrong there, that is said first."""

    def prepare_model(self: Any, config: Any, model: nn.Module) -> None:
        if packed := packed_modules(model):
            for module in packed.values():
                module.undo_casts()  # prepare_model_for_kbit_training casts every parameter that is not of some quantizers it knows
            _leave_out_experts(config, model)
            _compare_bases(config, model)
        others(self, config, model)

    return prepare_model


def _leave_out_experts(config: Any, model: nn.Module) -> None:
    """PEFT names the experts' matrices as parameters of their layer, and looks for those: packed ones have none, and get no adapter.

    Raises ValueError for an adapter that was loaded and has weights for them.
    """
    packed = [f"{name}.{part}" for name, module in model.named_modules() if isinstance(module, AwqExperts) for part in FUSED]
    targets = set(getattr(config, "target_parameters", None) or ())
    lost = {target for target in targets if any(_ends(name, target) for name in packed)}
    if not lost:
        return
    named = f"{', '.join(sorted(lost))}: quantized experts are packed integers, which PEFT can put no adapter around"
    if config.inference_mode:  # it is set of what is loaded to be used
        raise ValueError(
            f"{named}, and this adapter has weights for them. Merge it into the float model before that is quantized, or load it onto "
            "model.dequantize() if it was trained on that"
        )
    logger.warning("%s; they are left out, and the other layers are trained", named)
    others = {name for name, _ in model.named_parameters() if any(_ends(name, target) for target in lost)}
    config.target_parameters = (targets - lost) | others


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _compare_bases(config: Any, model: nn.Module) -> None:
    """Warn of an adapter that was trained on other weights, as far as names tell: smoothing scales change what layers get and put out."""
    trained_on, here = getattr(config, "base_model_name_or_path", None), getattr(model, "name_or_path", None)
    if not trained_on or not here:
        return
    same = trained_on == here or os.path.realpath(trained_on) == os.path.realpath(here)
    if same and not (config.inference_mode and _smoothed_here(model)):
        return
    logger.warning(
        "the adapter names %r as what it was trained on, and this is %s: if those were float weights, it is wrong here, because smoothing "
        "scales that were folded into the quantized model change what its layers get. Merge it before quantizing, quantize with "
        "AwqConfig(scale=False), or train it on the quantized model",
        str(trained_on),
        "that, quantized as it was loaded" if same else f"{str(here)!r}, quantized",
    )


def _smoothed_here(model: nn.Module) -> bool:
    """Whether the model was quantized in this process, under the name of the float one, and scales were folded into it."""
    quantizer, report = getattr(model, "hf_quantizer", None), getattr(model, "awq_report", None)
    return not getattr(quantizer, "pre_quantized", True) and any(layer.fold and layer.alpha for layer in getattr(report, "layers", ()))
