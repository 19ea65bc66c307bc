"""A repository on the Hub that is to be pushed to: what is there, and whether it may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from awq_hf.exporters.hub_errors import checked_token, explained, has_token, patiently
from awq_hf.wording import option


@dataclass
class Repository:
    """A place on the Hub to push to. revision: a branch; exists, has_revision: whether they are there yet, None where nobody asked."""

    api: HfApi
    repo_id: str
    revision: str = "main"
    create_pr: bool = False
    exists: bool | None = False
    has_revision: bool | None = False

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}" + ("" if self.revision == "main" else f"/tree/{self.revision}")

    def contents(self) -> tuple[str | None, dict[str, Any]]:
        """The commit that `revision` is at, or would start from, and path -> file there."""
        if not self.exists:
            return None, {}
        revision = self.revision if self.has_revision else "main"
        head = patiently(lambda: self.api.model_info(self.repo_id, revision=revision).sha)
        tree = patiently(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=head)))
        return head, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    def text(self, path: str, head: str) -> str:
        with TemporaryDirectory() as room:
            file = patiently(lambda: self.api.hf_hub_download(self.repo_id, path, revision=head, local_dir=room))
            return Path(file).read_text(encoding="utf-8", errors="replace")

    def prepare(self, private: bool | None) -> None:
        """Create what is not there yet; needs the right to write."""
        if not self.exists:
            patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
            self.exists = True
        if not self.has_revision:
            patiently(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
            self.has_revision = True


def find_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Repository:
    """Look at where a push would go, and change nothing. A name without an owner is the token's user's.

    dry_run: nothing will be pushed, and without a token nothing is looked at.

    Raises ValueError for a name or revision that cannot be pushed to and for a public repository where `private` is asked for,
    PermissionError for a token that is missing, refused (401) or only reads, and ConnectionError when the Hub does not answer.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"{repo_id!r} is not the name of a repository; give owner/name, or a name in your own namespace") from None
    api = HfApi(token=checked_token(token), library_name="awq-hf", library_version=version("awq-hf"))
    if dry_run and not has_token(api.token):
        return Repository(api, repo_id, revision or "main", create_pr, exists=None, has_revision=None)
    with explained(repo_id, api.token):
        user = patiently(api.whoami)
        target = Repository(api, repo_id if "/" in repo_id else f"{user['name']}/{repo_id}", revision or "main", create_pr)
        _check_role(user, target)
        _look(target, private)
    return target


def check_not_original(repo_id: str, original: str) -> None:
    """Raises ValueError where a push would replace the weights of the model that was quantized."""
    if repo_id.lower() == original.lower():
        raise ValueError(
            f"{repo_id} is the original model, whose weights would be replaced; choose another name, a branch of it "
            f"({option('revision')}) or a pull request ({option('create_pr', True)})"
        )


def _check_role(user: Mapping[str, Any], target: Repository) -> None:
    role = user.get("auth", {}).get("accessToken", {}).get("role")  # read, write or fineGrained, of which the Hub itself knows the rights
    owner = target.repo_id.split("/")[0]
    if role == "read":
        raise PermissionError(
            f"the token can only read; to push to {target.repo_id}, use one that can write (`hf auth login`, or HF_TOKEN)"
        )
    if role == "write" and not target.create_pr and owner not in {user["name"], *(org["name"] for org in user.get("orgs", ()))}:
        raise PermissionError(
            f"{user['name']}, whose token this is, does not belong to {owner}, so {target.repo_id} cannot be written to; "
            f"check the name, or open a pull request on a repository that exists ({option('create_pr', True)})"
        )


def _look(target: Repository, private: bool | None) -> None:
    """Find out what is there, and refuse what cannot be committed to."""
    name, revision = target.repo_id, target.revision
    try:
        info = patiently(lambda: target.api.model_info(name))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        target.has_revision = revision == "main"
        if revision.startswith("refs/"):
            raise ValueError(f"{name} does not exist, so it has no {revision}") from None
        return
    target.exists = True
    if private and not info.private:
        raise ValueError(
            f"{name} exists and is public, and {option('private')} is for new repositories; choose another name, or change its settings"
        )
    if revision == "main":
        target.has_revision = True
        return
    try:
        sha = patiently(lambda: target.api.model_info(name, revision=revision).sha) or ""
        target.has_revision = True
    except RevisionNotFoundError:
        if revision.startswith("refs/") or target.create_pr:
            raise ValueError(f"{name} has no revision {revision}; create the branch first, or leave {option('revision')} out") from None
        return
    if sha.startswith(revision) or revision in {tag.name for tag in patiently(lambda: target.api.list_repo_refs(name)).tags}:
        raise ValueError(f"{revision} of {name} is a commit or a tag, which cannot be written to; give the name of a branch")
