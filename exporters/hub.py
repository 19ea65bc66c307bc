"""Push a directory to the Hub: what is large is sent first and stays on the Hub, then one commit makes all of it visible at once.

The Hub stores large files by their hash, so a run that is repeated after a break sends what has not arrived, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from awq_hf.exporters.hub_errors import CommitRetries, Stage, explained, sent
from awq_hf.exporters.hub_files import collect, is_weights
from awq_hf.exporters.hub_repository import Repository

CARD = "README.md"
MakeCard = Callable[[str, str | None], Mapping[str, bytes | None]]
"""(repository, text of the README.md there, or None) -> file -> its content, over the directory's; None: leave the repository's alone."""


@dataclass
class PushResult:
    """commit: its sha; commit, commit_url and pull_request are None where there is none. url: where to look at it. private: what a
    repository that is created was asked to be, None: what the account's settings say. Paths in the repository:

    uploaded, with their bytes: what it did not hold, or held with other content; unchanged; kept: what a person wrote there; removed:
    weights that the new ones replace. Of a dry run: what would be. asked: whether the Hub was; without a token, a dry run knows nothing of
    what the repository holds, and whether it may be written to.
    """

    repo_id: str
    url: str
    commit: str | None = None
    commit_url: str | None = None
    pull_request: str | None = None
    created: bool = False
    private: bool | None = None
    dry_run: bool = False
    asked: bool = True
    uploaded: dict[str, int] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(self.uploaded.values())


@dataclass
class _Plan:
    """What one commit has to change."""

    head: str | None
    additions: list[CommitOperationAdd]
    unchanged: list[str]
    kept: list[str]
    removed: list[str]

    @property
    def operations(self) -> list[CommitOperationAdd | CommitOperationDelete]:
        return [*self.additions, *map(CommitOperationDelete, self.removed)]


def push_directory(
    directory: str | os.PathLike[str],
    target: Repository,
    *,
    make_card: MakeCard | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> PushResult:
    """Upload a model's directory to `target`, see `find_repository`, in one commit; files that are there already are not sent.

    Raises ValueError for a directory that holds no model, half of one, or what looks like a secret; PermissionError and ConnectionError
    as above, which say what the repository holds and how to go on. Nothing of the commit is visible before all of it is there.
    """
    files = collect(Path(directory))
    result = PushResult(
        target.repo_id, target.url, created=target.exists is False, private=private, dry_run=dry_run, asked=target.exists is not None
    )
    with explained(target.repo_id, target.api.token) as stage, _bars(progress):
        plan = _make_plan(target, files, make_card)
        if not dry_run:
            target.prepare(private)
            stage.begun(result.created)
            message = commit_message or f"Upload with awq-hf {version('awq-hf')}"
            _commit(target, plan, lambda: _make_plan(target, files, make_card), result, stage, (message, commit_description))
        else:
            _note(result, plan)
    return result


def _make_plan(target: Repository, files: Mapping[str, Path], make_card: MakeCard | None) -> _Plan:
    head, there = target.contents()
    written = target.text(CARD, head) if head and CARD in there and make_card else None
    made = make_card(target.repo_id, written) if make_card else {}
    contents: dict[str, Path | bytes | None] = {**files, **made}
    if isinstance(card := contents.get(CARD), (bytes, Path)):
        _check_card(card)
    plan = _Plan(head, [], [], [path for path, content in contents.items() if content is None], [])
    for path, content in sorted(contents.items()):
        if content is not None:
            addition = CommitOperationAdd(path, content)
            (plan.unchanged.append(path) if _same(addition, there.get(path)) else plan.additions.append(addition))
    folders = {str(PurePosixPath(path).parent) for path in files if is_weights(path)}
    plan.removed = [path for path in there if is_weights(path) and path not in files and str(PurePosixPath(path).parent) in folders]
    return plan


def _same(addition: CommitOperationAdd, there: Any) -> bool:
    """Whether the repository holds just this; a file is read only where one of its size is there."""
    if there is None or there.size != addition.upload_info.size:
        return False
    if there.lfs is not None:
        return addition.upload_info.sha256.hex() == there.lfs.sha256
    with addition.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id


def _check_card(card: Path | bytes) -> None:
    try:
        ModelCard((card if isinstance(card, bytes) else card.read_bytes()).decode())
    except Exception as error:  # yaml's errors, UnicodeDecodeError, ValueError for data that is no mapping
        raise ValueError(
            f"the metadata at the top of {CARD} cannot be read ({str(error).splitlines()[0]}); correct it, or remove it"
        ) from error


def _commit(
    target: Repository, plan: _Plan, make_plan: Callable[[], _Plan], result: PushResult, stage: Stage, message: tuple[str, str | None]
) -> None:
    """Send what is large, then commit; where others commit meanwhile, or it is unknown if ours arrived, look again at what is missing."""
    retries = CommitRetries(target.create_pr)
    while True:
        _note(result, plan)
        if not plan.operations:
            result.commit, result.commit_url = plan.head, f"{target.api.endpoint}/{target.repo_id}/commit/{plan.head}"
            return
        where: dict[str, Any] = dict(repo_id=target.repo_id, revision=target.revision, create_pr=target.create_pr)
        sent(lambda: target.api.preupload_lfs_files(additions=plan.additions, free_memory=False, **where))  # noqa: B023  (called at once)
        if target.create_pr:
            stage.pull_request_sent(f"{target.url}/discussions")
        with retries:
            info = target.api.create_commit(
                operations=plan.operations, commit_message=message[0], commit_description=message[1], parent_commit=plan.head, **where
            )
            result.commit, result.commit_url, result.pull_request = info.oid, info.commit_url, info.pr_url
            result.url = info.pr_url or target.url
            return
        plan = make_plan()


def _note(result: PushResult, plan: _Plan) -> None:
    """Add a plan to the summary; a repeated one adds to what was tried before, which may have arrived."""
    result.uploaded |= {addition.path_in_repo: addition.upload_info.size for addition in plan.additions}
    result.unchanged = [path for path in plan.unchanged if path not in result.uploaded]
    result.kept, result.removed = plan.kept, [*dict.fromkeys(result.removed + plan.removed)]


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
