"""awq-hf export."""

from __future__ import annotations

import functools
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from awq_hf.cli.common import DTYPES, as_option, check_revision, chosen, gguf_types, one_of
from awq_hf.exporters.table import GGUF, TARGETS
from awq_hf.wording import spelled

EXAMPLES = (
    "Examples:\n\n`awq-hf export compressed-tensors ./llama-awq ./llama-for-vllm`\n\n"
    "`awq-hf export dense TheBloke/Mistral-7B-v0.1-AWQ ./mistral-bf16 --dtype bfloat16`\n\n"
    "`awq-hf export gguf ./llama-awq ./llama.gguf` (the same integers)\n\n"
    "`awq-hf export gguf ./my-llama ./my-llama.gguf --type Q4_K_M --calibration notes.txt` (from float weights)"
)

Of = typer.Option
OfGguf = functools.partial(typer.Option, rich_help_panel="Options of gguf")
OfSearch = functools.partial(typer.Option, rich_help_panel="Options of gguf, for a float model")


OF_SEARCH = ("calibration", "samples", "seq_len", "seed", "device")
OF_GGUF = ("kind", "exact", "imatrix", "pre_tokenizer", "plain", "target_bpw", "save_imatrix", *OF_SEARCH)
SAID = {"kind": "type", "plain": "no_search"}  # what the command line calls a parameter, where that is another word


