"""push_to_hub(): a model in memory or its directory, with its card, as one commit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from awq_hf.api import save
from awq_hf.base_model import quantized_from
from awq_hf.exporters.hub import CARD, MakeCard, PushResult, push_directory
from awq_hf.exporters.hub_repository import check_not_original, find_repository
from awq_hf.wording import option


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    overwrite_card: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    **save_options: Any,
) -> PushResult:
    """Upload a model to the Hub in one commit: weights, exports and GGUF files beside them, tokenizer, report and model card.

    model: a directory, or a model in memory, which is saved to a temporary one (save_options go to save_pretrained: max_shard_size).
    repo_id: owner/name, or a name in the token's own namespace; created when it is not there (private: not for everyone to see).
    revision: a branch, created from main when it is not there. create_pr: open a pull request instead of committing. token: else that
    of `hf auth login` or HF_TOKEN. base_model: the Hub id of the original, for the card, where report.json does not know it; license: the
    Hub's id of the licence, where the original's card does not say it.

    The card is written anew each time, but one that a person wrote or edited stays: the directory's README.md goes as it is, and the
    repository's is kept; overwrite_card replaces the latter. dry_run: look at everything and change nothing;
    without a token, look at what is here only.
    Files that the repository holds already are not sent, so a run that broke is repeated to continue it.
    Raises ValueError, PermissionError or ConnectionError with one sentence; before anything is sent where that can be known.
    """
    of_card = dict(base_model=base_model, license=license)
    if isinstance(model, (str, os.PathLike)):
        _check_use(Path(model), **of_card)
    target = find_repository(repo_id, private=private, revision=revision, create_pr=create_pr, token=token, dry_run=dry_run)
    rest: dict[str, Any] = dict(
        private=private, commit_message=commit_message, commit_description=commit_description, dry_run=dry_run, progress=progress
    )
    if isinstance(model, (str, os.PathLike)):
        if save_options:
            raise TypeError(f"{', '.join(save_options)}: options for saving have no use with a directory")
        if revision in (None, "main") and not create_pr:
            check_not_original(target.repo_id, _original(Path(model)))
        return push_directory(model, target, make_card=card_for(Path(model), overwrite_card, **of_card), **rest)
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    with TemporaryDirectory() as room:
        directory = Path(room) / "model"
        save(model, directory, getattr(config, "tokenizer", None) or model.name_or_path, **save_options)
        return push_directory(directory, target, make_card=card_for(directory, overwrite_card, **of_card), **rest)


def _original(directory: Path) -> str:
    """The Hub id of the model that was quantized, as report.json has it; or nothing."""
    said = quantized_from(directory)
    return "" if said.get("local", True) else str(said.get("name") or "")


def _check_use(directory: Path, **of_card: str | None) -> None:
    """Raises ValueError for options of a card that is not made, since a person wrote one."""
    from awq_hf.model_cards import is_generated

    path, given = directory / CARD, [name for name, value in of_card.items() if value is not None]
    if given and path.is_file() and not is_generated(path.read_text(encoding="utf-8")):
        raise ValueError(
            f"a person wrote or edited {path}, which goes as it is, so {option(given[0], of_card[given[0]])} would be of no use; write it "
            f"there, or have the card made again: awq-hf card {shlex.quote(str(directory))} --overwrite"
        )


def card_for(directory: Path, overwrite: bool, **of_card: str | None) -> MakeCard:
    """Which card goes with `directory`: what a person wrote comes before what is generated, and the repository's before ours.

    of_card: base_model and license of make_card.
    """
    from awq_hf.model_cards import is_generated, make_card  # not above: templates are not needed to load a model

    def files(repo_id: str, there: str | None) -> Mapping[str, bytes | None]:
        path = directory / CARD
        here = path.read_text(encoding="utf-8") if path.is_file() else None
        if there is not None and there != here and not overwrite and not is_generated(there):
            return {CARD: None}
        if here is not None and not is_generated(here):
            return {}
        return make_card(directory, repo_id, **of_card)

    return files
