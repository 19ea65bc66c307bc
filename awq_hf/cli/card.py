"""awq-hf card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from awq_hf.cli.common import License
from awq_hf.output import write_whole

EXAMPLES = (
    "Examples:\n\n`awq-hf card ./llama-awq --repo-id me/llama-awq`\n\n"
    "`awq-hf card ./somebodys-awq --base-model meta-llama/Llama-3.2-1B --overwrite`"
)

Of = typer.Option


def card(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What awq-hf quantize or export wrote, or another AWQ checkpoint.")],
    repo_id: Annotated[str | None, Of(help="owner/name that it will have on the Hub; snippets name it.")] = None,
    base_model: Annotated[str | None, Of(help="The original's Hub id, if report.json does not say it.")] = None,
    license: License = None,
    overwrite: Annotated[bool, Of("--overwrite", help="Replace a README.md that a person wrote or edited.")] = False,
    as_json: Annotated[bool, Of("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the model card, README.md and its plots, from report.json, evaluation.json and the files. Nothing is measured or uploaded."""
    from awq_hf.model_cards.card import README, is_generated, write_card
    from awq_hf.model_cards.facts import gather
    from awq_hf.model_cards.missing import missing

    if repo_id is not None and "/" not in repo_id:
        raise ValueError(f"--repo-id {repo_id} has no owner, and snippets name the whole id; give owner/name")
    facts = gather(directory, repo_id, base_model, license)
    readme = directory / README
    if readme.exists() and not overwrite and not is_generated(readme.read_text(encoding="utf-8")):
        raise ValueError(f"{readme} was not written by awq-hf card, or somebody edited it since; it is kept: --overwrite replaces it")
    files = write_card(facts)
    put(files, directory)
    absent = [{"what": what, "how": how} for what, how in missing(facts)]
    if as_json:
        typer.echo(json.dumps({"path": str(directory), "files": list(files), "missing": absent}))
        return
    typer.echo(f"Written to {directory}: {', '.join(files)}")
    for each in absent:
        typer.echo(f"Not in the card: {each['what']}.\n  {each['how']}")


def put(files: Mapping[str, bytes], directory: Path) -> None:
    """Write each whole or not at all. files: what make_card returns."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, content)
