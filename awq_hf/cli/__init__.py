"""The command line. Exit status: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from awq_hf.cli import card
from awq_hf.cli.export import EXAMPLES, export

app = typer.Typer(
    help="AWQ quantization for Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
debug = False

Model = Annotated[str, typer.Argument(help="A directory or a Hub id.")]
Bits = Annotated[int, typer.Option(help="2, 3, 4 or 8.")]
GroupSize = Annotated[int, typer.Option(help="Input channels that share a scale: 16, 32, 64, 128, 256; -1 for whole rows.")]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="No zero points.")]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens in a window; default: 512, or as many as the model takes.")]
Rounding = Annotated[str, typer.Option(help="nearest, gptq, or descent (the best).")]
Skip = Annotated[list[str] | None, typer.Option(help="Leave Linears whose name contains this in float. Repeatable.")]
Override = Annotated[
    list[str] | None,
    typer.Option(help="PART=BITS or PART=BITS:GROUP_SIZE or PART=float, for Linears whose name contains PART. Repeatable."),
]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16, float32; auto keeps the checkpoint's.")]
Device = Annotated[str | None, typer.Option(help='"cpu", "cuda", "cuda:1"; default: cuda if there is one.')]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


DTYPES = ("auto", "float16", "bfloat16", "float32")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command that ends an error with one sentence and status 1 (130 when interrupted); with --debug, with its traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing was written", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if debug or isinstance(error, typer.Exit):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return run


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"awq-hf {metadata.version('awq-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    debug_: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    global debug
    debug = debug_
    from transformers.utils import logging

    logging.set_verbosity_error()


@app.command(
    epilog="Examples:\n\n`awq-hf quantize meta-llama/Llama-3.2-1B ./llama-awq`\n\n"
    "`awq-hf quantize ./my-model ./my-model-awq --bits 3 --calibration notes.txt`\n\n"
    "`awq-hf quantize ./my-model ./my-model-awq --calibration HuggingFaceH4/ultrachat_200k::train_sft`"
)
@command
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    bits: Bits = 4,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A text, .jsonl, .json or .parquet file, or a dataset (directory or name)[:config][:split]; default: the embedded text."
        ),
    ] = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    rounding: Rounding = "descent",
    skip: Skip = None,
    override: Override = None,
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Draws the calibration windows.")] = 0,
    scales_for: Annotated[
        str | None, typer.Option(help="Q4_K or Q4_1: scales that this GGUF type holds exactly; an exported file has the same weights then.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and write a checkpoint that vLLM, SGLang, transformers and MLX read (4 bits)."""
    import awq_hf

    what = _config(bits, group_size, symmetric, skip, override)
    config = awq_hf.AwqConfig(
        **what, calibration=calibration, samples=samples, seq_len=seq_len, rounding=rounding, seed=seed, scales_for=scales_for
    )
    result: Any = awq_hf.quantize(model, config, output_dir=out, dtype=_dtype(dtype), device_map=_device(device))
    if as_json:
        typer.echo(json.dumps(result.awq_report.to_dict()))
        return
    say(result.awq_report.summary())
    say(f"\nWritten to {out}; {out / 'report.json'} says what happened to every layer. Next, measure it:\n")
    say(f"  awq-hf eval {out} --reference {model} --text SOME_TEXT_FILE")


