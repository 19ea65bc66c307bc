"""AwqHfQuantizer: the hooks through which from_pretrained quantizes on the spot or loads what is quantized."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import AutoTokenizer

from awq_hf import base_model, compat, renaming, unfinished
from awq_hf.beside import load_beside, remember_place
from awq_hf.calibration.checks import check_windows
from awq_hf.calibration.data import Windows, load_windows
from awq_hf.calibration.tokens import is_tokens
from awq_hf.checkpoint import Loading, begin, check_float_keys, finish
from awq_hf.classes import positions_of
from awq_hf.config import AwqConfig
from awq_hf.experts import AwqExperts, holds_experts
from awq_hf.exporters.dense import cast, cast_unsaved, make_dense
from awq_hf.exporters.rope_keys import add_older_rope_keys
from awq_hf.headers import read_headers
from awq_hf.linear import ScaledActivation, packed_modules
from awq_hf.output import follow_umask
from awq_hf.pipeline import quantize_model
from awq_hf.preflight import check_room, make_plan, stored_bytes
from awq_hf.prepare import prepare_kernels
from awq_hf.recipe import Recipe
from awq_hf.serving import serving_notes
from awq_hf.skip_list import caveats, skip_list
from awq_hf.streaming import LeavesBlocks
from awq_hf.wording import option

logger = logging.getLogger("awq_hf")


class AwqHfQuantizer(LeavesBlocks):
    """Order of the hooks in from_pretrained: before (empty model on the meta device), weights loaded, after."""

    quantization_config: AwqConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        config = AwqConfig.coerce(quantization_config)
        super().__init__(config if kwargs.get("pre_quantized", True) else config.to_quantize(), **kwargs)
        self.windows: Windows | None = None
        self.recipe: Recipe | None = None
        self.loading: Loading | None = None  # of a quantized checkpoint, between the two hooks

    def update_device_map(self, device_map: Any) -> Any:
        """Of a model that is to be quantized, a map of one device."""
        if self.pre_quantized:
            return device_map
        placement = self.place(device_map)
        if placement is None:
            raise ValueError(
                f"{option('device_map')} spreads the model over {sorted({str(device) for device in device_map.values()})}; it is quantized "
                f"on one device: use {option('device_map', 'cpu')} or {option('device_map', 'cuda:0')}"
            )
        return placement

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_kwargs: Any) -> None:
        config, files = self.quantization_config, checkpoint_files or []
        compat.check_not_split(model)
        remember_place(model, files, config.trust_remote_code)
        if self.pre_quantized:
            self.loading = begin(model, files, config.spec_of, config.version)
            return
        for name in read_headers((file for file in files if file.endswith(".safetensors")), model.config.name_or_path):
            if name.endswith(".qweight"):
                raise ValueError(f"{name}: the checkpoint is quantized already, which its config.json should say in quantization_config")
        self.prepare(model)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

        def loaded(info: Any) -> None:
            compat.note_other_shapes(model, info, shapes)
            check_float_keys(model, info)

        compat.when_loaded(model, loaded)
        self.leave_blocks(model, files)

    def prepare(self, model: Any) -> None:
        """Everything that can fail without the weights: shapes, calibration data."""
        config = self.quantization_config
        recipe = self.recipe = config.recipe(positions_of(model.config))
        plan = make_plan(model, recipe)
        if config.output_dir is not None:
            check_room(config.output_dir.parent, stored_bytes(model, plan))
        self.windows = calibration_windows(model, config, recipe)

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        compat.teach_peft()
        if self.pre_quantized:
            self._finish_loading(model)
            prepare_kernels(model)
            compat.after_saving(model, _complete, _push)
            return model
        assert self.windows is not None and self.recipe is not None
        keep_in = self.quantization_config.keep_in
        report = quantize_model(model, self.recipe, self.windows, compat.progress_bar, keep_in, self.source)
        self.source = None
        report.base_model = base_model.describe(model.config.name_or_path or "", getattr(model.config, "_commit_hash", None))
        quantized, left = [layer.name for layer in report.layers], list(report.left_in_float)
        if any(isinstance(module, AwqExperts) for module in model.modules()):
            renaming.save_packed_experts(model)
        if any(isinstance(module, AwqExperts) or holds_experts(module) for module in model.modules()):
            quantized, left = quantized + renaming.quantized_on_disk(model), left + [renaming.name_on_disk(model, name) for name in left]
        entries = skip_list(left, quantized)
        self.quantization_config.modules_to_not_convert = entries or None
        report.notes += caveats(entries, report.left_in_float, quantized) + serving_notes(packed_modules(model))
        model.awq_report = report
        prepare_kernels(model)
        compat.after_saving(model, _complete, _push)
        unfinished.end(model)
        return model

    def _finish_loading(self, model: Any) -> None:
        assert self.loading is not None
        finish(model, self.loading)
        self.quantization_config.describe(model.get_submodule(name).spec for name in self.loading.layouts)
        self.loading = None

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """How the loader brings tensors into parameters: with quantized experts, which come one by one and are fused."""
        conversions = super().update_weight_conversions(weight_conversions, *model)
        return [*conversions, *renaming.packed_conversions(conversions)] if self.pre_quantized else conversions

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """A plain model. dtype: of the whole model, so that it runs, but for what its class keeps in float32; None: the one that it has."""
        if offloaded := next((name for name, parameter in model.named_parameters() if parameter.is_meta), None):
            raise ValueError(f'{offloaded} is offloaded; load the model with device_map="cpu", or export its directory ("dense")')
        # The base class takes config.dtype, which is a name after saving, and not the model's when it was cast in memory.
        old = model.get_input_embeddings().weight.dtype
        new = getattr(torch, dtype) if isinstance(dtype, str) else dtype or old
        model = super().dequantize(model, dtype=new)
        cast(model, old, new, () if dtype is None else compat.kept_in_float32(model, new))
        if new != old:
            cast_unsaved(model, new)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, ScaledActivation):
                raise ValueError(f"{name} divides its outputs by scales of its own, which a plain {type(model).__name__} has no place for")
        make_dense(model, dtype)
        compat.forget_after_saving(model)
        renaming.save_float_experts(model)
        return model

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on it: gradients reach the inputs of quantized Linears, not their codes


def calibration_windows(model: Any, config: AwqConfig, recipe: Recipe) -> Windows:
    """The windows that `config` asks for, with a tokenizer from beside the model. Raises ValueError for what calibration cannot use."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if embedding is None or embedding.ndim != 2:
        raise ValueError(f"{type(model).__name__} has no embedding of tokens: only models that take text can be calibrated")
    with torch.device("cpu"):  # from_pretrained builds its model under the meta device
        tokenizer = _tokenizer(model, config)
        windows = load_windows(config.calibration, tokenizer, recipe.seq_len, samples=recipe.samples, seed=recipe.seed)
        windows = check_windows(windows, recipe.samples * recipe.seq_len, tokenizer, len(embedding))
        return windows.sample(recipe.samples, recipe.seed)


