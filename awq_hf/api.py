"""quantize(): the same as from_pretrained with an AwqConfig, for models in memory and for writing a finished directory."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from awq_hf.config import AwqConfig
from awq_hf.hf_quantizer import AwqHfQuantizer

logger = logging.getLogger("awq_hf")


def quantize(
    model: str | os.PathLike[str] | PreTrainedModel,
    config: AwqConfig | None = None,
    tokenizer: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    **load_options: Any,
) -> PreTrainedModel:
    """Quantize a model and return it; with `output_dir`, also write weights, config, tokenizer and report.json there.

    model: a directory, a Hub id, or a float model in memory, which is quantized in place. tokenizer: for the calibration
    text, where the one beside the model is not to be used. load_options go to from_pretrained (dtype, device_map, revision, ...).
    Raises ValueError for what cannot be quantized, and FileExistsError when output_dir exists; both before any work.
    """
    target = None if output_dir is None else check_output(output_dir)
    config = config or AwqConfig()
    if tokenizer is not None:
        config = copy.copy(config)
        config.tokenizer = tokenizer
    if isinstance(model, PreTrainedModel):
        if load_options:
            raise TypeError(f"{', '.join(load_options)}: options for loading have no use with a model that is in memory")
        quantized = _quantize_in_place(model, config)
    else:
        quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, **load_options)
    if target is not None:
        save(quantized, target, tokenizer or config.tokenizer or quantized.name_or_path)
    return quantized


def _quantize_in_place(model: PreTrainedModel, config: AwqConfig) -> PreTrainedModel:
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantized already; quantize the float model, or call model.dequantize() first")
    quantizer = AwqHfQuantizer(config, pre_quantized=False)
    quantizer.prepare(model)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = quantizer
    try:
        quantizer.postprocess_model(model)
    except Exception:
        quantizer.remove_quantization_config(model)
        raise
    return model


def check_output(output_dir: str | os.PathLike[str]) -> Path:
    """The directory to write, refused when there is something in it or its parent cannot be written to."""
    target = Path(output_dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not an empty directory; choose another name or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{target.parent} cannot be written to; choose another output directory")
    return target


def save(model: PreTrainedModel, target: Path, tokenizer: Any) -> None:
    """Write model and tokenizer to a temporary directory beside `target`, then rename: the result is there whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial.chmod(0o755)
        model.save_pretrained(partial)
        _save_tokenizer(tokenizer, partial)
        if target.exists():
            target.rmdir()  # empty, as check_output saw
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """A model that was calibrated on tokens may have no tokenizer beside it: that is said, and no reason to throw the work away."""
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            logger.warning("no tokenizer was written: none was found at %r (%s)", str(tokenizer), str(error).splitlines()[0])
            return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(directory)
