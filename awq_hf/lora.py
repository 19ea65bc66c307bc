"""LoRA on quantized Linears: what PEFT puts around an AwqLinear. Imported where PEFT is, see compat.teach_peft."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from awq_hf.linear import AwqLinear

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
        tuners._maybe_include_all_linear_layers = _all_linear(tuners._maybe_include_all_linear_layers)  # type: ignore[attr-defined]


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
