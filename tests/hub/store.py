"""What a repository of the loopback Hub holds, in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

LARGE = (".safetensors", ".gguf", ".bin", ".png")  # stored as LFS objects, as a new repository's .gitattributes says


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)  # also refs/pr/N
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256

    def commit(self, ref: str, files: dict[str, Blob], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{ref}{message}".encode()).hexdigest()
        self.commits[sha], self.branches[ref] = files, sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or next((sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.commits[self.sha(revision) or ""].items()}