@app.command(
    epilog="Examples:\n\n`awq-hf eval ./llama-awq --reference meta-llama/Llama-3.2-1B --text book.txt`\n\n"
    "`awq-hf eval ./awq-4bit ./awq-3bit --reference ./original --text book.txt --json > results.json`"
)
@command
def eval(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Directories or Hub ids; one is in memory at a time.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file that calibration did not see.")],
    reference: Annotated[str | None, typer.Option(help="The original model; adds KL divergence and top-1 agreement.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows that run together; lower it when memory runs out.")] = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure models on a text: perplexity, and with --reference how far they are from the original."""
    from transformers import AutoConfig

    import awq_hf
    from awq_hf.compat import class_of, progress_bar
    from awq_hf.evaluation_table import tables

    options = dict(dtype=_dtype(dtype), device_map=_device(device))
    load = lambda name: class_of(AutoConfig.from_pretrained(name).architectures).from_pretrained(name, **options)  # noqa: E731
    results = awq_hf.evaluate_many(
        {name: functools.partial(load, name) for name in models},
        None if reference is None else functools.partial(load, reference),
        text,
        _tokenizer([*models, *([reference] if reference else [])], text),
        seq_len,
        max_tokens,
        batch_size,
        progress_bar,
    )
    about = {"reference": reference, "reference_weights_bytes": _weights_bytes(reference)}
    rows = [{"model": name, "weights_bytes": _weights_bytes(name), **about, **result.to_dict()} for name, result in results.items()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for table in tables(rows, console.width):
        console.print(table)


def _tokenizer(models: list[str], text: Path) -> Any:
    """The tokenizer that the models share. Raises ValueError where one has none, or they split the text differently; reads no weights."""
    from transformers import AutoConfig, AutoTokenizer

    from awq_hf.evaluate import check_same_tokens

    tokenizers = {}
    for name in dict.fromkeys(models):
        AutoConfig.from_pretrained(name)  # says best what is not a model
        try:
            tokenizers[name] = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} has no tokenizer ({str(error).splitlines()[0]}); copy the original model's there") from error
    check_same_tokens(tokenizers, text)
    return tokenizers[models[0]]


def _weights_bytes(model: str | None) -> int | None:
    """Size of the weights on disk, if they are in a local directory; by the names under which transformers looks for them."""
    if model is None:
        return None
    files = [*Path(model).glob("model*.safetensors")] or [*Path(model).glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files) or None


@app.command(epilog="Examples:\n\n`awq-hf inspect meta-llama/Llama-3.2-1B --bits 3`\n\n`awq-hf inspect ./llama-awq`")
@command
def inspect(
    model: Model,
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
    as_json: AsJson = False,
) -> None:
    """Say what quantizing a model would do, and take; or what an AWQ checkpoint holds. Reads one block of each kind at most."""
    import awq_hf
    from awq_hf.compat import progress_bar
    from awq_hf.inspection import inspect
    from awq_hf.inspection.text import show

    what = _config(bits, group_size, symmetric, skip, override)
    config = awq_hf.AwqConfig(**what, samples=samples, seq_len=seq_len, rounding=rounding)
    found = inspect(model, config, _dtype(dtype), _device(device), progress_bar)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        show(found, console)


app.command(epilog=EXAMPLES)(command(export))
app.command(epilog=card.EXAMPLES)(command(card.card))


@app.command()
@command
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the quantized model; must not exist or be empty.")] = Path("awq-hf-demo"),
    bits: Bits = 4,
    group_size: GroupSize = 128,
) -> None:
    """Quantize the small model that comes with the package, measure it, save it, load it again. Needs no network."""
    from awq_hf.demo import run

    run(out, bits, group_size, console)


def _config(bits: int, group_size: int, symmetric: bool, skip: list[str] | None, override: list[str] | None) -> dict[str, Any]:
    """AwqConfig's options for how layers are stored, from the command line's."""
    overrides = dict(map(_override, override or ()))
    return dict(bits=bits, group_size=group_size, zero_point=not symmetric, modules_to_not_convert=skip, overrides=overrides)


def _override(text: str) -> tuple[str, dict[str, int] | None]:
    """PART=BITS[:GROUP_SIZE] or PART=float."""
    part, _, value = text.partition("=")
    try:
        numbers = None if value == "float" else dict(zip(("bits", "group_size"), map(int, value.split(":")), strict=False))
    except ValueError:
        numbers = {}
    if not part or numbers == {} or value.count(":") > 1:
        raise ValueError(f"--override {text} is not PART=BITS, PART=BITS:GROUP_SIZE or PART=float, e.g. down_proj=8:64")
    return part, numbers


def _device(device: str | None) -> str:
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {chosen}: torch finds no CUDA device here; use --device cpu")
    return chosen


def _dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not known; choose one of {', '.join(DTYPES)}")
    return dtype


def main() -> None:
    """Entry point of the console script."""
    app()
