"""awq-hf quantize: from a model to a directory, and, if so asked, to exports, measurements, a card and the Hub, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from awq_hf.cli.common import (
    AsJson,
    Bits,
    Device,
    Dtype,
    GroupSize,
    License,
    Override,
    Revision,
    Rounding,
    Samples,
    SeqLen,
    Skip,
    Symmetric,
    TrustRemoteCode,
    chosen,
    gguf_types,
    in_config,
    one_of,
)
from awq_hf.cli.one_run import OneRun

EXAMPLES = (
    "Examples:\n\n`awq-hf quantize meta-llama/Llama-3.2-1B ./llama-awq`\n\n"
    "`awq-hf quantize ./my-model ./my-model-awq --bits 3 --calibration notes.txt`\n\n"
    "`awq-hf quantize ./my-model ./my-model-awq --calibration HuggingFaceH4/ultrachat_200k::train_sft`\n\n"
    "`awq-hf quantize me/model ./out --export gguf:Q4_K_M --export compressed-tensors --push me/model-AWQ` (all in one run)\n\n"
    "`awq-hf quantize --recipe out/recipe.yaml ./again`"
)
Of = typer.Option


def _targets() -> list[str]:
    from awq_hf.targets import CHOICES

    return [*CHOICES, *(f"gguf:{name}" for name in gguf_types())]


def quantize(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A directory or a Hub id; may come from the recipe.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Directory to write; must not exist or be empty.", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None, Of(help="A YAML or TOML file of options, such as the recipe.yaml of an earlier run; options given here win.")
    ] = None,
    revision: Revision = None,
    bits: Bits = 4,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    calibration: Annotated[
        str | None,
        Of(help="A text, .jsonl, .json or .parquet file, or a dataset (directory or name)[:config][:split]; default: the embedded text."),
    ] = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    rounding: Rounding = "descent",
    skip: Skip = None,
    override: Override = None,
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, Of(help="Draws the calibration windows.")] = 0,
    scales_for: Annotated[
        str | None,
        Of(
            help="Q4_K or Q4_1: scales that this GGUF type holds exactly; an exported file has the same weights then.",
            autocompletion=one_of(("Q4_K", "Q4_1")),
        ),
    ] = None,
    export: Annotated[
        list[str] | None,
        Of(
            metavar="TARGET[:TYPE]",
            help="Also write: compressed-tensors, gptq, dense[:DTYPE]: the same integers, in a folder of that name; gguf: the same "
            "integers, as a file; gguf:Q4_K_M or another type: made from the float weights by a search for that type. Repeatable.",
            autocompletion=one_of(_targets),
        ),
    ] = None,
    measure: Annotated[
        bool | None,
        Of(
            "--measure/--no-measure",
            help="Write evaluation.json: perplexity and KL divergence of all that was written, and of plain rounding. Default: if there "
            "is a --text or a --push.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[Path | None, Of(help="Measure on this UTF-8 text, which calibration did not see; default: the embedded one.")] = None,
    push: Annotated[str | None, Of(metavar="REPO", help="Push the result, with its card, to this repository of the Hub.")] = None,
    private: Annotated[bool, Of("--private", help="Create that repository as a private one.")] = False,
    resume: Annotated[
        bool,
        Of("--resume", help="Keep finished blocks in OUT.progress until OUT is written, and go on from those of a run that broke off."),
    ] = False,
    base_model: Annotated[str | None, Of(metavar="ID", help="Hub id of the original, for the card; where MODEL is a directory.")] = None,
    license: License = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and write a checkpoint that vLLM, SGLang, transformers and MLX read (4 bits).

    In the same run it can be exported, measured, described by a card and pushed. All that can be refused is refused before the work
    starts; if a later step fails, OUT holds what is finished, and the message says which commands do the rest.
    """
    OneRun(dict(in_config(*item) for item in chosen(ctx).items()), as_json).go()
