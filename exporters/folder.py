"""A directory in the shape of the Hub: safetensors, in shards with an index where there are several; config.json; what comes along."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.headers import INDEX, WEIGHTS
from awq_hf.spec import QuantizedWeight
from awq_hf.wording import option

MAX_SHARD_SIZE = "4GB"
Bar = Callable[..., Any]  # of tqdm's signature
Items = Iterator[tuple[str, Tensor | QuantizedWeight]]


def items_with_bar(checkpoint: Checkpoint, target: str, bar: Bar) -> Items:
    yield from bar(checkpoint.items(), total=len(checkpoint.names()), desc=f"Exporting to {target}")


def packed_tensors(items: Items, pack: Callable[[QuantizedWeight], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What is written: of a quantized weight what `pack` makes of it, under its module's name; the rest as it is."""
    for name, value in items:
        if isinstance(value, QuantizedWeight):
            owner = name.removesuffix(".weight")
            yield from ((f"{owner}.{part}", tensor) for part, tensor in pack(value).items())
        else:
            yield name, value


def write_folder(
    directory: Path, checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]], config: dict[str, Any], max_shard_size: str | int
) -> None:
    """Write a model that programs load by its config.json. At most one shard is in memory. directory: does not exist.

    config: changes to the checkpoint's config.json. max_shard_size: bytes, or "2GB".
    """
    size = in_bytes(max_shard_size)
    directory.mkdir()
    for path in checkpoint.files():
        assert checkpoint.directory is not None
        target = directory / path.relative_to(checkpoint.directory)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if checkpoint.model is not None and checkpoint.model.can_generate():
        checkpoint.model.generation_config.save_pretrained(directory)
    if (report := getattr(checkpoint.model, "awq_report", None)) is not None:  # of a model that was quantized in this process
        report.save(directory)
    write_json(directory / "config.json", {**checkpoint.config_dict, **config})
    _write_shards(directory, tensors, size)


def in_bytes(size: str | int) -> int:
    """Bytes, or a number of them with a unit: 500MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", str(size).upper())
    if match is None or not float(match[1]):
        raise ValueError(f'{option("max_shard_size", size)} is not a size; give bytes, or a number with KB, MB or GB: "4GB"')
    return int(float(match[1]) * 1000 ** " KMG".index(match[2] or " "))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
    """How many shards there are is known at the end: they are named then."""
    written: list[list[str]] = []
    total = 0

    def close(shard: dict[str, Tensor]) -> None:
        save_file(shard, directory / f"{len(written)}.partial", metadata={"format": "pt"})
        written.append(list(shard))

    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > max_bytes:
            close(shard)
            shard, filled = {}, 0
        shard[name] = tensor.detach().contiguous()
        filled, total = filled + tensor.nbytes, total + tensor.nbytes
    close(shard)
    if len(written) == 1:
        (directory / "0.partial").rename(directory / WEIGHTS)
        return
    weight_map = {}
    for number, names in enumerate(written):
        file = f"{Path(WEIGHTS).stem}-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (directory / f"{number}.partial").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