def _tokenizer(model: Any, config: AwqConfig) -> Any:
    """A tokenizer, or a processor that has one; None where the calibration is tokens already."""
    if is_tokens(config.calibration):
        return None
    source = config.tokenizer or model.config.name_or_path
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        return load_beside(AutoTokenizer.from_pretrained, model, source)
    except (OSError, ValueError) as error:
        processor = _processor(model, source)
        if processor is None:
            missing = "the model was made in memory, so that no tokenizer to calibrate with lies beside it; "
            if source:
                said = str(error).splitlines()[0]
                missing = f"no tokenizer was found at {str(source)!r} to calibrate with ({said}); copy the original's there, or "
            raise ValueError(f"{missing}pass AwqConfig(tokenizer=...), or calibration as a list of token tensors") from error
        return processor


def _complete(model: Any, directory: str) -> None:
    """What belongs into a saved directory beside what transformers writes."""
    add_older_rope_keys(directory)
    follow_umask(Path(directory).glob("*.safetensors"))
    if hasattr(model, "awq_report"):
        model.awq_report.save(directory)


def _push(model: Any, repo_id: str, tags: Any = None, **options: Any) -> CommitInfo:
    """model.push_to_hub: the same as awq_hf.push_to_hub, with what transformers returns."""
    import awq_hf  # not above: the whole package is needed, which this is a part of

    if tags:
        logger.warning("tags %s were not added: the model card brings its own; write them into README.md", tags)
    done = awq_hf.push_to_hub(model, repo_id, **options)
    message, description = options.get("commit_message") or "", options.get("commit_description") or ""
    return CommitInfo(done.commit_url or "", message, description, done.commit or "", pr_url=done.pull_request)


def _processor(model: Any, source: str | os.PathLike[str]) -> Any:
    """The processor of a model for images or sound, if there is one and it has a tokenizer."""
    from transformers import AutoProcessor  # not above: it imports the table of all processors

    try:
        processor = load_beside(AutoProcessor.from_pretrained, model, source)
    except (OSError, ValueError):
        return None
    return processor if hasattr(processor, "tokenizer") else None
