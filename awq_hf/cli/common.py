"""What commands share: options and how they are completed, errors, output, and loading what a user named."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from awq_hf.wording import spelled

DTYPES = ("auto", "float16", "bfloat16", "float32")
DTYPES_HELP = "float16, bfloat16, float32; auto keeps the checkpoint's."

console = Console()
debug = False


def one_of(names: Callable[[], Iterable[str]] | Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell completes a word to. names: a function where they cost an import."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in (names() if callable(names) else names) if name.startswith(incomplete)]

    return complete


def _roundings() -> Iterable[str]:
    from awq_hf.rounding import ROUNDERS

    return ROUNDERS


def gguf_types() -> Iterable[str]:
    from awq_hf.exporters.gguf.types import names

    return names()


Model = Annotated[str, typer.Argument(help="A directory or a Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a Hub id.")]
Bits = Annotated[int, typer.Option(help="2, 3, 4 or 8.", autocompletion=one_of("2348"))]
GroupSize = Annotated[
    int,
    typer.Option(
        help="Input channels that share a scale: 16, 32, 64, 128, 256; -1 for whole rows.",
        autocompletion=one_of(("16", "32", "64", "128", "256", "-1")),
    ),
]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="No zero points.")]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens in a window; default: 512, or as many as the model takes.")]
Rounding = Annotated[str, typer.Option(help="nearest, gptq, or descent (the best).", autocompletion=one_of(_roundings))]
Skip = Annotated[list[str] | None, typer.Option(help="Leave Linears whose name contains this in float. Repeatable.")]
Override = Annotated[
    list[str] | None,
    typer.Option(help="PART=BITS or PART=BITS:GROUP_SIZE or PART=float, for Linears whose name contains PART. Repeatable."),
]
Dtype = Annotated[str, typer.Option(help=DTYPES_HELP, autocompletion=one_of(DTYPES))]
Device = Annotated[
    str | None, typer.Option(help='"cpu", "cuda", "cuda:1"; default: cuda if there is one.', autocompletion=one_of(("cpu", "cuda")))
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model; read it first.")]
License = Annotated[
    str | None, typer.Option(metavar="ID", help="The Hub's id of the licence, for the card; default: that of the original's card.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


_CALLED = {"modules_to_not_convert": "skip", "overrides": "override", "device_map": "device"}  # Python's option -> ours, where they differ
_OFF = {"zero_point": "--symmetric", "search": "--no-search"}  # False of Python's -> our flag


def as_option(name: str, *value: Any) -> str:
    """How a message calls an option on the command line. See awq_hf.wording."""
    given = value[0] if value else True
    if given is False:
        return _OFF[name]
    called = f"--{_CALLED.get(name, name).replace('_', '-')}"
    if given is True:
        return called
    return " ".join(f"{called} {shlex.quote(str(each))}" for each in (given if isinstance(given, (list, tuple)) else [given]))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command that ends an error with one sentence and status 1 (130 when interrupted); with --debug, with its traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with spelled(as_option):
                function(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing was written", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if debug or isinstance(error, (typer.Exit, typer.BadParameter)):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return run


def chosen(context: typer.Context) -> dict[str, Any]:
    """The options that were given, and are no defaults."""
    source = lambda name: getattr(context.get_parameter_source(name), "name", None)  # noqa: E731
    return {name: value for name, value in context.params.items() if source(name) != "DEFAULT"}


def check_revision(model: str, revision: str | None) -> None:
    if revision is not None and Path(model).is_dir():
        raise ValueError(f"--revision {revision} is of a Hub id, and {model} is a directory, which has none; leave it out")


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def stored_as(bits: int, group_size: int, symmetric: bool, skip: list[str] | None, override: list[str] | None) -> dict[str, Any]:
    """AwqConfig's options for how layers are stored, from the command line's."""
    given = dict(bits=bits, group_size=group_size, symmetric=symmetric, skip=skip, override=override)
    return dict(map(in_config, given, given.values()))


def in_config(name: str, value: Any) -> tuple[str, Any]:
    """Name and value, as AwqConfig has them, of an option of the command line."""
    if name == "symmetric":
        return "zero_point", not value
    if name == "skip":
        return "modules_to_not_convert", value
    return ("overrides", dict(map(_override, value or ()))) if name == "override" else (name, value)


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


def check_device(device: str | None) -> str:
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen != "auto":  # transformers' word for all devices that there are
        try:
            torch.device(chosen)
        except RuntimeError as error:
            raise ValueError(f'--device {chosen} is not a device; give "cpu", "cuda" or, of several, "cuda:1"') from error
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {chosen}: torch finds no CUDA device here; use --device cpu")
    return chosen


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not known; choose one of {', '.join(DTYPES)}")
    return dtype


def located(name: str) -> tuple[str, dict[str, Any]]:
    """A model's name and where it is, of owner/name@revision; a directory is its own."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(name).is_file() and name.endswith(".gguf"):
        raise ValueError(
            f"{name} is a GGUF file, which is made from a model and read by llama.cpp; give the directory or Hub id of the model. "
            f"How close it is to the original:  awq-hf eval {shlex.quote(str(Path(name).parent))} --reference MODEL --save"
        )
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; give the directory that holds config.json and *.safetensors, or a Hub id")
    if Path(name).is_dir():
        return name, {}
    hub_id, _, revision = name.partition("@")
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        raise ValueError(f"there is no directory {name}, and it cannot be a Hub id (owner/name) either") from None
    return hub_id, {"revision": revision} if revision else {}


def positions_of(given: str, trusted: bool) -> int | None:
    """How many tokens a model takes at once, where its config says so."""
    from awq_hf import classes

    name, location = located(given)
    return classes.positions_of(classes.read_config(name, trusted, **location))


def shared_tokenizer(models: list[str], text: Path | None, trusted: bool) -> Any:
    """The tokenizer that the models share. Raises ValueError where one has none, or they split the text differently; reads no weights.

    trusted: whether code that comes with them may run.
    """
    from transformers import AutoTokenizer

    from awq_hf.classes import read_config
    from awq_hf.evaluate import check_same_tokens

    tokenizers = {}
    for given in dict.fromkeys(models):
        name, location = located(given)
        read_config(name, trusted, **location)  # says best what is not a model
        try:
            tokenizers[given] = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted, **location)
        except (OSError, ValueError) as error:
            raise ValueError(f"{given} has no tokenizer ({str(error).splitlines()[0]}); copy the original model's there") from error
    check_same_tokens(tokenizers, text)
    return tokenizers[models[0]]