def export(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(help=f"{', '.join(TARGETS)}, {GGUF}.", autocompletion=one_of([*TARGETS, GGUF]))],
    model: Annotated[
        str, typer.Argument(help="A directory or a Hub id; quantized by AWQ, whoever wrote it, or for dense and gguf also float.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty. Of gguf: a file, or where to put one.")],
    dtype: Annotated[
        str | None, Of(help="Of dense: float16, bfloat16, float32; default: the checkpoint's.", autocompletion=one_of(DTYPES))
    ] = None,
    max_shard_size: Annotated[
        str | None, Of(help="Of a file of weights; default: 4GB, and as much is in memory; of gguf one file, of any size.")
    ] = None,
    kind: Annotated[
        str | None,
        OfGguf(
            "--type",
            help="auto (keeps the codes of a quantized model, and is the default there), Q4_K_M (the default of a float one), Q8_0, ...",
            autocompletion=one_of(gguf_types),
        ),
    ] = None,
    exact: Annotated[bool, OfGguf("--exact", help="Types that hold a quantized model's weights bit for bit.")] = False,
    imatrix: Annotated[Path | None, OfGguf(help="An importance matrix of llama.cpp's, instead of a search.")] = None,
    pre_tokenizer: Annotated[str | None, OfGguf(help="llama.cpp's name for it, where it is not recognized.")] = None,
    plain: Annotated[bool, OfSearch("--no-search", help="The type's plain quantizer, without calibration.")] = False,
    target_bpw: Annotated[float | None, OfSearch(help="Types chosen by sensitivity, for so many bits a weight of the file.")] = None,
    calibration: Annotated[str | None, OfSearch(help="Text to calibrate with, as for quantize; default: the embedded text.")] = None,
    samples: Annotated[int, OfSearch(help="Calibration windows.")] = 128,
    seq_len: Annotated[int | None, OfSearch(help="Tokens in a window; default: 512, or as many as the model takes.")] = None,
    seed: Annotated[int, OfSearch(help="Draws the calibration windows.")] = 0,
    save_imatrix: Annotated[Path | None, OfSearch(help="Write the importance matrix for llama.cpp's tools.")] = None,
    device: Annotated[str, OfSearch(help="Where the model is searched.")] = "cpu",
    revision: Annotated[str | None, Of(help="Branch, tag or commit, for a Hub id.")] = None,
    overwrite: Annotated[bool, Of("--overwrite", help="Replace a model that is there.")] = False,
    as_json: Annotated[bool, Of("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model in another program's format. A quantized one keeps its integers, and needs memory for a part of it only."""
    import awq_hf
    from awq_hf.exporters.folder import in_bytes

    check_revision(model, revision)
    given = chosen(ctx)
    location = {} if revision is None else {"revision": revision}
    result: Any = None
    if target == GGUF:
        from awq_hf.to_gguf import to_gguf

        if dtype is not None:
            raise ValueError("gguf has no --dtype; --type F16, BF16 or F32 writes floats")
        of_search = [name for name in OF_SEARCH if name in given]
        own = dict(
            type=kind, target_bpw=target_bpw, imatrix=imatrix, save_imatrix=save_imatrix, pre_tokenizer=pre_tokenizer,
            metadata={"name": out.stem} if out.suffix == ".gguf" else None,
            shard_size=None if max_shard_size is None else in_bytes(max_shard_size),
            config=awq_hf.AwqConfig(calibration=calibration, samples=samples, seq_len=seq_len, seed=seed) if of_search else None,
        )  # fmt: skip
        options: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
        common: dict[str, Any] = dict(exact=exact, search=not plain, overwrite=overwrite, progress=not as_json)
        with spelled(lambda name, *value: as_option(of_search[0] if name == "config" and of_search else name, *value)):
            result = to_gguf(model, out, device=device, location=location, **common, **options)
        files, path = result.files, result.files[0].parent
    else:
        if misplaced := [SAID.get(name, name) for name in OF_GGUF if name in given]:
            raise ValueError(f"{as_option(misplaced[0])} is an option of the target gguf, not of {target}; leave it out")
        rest = {key: value for key, value in dict(dtype=dtype, max_shard_size=max_shard_size).items() if value is not None}
        path = awq_hf.export(model, target, out, overwrite=overwrite, **location, **rest)
        files = sorted(file for file in path.rglob("*") if file.is_file())
    _tell(target, out if result is None else files[0], path, files, result, as_json)


def _tell(target: str, where: Path, path: Path, files: list[Path], result: Any, as_json: bool) -> None:
    """What was written. result: of gguf."""
    size = sum(file.stat().st_size for file in files)
    if as_json:
        about = {"target": target, "path": str(path), "bytes": size, "files": [str(file.relative_to(path)) for file in files]}
        types = {} if result is None else {"types": {name: kind.name for name, kind in result.types.items()}}
        typer.echo(json.dumps({**about, **types}))
        return
    density = f", {_bits_per_weight(files):.2f} bits a weight" if result else ""
    count = f"{len(files)} file{'s' * (len(files) > 1)}"
    typer.echo(f"{target} written to {where}: {size / 1e6:,.1f} MB in {count}{density}")
    if result:
        typer.echo(_types(result.types))
        if result.report is not None:
            layers = result.report.layers
            ratio = sum(layer.loss / max(layer.loss_importance, 1e-30) for layer in layers) / max(len(layers), 1)
            typer.echo(f"Output error of a layer: {ratio:.0%} of what the type's quantizer leaves with an importance matrix, on average")
        typer.echo(f"Run it:  {_command_for(files[0])}")


def _command_for(file: Path) -> str:
    """llama.cpp has one program for chats, and one for models that go on from a text."""
    from awq_hf.model_cards.gguf_header import read_header

    chats = read_header(file).chat_template is not None
    return (
        f"llama-cli -m {shlex.quote(str(file))}" if chats else f"llama-completion -m {shlex.quote(str(file))} -no-cnv -p 'Once upon a time'"
    )


def _bits_per_weight(files: list[Path]) -> float:
    """Of all tensors of a GGUF file and its parts, as --target-bpw and the card count."""
    from awq_hf.model_cards.gguf_header import read_header

    tensors = [tensor for file in files for tensor in read_header(file).tensors]
    return 8 * sum(tensor.nbytes for tensor in tensors) / sum(tensor.weights for tensor in tensors)


def _types(types: dict[str, Any]) -> str:
    """A line for every part of the blocks: which types its tensors have."""
    parts: dict[str, list[str]] = {}
    for name, kind in types.items():
        if kind.name != "F32":
            parts.setdefault(name.split(".")[-2], []).append(kind.name)
    width = max(map(len, parts))
    counted = {part: ", ".join(f"{count} x {kind}" for kind, count in Counter(kinds).most_common()) for part, kinds in parts.items()}
    return "\n".join(f"  {part:<{width}}  {kinds}" for part, kinds in counted.items())
