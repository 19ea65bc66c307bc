"""evaluation.json: how far what lies in a directory is from the original, and how far plain rounding would have been."""

from __future__ import annotations

import copy
import functools
import gc
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoTokenizer

from awq_hf import base_model
from awq_hf.affine import choose_grid, fake_quantize
from awq_hf.block_by_block import BlockByBlock
from awq_hf.calibration.data import load_windows
from awq_hf.classes import class_for, loaded_whole, positions_of, read_config
from awq_hf.compat import Conv1D
from awq_hf.evaluate import Texts, check_counts, evaluate_many
from awq_hf.evaluation_table import ORIGINAL, OURS, PLAIN
from awq_hf.linear import PackedModule, packed_modules
from awq_hf.machine import machine, versions
from awq_hf.output import check_writable, write_whole
from awq_hf.spec import QuantSpec
from awq_hf.streaming import load_float

EVALUATION_NAME = "evaluation.json"
SAME_CODES = ("compressed-tensors", "gptq", "dense")  # exports that hold the checkpoint's weights: its row is theirs
MAX_TOKENS = 2**16  # of the text: more changes the third digit
SEQ_LEN = 512

logger = logging.getLogger("awq_hf")


def measure(
    directory: str | os.PathLike[str],
    original: str | os.PathLike[str],
    texts: Texts = None,
    *,
    location: Mapping[str, Any] | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    seq_len: int | None = None,
    max_tokens: int | None = MAX_TOKENS,
    batch_size: int | None = None,
    progress: Any = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure what `awq-hf quantize` wrote into `directory` against the original; write evaluation.json there, and return its content.

    original: a directory or a Hub id, location: its revision and so on. texts: what calibration did not see; None: the text that comes
    with the package. Rows: the original; plain rounding of its weights, computed here, of just the Linears that were quantized, as they
    are stored; the checkpoint; each GGUF file, as transformers reads it, in float32 (another file is left out, and a warning says why).
    Of a directory with GGUF files alone: the original and these.
    trust_remote_code: run code that comes with the original, and so with the checkpoint.
    In memory are hidden states of the original, a block of it, of its plain rounding or of a GGUF file (where the original's files are
    safetensors, and all goes to one device), or the checkpoint. Raises ValueError as `evaluate` does, before a model is loaded.
    """
    folder, where = Path(directory), dict(location or {})
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise ValueError(f"{directory} holds no model: neither config.json nor a GGUF file is there")
    check_counts(batch_size=batch_size, max_tokens=max_tokens)
    check_writable(folder)
    config = read_config(original, trust_remote_code, **where)
    tokenizer = AutoTokenizer.from_pretrained(original, trust_remote_code=trust_remote_code, **where)
    options = dict(dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    floats = _Original(kind := class_for(config, trust_remote_code), original, where, options)
    if not getattr(kind, "can_generate", lambda: True)():
        raise ValueError(f"{original} is a {kind.__name__}, which does not predict the next token: it cannot be measured so")
    width = seq_len or min(SEQ_LEN, positions_of(config) or SEQ_LEN)

    load_windows(texts, tokenizer, width, role="evaluation")  # what is wrong with it is said before a model is loaded

    def row(name: str, source: Any) -> dict[str, Any]:
        return evaluate_many({name: source}, reference, texts, tokenizer, width, max_tokens, batch_size, progress)[name].to_dict()

    found = _Found()
    reference = floats.load()
    float_model = reference.model
    about = dict(runtime="transformers")
    size, bits = weights_bytes(original, where), bits_per_weight(float_model)
    rows = [{"name": ORIGINAL, "files": [], **about, "weights_bytes": size, "bits_per_weight": bits, **row(ORIGINAL, reference)}]
    if (folder / "config.json").is_file():
        ours = row(OURS, lambda: found.keep(kind.from_pretrained(folder, **options)))
        plain = row(PLAIN, lambda: floats.load(functools.partial(round_plainly, found.specs)))
        files = [".", *(name for name in SAME_CODES if (folder / name / "config.json").is_file())]
        about_both = dict(**about, bits_per_weight=found.bits)
        rows.append({"name": PLAIN, "files": [], **about_both, "weights_bytes": None, **plain})
        rows.append({"name": OURS, "files": files, **about_both, "weights_bytes": weights_bytes(folder), **ours})
    for file in sorted(folder.glob("*.gguf")):
        source = functools.partial(floats.load_gguf, file, reference)
        figures = _of_gguf(functools.partial(row, file.name, source), file, float_model)
        if figures is not None:
            rows.append({"name": file.name, "files": [file.name], **about, **figures})
    if len(rows) == 1:
        raise ValueError(f"nothing in {directory} could be measured: it holds GGUF files alone, and transformers reads none of them")
    content = _content(original, float_model, size, rows)
    write_whole(folder / EVALUATION_NAME, f"{json.dumps(content, indent=1)}\n".encode())
    return content


def _content(original: str | os.PathLike[str], model: Any, size: int | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What evaluation.json says of the original, which `model` is and `size` the bytes of, and of the circumstances."""
    base = base_model.identify(original, getattr(model.config, "_commit_hash", None))
    return {
        "reference": {"name": base["name"], "revision": base["revision"], "weights_bytes": size},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(),
        "machine": machine(model.get_input_embeddings().weight.device),
        "rows": rows,
    }


@dataclass
class _Original:
    """How the float model is loaded: its class, name, place on the Hub, and options of from_pretrained."""

    kind: Any
    name: str | os.PathLike[str]
    where: dict[str, Any]
    options: dict[str, Any]

    def load(self, change: Any = None) -> BlockByBlock:
        return BlockByBlock(*load_float(self.kind, self.name, **self.where, **self.options), change)

    def load_gguf(self, file: Path, reference: BlockByBlock) -> Any:
        """With a file's weights, in float32; all of them at once where `reference`, the original, is in memory as well."""
        options = {**self.options, "dtype": torch.float32}
        if reference.source.later is None:
            return loaded_whole(self.kind, file.parent, gguf_file=file.name, config=copy.deepcopy(reference.model.config), **options)
        from awq_hf.gguf_blocks import InGguf  # not above: most programs never need the gguf package

        model, _ = load_float(self.kind, self.name, **self.where, **options)
        return BlockByBlock(model, InGguf(model, file))


class _Found:
    """What is to be known of the quantized model when it is gone."""

    bits: float
    specs: dict[str, QuantSpec]

    def keep(self, model: nn.Module) -> nn.Module:
        self.bits = bits_per_weight(model)
        self.specs = {name: module.spec for name, module in packed_modules(model).items()}
        return model


@torch.no_grad()
def round_plainly(specs: Mapping[str, QuantSpec], inside: str, module: nn.Module) -> None:
    """Round weights of a float module to the nearest codes, in place. specs: of a whole model, by full names; inside: the module's.

    Of experts, which a quantized model has a module for, the float one has a parameter of that name: [experts, out, in].
    """
    for full, spec in specs.items():
        if not full.startswith(f"{inside}."):
            continue
        name = full.removeprefix(f"{inside}.")
        owner, _, part = name.rpartition(".")
        fused = module.get_submodule(owner)._parameters.get(part)
        if fused is not None:
            for matrix in fused.data:
                matrix.copy_(fake_quantize(matrix.float(), choose_grid(matrix.float(), spec)))
            continue
        linear = module.get_submodule(name)
        weight = linear.get_parameter("weight").data
        matrix = (weight.T if isinstance(linear, Conv1D) else weight).float().contiguous()  # [out, in]
        rounded = fake_quantize(matrix, choose_grid(matrix, spec))
        weight.copy_(rounded.T if isinstance(linear, Conv1D) else rounded)


def bits_per_weight(model: Any) -> float:
    """Stored bits for each weight of the decoder's Linears and experts (embeddings and norms stay as they are)."""
    stored = weights = 0
    for module in model.get_decoder().modules():
        if isinstance(module, PackedModule):
            stored += sum(8 * tensor.nbytes for name, tensor in module.state_dict().items() if name != "bias")
            weights += module.matrices * module.in_features * module.out_features
        else:
            linear = isinstance(module, (Conv1D, nn.Linear))
            floats = [p for p in module.parameters(recurse=False) if p.ndim == 3 or (linear and p.ndim == 2)]  # experts are fused: 3
            stored += sum(8 * tensor.nbytes for tensor in floats)
            weights += sum(tensor.numel() for tensor in floats)
    return stored / weights


def weights_bytes(model: str | os.PathLike[str], location: Mapping[str, Any] | None = None) -> int | None:
    """Size of the weights on disk, by the names under which transformers looks for them: of a directory, or in the Hub's cache.

    location: revision and cache_dir, for the Hub. None where there are none.
    """
    folder = Path(model)
    if not folder.is_dir():
        where = {key: value for key, value in (location or {}).items() if key in ("revision", "cache_dir")}
        config = try_to_load_from_cache(os.fspath(model), "config.json", **where)
        folder = Path(config).parent if isinstance(config, str) else folder
    files = [*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files) or None


def _of_gguf(measured: Callable[[], dict[str, Any]], file: Path, original: Any) -> dict[str, Any] | None:
    """The figures of a file, or None and a warning where transformers does not read it as this model."""
    try:
        figures = measured()
    except Exception as error:  # of a reader that is not ours: all kinds of them
        gc.collect()
        logger.warning(
            "%s was not measured: transformers does not read it (%s)", file.name, (str(error) or type(error).__name__).splitlines()[0]
        )
        return None
    size = file.stat().st_size
    return {"weights_bytes": size, "bits_per_weight": 8 * size / original.num_parameters(), **figures}
