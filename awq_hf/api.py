"""quantize(): the same as from_pretrained with an AwqConfig, for models in memory and for writing a finished directory; export()."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from awq_hf.beside import load_beside, places_beside
from awq_hf.classes import check_code, class_for
from awq_hf.compat import check_is_model, check_not_split, gguf_file_of, progress_bar
from awq_hf.config import AwqConfig
from awq_hf.exporters.hub_errors import downloading
from awq_hf.exporters.opening import open_checkpoint
from awq_hf.exporters.table import GGUF, exporter
from awq_hf.hf_quantizer import AwqHfQuantizer
from awq_hf.output import check_output, whole
from awq_hf.recipe_file import Run, write_recipe
from awq_hf.unfinished import check_whole
from awq_hf.wording import no_model

LOCATION = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")  # options that say where

HUB_LOCATION = ("revision", "cache_dir", "token", "local_files_only")  # of them, what is known of tensors in files

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

logger = logging.getLogger("awq_hf")


def quantize(
    model: str | os.PathLike[str] | PreTrainedModel,
    config: AwqConfig | None = None,
    tokenizer: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **load_options: Any,
) -> PreTrainedModel:
    """Quantize a model and return it; with `output_dir`, also write weights, config, tokenizer, report.json and recipe.yaml there.

    model: a directory, a Hub id, or a float model in memory, also one that came out of a GGUF file, which is quantized in place.
    tokenizer: for the calibration text, where the one beside the model is not to be used. resume: keep finished blocks in
    `output_dir`.progress until the result is written, and go on from those that an interrupted run with resume left there; the result is
    the same to the last bit. load_options go to from_pretrained (dtype, device_map, revision, ...).
    Raises ValueError for what cannot be quantized, and FileExistsError when output_dir exists; both before any work.
    """
    check_is_model(model)
    target = None if output_dir is None else check_output(output_dir)
    if resume and target is None:
        raise ValueError("resume keeps finished blocks beside the output; give output_dir")
    kind = None if isinstance(model, PreTrainedModel) else check_model(model, load_options)
    config = AwqConfig.coerce(config or AwqConfig()).to_quantize()
    config.tokenizer, config.output_dir = tokenizer or config.tokenizer, target
    config.trust_remote_code = bool(load_options.get("trust_remote_code"))
    config.keep_in = target.with_name(f"{target.name}.progress") if resume and target is not None else None
    if isinstance(model, PreTrainedModel):
        if load_options:
            raise TypeError(f"{', '.join(load_options)}: options for loading have no use with a model that is in memory")
        quantized = _quantize_in_place(model, config)
    else:
        assert kind is not None
        with downloading(os.fspath(model)):
            quantized = kind.from_pretrained(model, quantization_config=config, **load_options)
    if target is not None:
        run, notes = _run_of(load_options)
        about = quantized.awq_report.base_model
        beside = tokenizer or config.tokenizer or quantized.name_or_path
        save(quantized, target, beside, lambda directory: write_recipe(directory, about, config, run, notes))
    if config.keep_in is not None:
        shutil.rmtree(config.keep_in)
    return quantized


def _run_of(load_options: dict[str, Any]) -> tuple[Run, tuple[str, ...]]:
    """Options for loading, as a recipe has them, and a note on those that it has not."""
    dtype, device = load_options.get("dtype") or load_options.get("torch_dtype") or "auto", load_options.get("device_map")
    run = Run(
        dtype=str(dtype).removeprefix("torch."),
        device=f"cuda:{device}" if isinstance(device, int) else device,
        trust_remote_code=bool(load_options.get("trust_remote_code")),
    )
    rest = load_options.keys() - {"revision", "dtype", "torch_dtype", "device_map", "token", "trust_remote_code"}
    if not isinstance(run.device, str | None):
        run, rest = replace(run, device=None), rest | {"device_map"}
    return run, (f"Options for loading were given that a recipe does not hold: {', '.join(sorted(rest))}",) if rest else ()


def export(
    model: str | os.PathLike[str] | PreTrainedModel, target: str, path: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
) -> Path:
    """Write a model in another program's format, and return where. The integers are those of the checkpoint in every target.

    model: a quantized or float model in memory, or a directory or Hub id of one: our checkpoints, AWQ checkpoints of other programs,
    float ones. Of files, one tensor is in memory at a time, and what a shard of the output holds.
    target: "awq", "compressed-tensors", "gptq", "dense" or "gguf". path: the directory to write, for gguf also a file; overwrite: replace
    what is there. A float model becomes GGUF by a search of its own, see `to_gguf.to_gguf`, which also lists gguf's options.
    options: max_shard_size ("4GB"); of dense, dtype (float16, bfloat16, float32, auto); revision, cache_dir, token, local_files_only
    for the Hub. Raises ValueError for what the target cannot hold, TypeError for options it does not have, and FileExistsError; before
    anything is written, which is done whole or not at all.
    """
    location = {key: options.pop(key) for key in HUB_LOCATION if key in options}
    if target == GGUF:
        from awq_hf.to_gguf import to_gguf  # not above: most programs never need the gguf package

        return to_gguf(model, path, overwrite=overwrite, location=location, **options).files[0]
    write = exporter(target, options)
    place = check_output(path, overwrite)
    with downloading(str(model) if isinstance(model, (str, os.PathLike)) else ""):
        checkpoint = open_checkpoint(model, **location)
    if checkpoint.directory is not None and checkpoint.directory.resolve().is_relative_to(place):
        raise ValueError(f"{path} is where the model is read from, which cannot be replaced by an export of it; choose another name")
    with whole(place) as partial:
        write(checkpoint, partial, progress_bar, **options)
    return place


def _quantize_in_place(model: PreTrainedModel, config: AwqConfig) -> PreTrainedModel:
    check_whole(model)
    gguf_file = gguf_file_of(model)
    if gguf_file is None and getattr(model, "is_quantized", False):
        raise ValueError("the model is quantized already; quantize the float model, or call model.dequantize() first")
    check_not_split(model)
    quantizer = AwqHfQuantizer(config, pre_quantized=False)
    quantizer.prepare(model)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = quantizer
    try:
        quantizer.postprocess_model(model)
    except BaseException:  # Ctrl-C as well
        quantizer.remove_quantization_config(model)
        raise
    if gguf_file is not None:
        note = f"the float weights came out of {gguf_file}, whose own rounding they keep: the original model would give a better result"
        model.awq_report.notes.append(note)
        logger.warning("%s", note)
    return model


def check_model(model: str | os.PathLike[str], load_options: dict[str, Any]) -> Any:
    """The class to load a model with: the one it was saved from; with trust_remote_code that of its own code, if it has some.

    Raises ValueError for a name that is neither a directory here nor a repository of the Hub, for a model that is quantized, and for one
    whose code comes with it without trust_remote_code.
    """
    name = os.fspath(model)
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; give the directory that holds config.json and *.safetensors, or a Hub id")
    if Path(name).is_dir():
        if not (Path(name) / load_options.get("subfolder", "") / "config.json").is_file():
            raise ValueError(no_model(name, Path(name, load_options.get("subfolder", ""))))
    else:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise ValueError(f"{name} is not a directory, and cannot be a Hub id (owner/name) either") from None
    where = {key: value for key, value in load_options.items() if key in LOCATION}
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
    except OSError as error:
        if name in str(error):
            raise
        raise OSError(f"{name} is no directory here, and as an id of the Hub: {error}") from error
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "of unknown method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"{name} is quantized already ({method}); quantize the float model that it was made from")
    trusted = bool(load_options.get("trust_remote_code"))
    check_code(config, name, trusted)
    return class_for(config, trusted)


def save(model: PreTrainedModel, target: Path, tokenizer: Any, add: Callable[[Path], object] = lambda _: None, **options: Any) -> None:
    """Write model, tokenizer and processor to `target`, and what `add` writes into that directory, whole or not at all.

    options: of save_pretrained.
    """
    check_whole(model)
    with whole(target) as partial:
        partial.mkdir()
        model.save_pretrained(partial, **options)
        _save_tokenizer(model, tokenizer, partial)
        _copy_processor(model, partial)
        add(partial)


def _save_tokenizer(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """A model that was calibrated on tokens may have no tokenizer beside it: that is said, and no reason to throw the work away."""
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            tokenizer = load_beside(AutoTokenizer.from_pretrained, model, tokenizer)
        except (OSError, ValueError) as error:
            logger.warning("no tokenizer was written: none was found at %r (%s)", str(tokenizer), str(error).splitlines()[0])
            return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(directory)


def _copy_processor(model: PreTrainedModel, directory: Path) -> None:
    """Copy what prepares images, sound and video from beside the original model; most models have none of it."""
    quiet = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    source = model.name_or_path
    places = places_beside(model, source) if source else []  # a model made in memory comes from nowhere
    for name in PROCESSOR_FILES:
        found = next(filter(None, (cached_file(source, name, **where, **quiet) for where in places)), None)
        if found is not None and not (directory / name).exists():
            shutil.copyfile(found, directory / name)
