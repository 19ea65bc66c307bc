"""awq-hf push."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from awq_hf.cli.common import License

if TYPE_CHECKING:
    from awq_hf.exporters.hub import PushResult

EXAMPLES = (
    "Examples:\n\n`awq-hf push ./llama-awq me/Llama-3.2-1B-AWQ --dry-run` (what would be uploaded)\n\n"
    "`awq-hf push ./llama-awq me/Llama-3.2-1B-AWQ --private`\n\n"
    "`awq-hf push ./llama-awq team/Llama-3.2-1B-AWQ --create-pr`\n\n"
    "Needs a token that can write: `hf auth login`, or HF_TOKEN. A run that broke is repeated to continue it."
)

Of = typer.Option


def push(
    directory: Annotated[Path, typer.Argument(help="What awq-hf quantize or export wrote, GGUF files and folders of exports included.")],
    repo: Annotated[str, typer.Argument(help="owner/name, or a name in your own namespace; created when it is not there.")],
    private: Annotated[bool, Of("--private", help="Create the repository for your eyes only.")] = False,
    revision: Annotated[str | None, Of(help="A branch; created from main when it is not there.")] = None,
    create_pr: Annotated[bool, Of("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, Of(help="Of the commit.")] = None,
    description: Annotated[str | None, Of(help="Of the commit or the pull request.")] = None,
    base_model: Annotated[str | None, Of(help="Hub id of the original model, for the card.")] = None,
    license: License = None,
    overwrite_card: Annotated[bool, Of("--overwrite-card", help="Replace the repository's README.md even if a person wrote it.")] = False,
    dry_run: Annotated[
        bool, Of("--dry-run", help="Say what would be uploaded, and change nothing. Without a token, the Hub is not asked.")
    ] = False,
    as_json: Annotated[bool, Of("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Upload a model to the Hub with its card: one commit, when everything has arrived. What is there already is not sent."""
    import awq_hf

    try:
        result = awq_hf.push_to_hub(
            directory, repo, private=private or None, revision=revision, create_pr=create_pr, commit_message=message,
            commit_description=description, base_model=base_model,
            license=license, overwrite_card=overwrite_card, dry_run=dry_run, progress=not as_json,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was committed, and what arrived is not sent again: run the same command to continue", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps({**asdict(result), "bytes": result.bytes}) if as_json else summary(result))


def summary(result: PushResult) -> str:
    """What went where, for a person."""
    from awq_hf.inspection.text import size

    would, count = "Would upload" if result.dry_run else "Uploaded", len(result.uploaded)
    lines = [f"{would} {_files(count)} ({size(result.bytes)}) to {result.url}" if count else f"Nothing to upload to {result.url}"]
    width = max(map(len, result.uploaded), default=0)
    lines += [f"  {path:<{width}}  {size(count):>8}" for path, count in sorted(result.uploaded.items())]
    if result.unchanged:
        lines.append(f"{_files(len(result.unchanged))} of the same content {'is' if len(result.unchanged) == 1 else 'are'} there already.")
    lines += [f"{path}, of an earlier model there, {'would be' if result.dry_run else 'was'} removed." for path in result.removed]
    lines += [f"{path} there was written or edited by a person and is kept; --overwrite-card replaces it." for path in result.kept]
    if not result.asked:
        lines.append(
            f"The Hub was not asked, since there is no token (`hf auth login`, or HF_TOKEN): whether {result.repo_id} exists, may be "
            "written to, and holds some of this already is not known."
        )
    if result.created:
        alone = ", for you alone (--private)" if result.private else ", for everyone to see, unless --private is given" * result.dry_run
        new = "does not exist yet; it would be created" if result.dry_run else "was created"
        lines.append(f"{result.repo_id} {new}{alone}.")
    return "\n".join(lines)


def _files(count: int) -> str:
    return f"{count} file{'s' * (count != 1)}"
