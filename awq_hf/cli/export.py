"""awq-hf export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from awq_hf.exporters.table import TARGETS

EXAMPLES = (
    "Examples:\n\n`awq-hf export compressed-tensors ./llama-awq ./llama-for-vllm`\n\n"
    "`awq-hf export dense TheBloke/Mistral-7B-v0.1-AWQ ./mistral-bf16 --dtype bfloat16`"
)


def export(
    target: Annotated[str, typer.Argument(help=f"{', '.join(TARGETS)}.")],
    model: Annotated[str, typer.Argument(help="A directory or a Hub id; quantized by AWQ, whoever wrote it, or for dense also float.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    dtype: Annotated[str | None, typer.Option(help="Of dense: float16, bfloat16, float32; default: the checkpoint's.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Of a file of weights; default: 4GB. As much is in memory.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for a Hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model in another program's format, with the same integers. Needs no GPU, and memory for a part of the model only."""
    import awq_hf

    given = dict(dtype=dtype, max_shard_size=max_shard_size, revision=revision)
    path = awq_hf.export(model, target, out, overwrite=overwrite, **{name: value for name, value in given.items() if value is not None})
    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    size = sum(file.stat().st_size for file in files)
    if as_json:
        names = [str(file.relative_to(path)) for file in files if file != path]
        typer.echo(json.dumps({"target": target, "path": str(path), "bytes": size, "files": names}))
    else:
        typer.echo(f"{target} written to {out}: {size / 1e6:,.1f} MB in {len(files)} files")
