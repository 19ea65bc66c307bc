"""awq-hf eval."""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from awq_hf.cli.common import (
    AsJson,
    Device,
    Dtype,
    TrustRemoteCode,
    check_device,
    check_dtype,
    console,
    located,
    positions_of,
    shared_tokenizer,
)

EXAMPLES = (
    "Examples:\n\n`awq-hf eval ./llama-awq --reference meta-llama/Llama-3.2-1B`\n\n"
    "`awq-hf eval ./awq-4bit ./awq-3bit --reference ./original --text book.txt --json > results.json`\n\n"
    "`awq-hf eval ./llama-awq --reference meta-llama/Llama-3.2-1B@main --save` (also plain rounding and GGUF files, for the card)"
)

Of = typer.Option


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Directories or Hub ids, also owner/name@revision; one is in memory at a time.")
    ],
    text: Annotated[Path | None, Of(help="UTF-8 text file that calibration did not see; default: the embedded one.")] = None,
    reference: Annotated[str | None, Of(help="The original model; adds KL divergence and top-1 agreement.")] = None,
    seq_len: Annotated[int | None, Of(help="Tokens in a window; default: 512, or as many as the models take, if that is less.")] = None,
    max_tokens: Annotated[int | None, Of(help="Stop after so many tokens; default: all, with --save 65,536.")] = None,
    batch_size: Annotated[
        int | None, Of(help="Windows that run together; lower it when memory runs out. Default: up to 8, less of a large vocabulary.")
    ] = None,
    save: Annotated[
        bool, Of("--save", help="Measure all that MODEL, a directory, holds, and plain rounding; write it there as evaluation.json.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure models on a text: perplexity, and with --reference how far they are from the original."""
    from awq_hf.compat import progress_bar
    from awq_hf.evaluation_table import rows_of, tables
    from awq_hf.measure import MAX_TOKENS

    options: dict[str, Any] = dict(dtype=check_dtype(dtype), device_map=check_device(device), trust_remote_code=trust_remote_code)
    common: dict[str, Any] = dict(batch_size=batch_size, progress=progress_bar)
    if save:
        if len(models) != 1 or reference is None or not Path(models[0]).is_dir():
            raise ValueError(
                "--save writes into the directory of one model, and compares with --reference; give one directory and a reference"
            )
        from awq_hf.measure import measure

        original, location = located(reference)
        how: dict[str, Any] = dict(location=location, seq_len=seq_len, max_tokens=max_tokens or MAX_TOKENS)
        found = measure(models[0], original, text, **how, **options, **common)
        rows = rows_of(found)
    else:
        found = rows = _compared(models, reference, text, options, dict(seq_len=seq_len, max_tokens=max_tokens, **common))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for table in tables(rows, console.width):
        console.print(table)


def _compared(models: list[str], reference: str | None, text: Path | None, options: dict[str, Any], how: dict[str, Any]) -> Any:
    """A row for each model."""
    import awq_hf
    from awq_hf.block_by_block import BlockByBlock
    from awq_hf.classes import class_for, read_config
    from awq_hf.exporters.reading import PACKAGES, NotReadHere, load_export
    from awq_hf.measure import SEQ_LEN, weights_bytes
    from awq_hf.streaming import load_float

    def load(given: str) -> Any:
        name, location = located(given)
        trusted = options["trust_remote_code"]
        config = read_config(name, trusted, **location)
        kind = class_for(config, trusted)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method is None:
            model, source = load_float(kind, name, **location, **options)
            return model if source.later is None else BlockByBlock(model, source)
        if method in PACKAGES:
            try:
                return load_export(kind, name, location, **options)
            except NotReadHere as reason:
                package = PACKAGES[method]
                if find_spec(package.replace("-", "_")) is None:  # transformers says: name 'QuantizeConfig' is not defined
                    raise ValueError(
                        f"{given} is {method} of a kind that is not read here ({reason}), but by transformers with {package}; "
                        f"pip install {package}"
                    ) from reason
        return kind.from_pretrained(name, **location, **options)

    everything = [*models, *([reference] if reference else [])]
    tokenizer = shared_tokenizer(everything, text, options["trust_remote_code"])
    if how["seq_len"] is None:
        how["seq_len"] = min(SEQ_LEN, *(positions_of(given, options["trust_remote_code"]) or SEQ_LEN for given in everything))
    results = awq_hf.evaluate_many(
        {name: functools.partial(load, name) for name in models},
        None if reference is None else functools.partial(load, reference),
        text,
        tokenizer,
        **how,
    )
    size = lambda name: weights_bytes(*located(name))  # noqa: E731
    about = {"reference": reference, "reference_weights_bytes": None if reference is None else size(reference)}
    return [{"model": name, "weights_bytes": size(name), **about, **result.to_dict()} for name, result in results.items()]
