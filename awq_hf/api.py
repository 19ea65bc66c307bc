"""quantize(): the same as from_pretrained with an AwqConfig, for models in memory and for writing a finished directory."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from awq_hf.compat import class_of
from awq_hf.config import AwqConfig
from awq_hf.hf_quantizer import AwqHfQuantizer

LOCATION = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")  # options that say where

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

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
    kind = None if isinstance(model, PreTrainedModel) else check_model(model, load_options)
    config = copy.copy(config or AwqConfig())
    config.tokenizer, config.output_dir = tokenizer or config.tokenizer, target
    if isinstance(model, PreTrainedModel):
        if load_options:
            raise TypeError(f"{', '.join(load_options)}: options for loading have no use with a model that is in memory")
        quantized = _quantize_in_place(model, config)
    else:
        assert kind is not None
        quantized = kind.from_pretrained(model, quantization_config=config, **load_options)
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
    """The directory to write, refused when there is something in it or its parent cannot be written to: that is tried."""
    target = Path(output_dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not an empty directory; choose another name or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _partial(target).rmdir()
    except OSError as error:
        raise PermissionError(f"{target.parent} cannot be written to ({error.strerror}); choose another output directory") from error
    return target


def check_model(model: str | os.PathLike[str], load_options: dict[str, Any]) -> Any:
    """The class to load a model with: the one it was saved from; with trust_remote_code what AutoModelForCausalLM finds.

    Raises ValueError for a name that is neither a directory here nor a repository of the Hub, and for a model that is quantized.
    """
    name = os.fspath(model)
    if Path(name).is_dir():
        if not (Path(name) / load_options.get("subfolder", "") / "config.json").is_file():
            raise ValueError(f"{name} holds no config.json; give the directory of a model as transformers saves it")
    else:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise ValueError(f"{name} is not a directory, and cannot be a Hub id (owner/name) either") from None
    where = {key: value for key, value in load_options.items() if key in LOCATION}
    config, _ = PreTrainedConfig.get_config_dict(name, **where)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "of unknown method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"{name} is quantized already ({method}); quantize the float model that it was made from")
    return AutoModelForCausalLM if load_options.get("trust_remote_code") else class_of(config.get("architectures"))


def _partial(target: Path) -> Path:
    """A new directory beside `target`, under a temporary name."""
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))


def save(model: PreTrainedModel, target: Path, tokenizer: Any) -> None:
    """Write model and tokenizer to a temporary directory beside `target`, then rename: the result is there whole or not at all."""
    partial = _partial(target)
    try:
        partial.chmod(0o755)
        model.save_pretrained(partial)
        _save_tokenizer(tokenizer, partial)
        _copy_processor(model.name_or_path, partial)
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


def _copy_processor(source: str, directory: Path) -> None:
    """Copy what prepares images, sound and video from beside the original model; most models have none of it."""
    for name in PROCESSOR_FILES if source else ():  # a model made in memory comes from nowhere
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        if found is not None and not (directory / name).exists():
            shutil.copyfile(found, directory / name)
