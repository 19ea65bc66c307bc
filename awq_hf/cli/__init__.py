"""The command line. Exit status: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from awq_hf.cli import card, common
from awq_hf.cli import evaluate as evaluate_command
from awq_hf.cli import push as push_command
from awq_hf.cli import quantize as quantize_command
from awq_hf.cli.common import (
    AsJson,
    Bits,
    Device,
    Dtype,
    GroupSize,
    Model,
    Override,
    Revision,
    Rounding,
    Samples,
    SeqLen,
    Skip,
    Symmetric,
    TrustRemoteCode,
    as_option,
    check_device,
    check_dtype,
    check_revision,
    chosen,
    command,
    console,
    stored_as,
)
from awq_hf.cli.export import EXAMPLES, export
from awq_hf.wording import spelled

app = typer.Typer(
    help="AWQ quantization for Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"awq-hf {metadata.version('awq-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    debug_: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    common.debug = debug_
    from transformers.utils import logging

    logging.set_verbosity_error()


app.command(epilog=quantize_command.EXAMPLES)(command(quantize_command.quantize))
app.command("eval", epilog=evaluate_command.EXAMPLES)(command(evaluate_command.evaluate))


OF_QUANTIZING = ("bits", "group_size", "symmetric", "samples", "seq_len", "rounding", "skip", "override")


@app.command(epilog="Examples:\n\n`awq-hf inspect meta-llama/Llama-3.2-1B --bits 3`\n\n`awq-hf inspect ./llama-awq`")
@command
def inspect(
    ctx: typer.Context,
    model: Model,
    revision: Revision = None,
    bits: Bits = 4,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    rounding: Rounding = "descent",
    skip: Skip = None,
    override: Override = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what quantizing a model would do, and take; or what a quantized checkpoint holds. Reads one block of each kind at most."""
    import awq_hf
    from awq_hf.compat import progress_bar
    from awq_hf.inspection import inspect
    from awq_hf.inspection.text import show

    check_revision(model, revision)
    what = stored_as(bits, group_size, symmetric, skip, override)
    config = awq_hf.AwqConfig(**what, samples=samples, seq_len=seq_len, rounding=rounding)
    given = [name for name in chosen(ctx) if name in OF_QUANTIZING]
    with spelled(lambda name, *value: as_option(given[0] if name == "config" and given else name, *value)):
        found = inspect(
            model, config if given else None, check_dtype(dtype), check_device(device), progress_bar, revision, trust_remote_code
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        show(found, console)


app.command(epilog=EXAMPLES)(command(export))
app.command(epilog=card.EXAMPLES)(command(card.card))
app.command(epilog=push_command.EXAMPLES)(command(push_command.push))


@app.command(epilog="Example:\n\n`awq-hf demo --bits 3`")
@command
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the quantized model; must not exist or be empty.")] = Path("awq-hf-demo"),
    bits: Bits = 4,
    group_size: GroupSize = 128,
) -> None:
    """Quantize the small model that comes with the package, measure it, save it, load it again. Needs no network."""
    from awq_hf.demo import run

    run(out, bits, group_size, console)


def main() -> None:
    """Entry point of the console script."""
    app()
