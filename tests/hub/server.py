"""A Hub on loopback: the HTTP protocol that huggingface_hub speaks, kept in memory, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from huggingface_hub import ModelCard

from tests.hub.store import LARGE, Blob, Repo
from tests.hub.transport import Fault, FaultyHandler, Refused


class Hub:
    """users: token -> (name, what the token may do: "write" or "read"); orgs: name -> members. log: (method, path) of every request."""

    def __init__(self) -> None:
        self.users = {"hf_" + "m" * 34: ("me", "write"), "hf_" + "r" * 34: ("me", "read"), "hf_" + "o" * 34: ("other", "write")}
        self.orgs = {"team": ["me"]}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.ranges: list[str] = []
        self.slept: list[float] = []
        self.part_size = 2**40  # of a multipart upload; larger files are sent in parts
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"  # another host, as the client treats them differently
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, part: str, **how: Any) -> None:
        self.faults.append(Fault(method, part, **how))

    def forget(self) -> None:
        """No faults, no log; the repositories stay."""
        self.faults.clear()
        self.log.clear()

    def count(self, method: str, part: str) -> int:
        return sum(sent == method and part in path for sent, path in self.log)

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[name] = Repo(private)
        blobs = {path: Blob(data, path.endswith(LARGE)) for path, data in {".gitattributes": b"", **(files or {})}.items()}
        repo.objects |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
        repo.commit("main", blobs, "initial commit")
        return repo


class Handler(FaultyHandler):
    hub: Hub

    # Who asks, and for what

    def route(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in ROUTES:
            if method == wanted and (match := re.fullmatch(pattern, self.raw)):
                result = getattr(self, name)(body, *(unquote(part or "") for part in match.groups()))
                return result if isinstance(result, tuple) else (200, json.dumps(result).encode(), {"Content-Type": "application/json"})
        raise Refused(404, f"no such page: {self.raw}")

    def _user(self) -> tuple[str, str]:
        """The name behind the token, and what the token may do; ("", "") without a token."""
        given = self.headers.get("Authorization")
        if given is None:
            return "", ""
        if (token := given.removeprefix("Bearer ")) not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _owns(self, namespace: str) -> bool:
        name, _ = self._user()
        return bool(name) and (name == namespace or name in self.hub.orgs.get(namespace, ()))

    def _check_writes(self, namespace: str) -> None:
        if self._user()[1] != "write" or not self._owns(namespace):
            raise Refused(403, f"Forbidden: you don't have the rights to write to {namespace}")

    def _repo(self, name: str, write: bool = False) -> Repo:
        namespace = name.split("/")[0]
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._owns(namespace)):
            raise Refused(404 if self._user()[0] else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_writes(namespace)
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        if (sha := repo.sha(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # The calls

    def whoami(self, _: bytes) -> Any:
        name, role = self._user()
        if not name:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"name": org, "roleInOrg": "write"} for org, members in self.hub.orgs.items() if name in members]
        return {"type": "user", "name": name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": {"role": role}}}

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or self._user()[0]
        name = f"{owner}/{asked['name']}"
        self._check_writes(owner)
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.create(name, asked.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}"}

    def validate(self, body: bytes) -> Any:
        try:
            ModelCard(json.loads(body)["content"])
        except Exception as error:
            raise Refused(400, "Invalid metadata in README.md", errors=[{"message": str(error)}]) from None
        return {"errors": [], "warnings": []}

    def branch(self, body: bytes, name: str, branch: str) -> Any:
        repo = self._repo(name, write=True)
        if branch in repo.branches or branch.startswith("refs/"):
            raise Refused(409 if branch in repo.branches else 400, f"Reference {branch}")
        repo.branches[branch] = self._sha(repo, json.loads(body or b"{}").get("startingPoint", "main"))
        return {}

    def refs(self, _: bytes, name: str) -> Any:
        repo = self._repo(name)
        rows = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in repo.branches.items()]
        tags = [{"name": ref, "ref": f"refs/tags/{ref}", "targetCommit": sha} for ref, sha in repo.tags.items()]
        return {"branches": [row for row in rows if not row["name"].startswith("refs/")], "tags": tags, "converts": []}

    def info(self, _: bytes, name: str, revision: str) -> Any:
        repo = self._repo(name)
        sha = self._sha(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, _: bytes, name: str, revision: str, folder: str) -> Any:
        repo = self._repo(name)
        start = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in repo.commits[self._sha(repo, revision)].items() if path.startswith(start)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", [""])[0].lower() not in ("true", "1"):
            inside = {path: blob for path, blob in inside.items() if "/" not in path.removeprefix(start)}
        rows = []
        for path, blob in inside.items():
            lfs = {"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {}
            rows.append({"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid, **lfs})
        return rows

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        repo = self._repo(name, write="create_pr" not in self.query)
        there = repo.commits[self._sha(repo, revision)]
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": there[path].oid if path in there else None,
                }
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
        }

    def batch(self, body: bytes, name: str) -> Any:
        asked, repo = json.loads(body), self._repo(name, write=False)
        objects = []
        for entry in asked["objects"]:
            oid, size = entry["oid"], entry["size"]
            if oid not in repo.objects:
                href = f"{self.hub.url}/lfs/{name}/{oid}"
                header = {}
                if size > self.hub.part_size and "multipart" in asked["transfers"]:
                    parts = -(-size // self.hub.part_size)
                    header = {"chunk_size": str(self.hub.part_size), **{str(n): f"{href}/{n}" for n in range(1, parts + 1)}}
                entry = {**entry, "actions": {"upload": {"href": href, "header": header}}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, name: str, oid: str, part: str) -> Any:
        if part:
            self.hub.parts[oid, int(part)] = body
            return 200, b"", {"ETag": hashlib.md5(body).hexdigest()}
        self._store(name, oid, body)
        return 200, b"", {}

    def complete(self, body: bytes, name: str, oid: str) -> Any:
        parts = sorted(json.loads(body)["parts"], key=lambda part: part["partNumber"])
        data = [self.hub.parts[oid, part["partNumber"]] for part in parts]
        if any(hashlib.md5(piece).hexdigest() != part["etag"] for piece, part in zip(data, parts, strict=True)):
            raise Refused(400, "a part is not what was sent")
        self._store(name, oid, b"".join(data))
        return {}

    def _store(self, name: str, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "the content has another hash")
        self.hub.repos[name].objects[oid] = data

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        pull = "create_pr" in self.query
        repo = self._repo(name, write=not pull)
        if pull and self._user()[1] != "write":
            raise Refused(403, "Forbidden: this token only reads")
        lines = [json.loads(line) for line in body.splitlines()]
        head, header = self._sha(repo, revision), lines[0]["value"]
        if not pull and revision not in repo.branches:
            raise Refused(400, f"{revision} is not a branch")
        if header.get("parentCommit", head) != head and not pull:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile" and value["oid"] in repo.objects:
                files[path] = Blob(repo.objects[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refused(400, f"{path} was not uploaded, or is not there")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.branches)
        sha = repo.commit(f"refs/pr/{number}" if pull else revision, files, header["summary"])
        url = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if pull else {}
        return {"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, **url}

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> Any:
        repo = self._repo(name)
        sha = self._sha(repo, revision)
        if (blob := repo.commits[sha].get(path)) is None:
            raise Refused(404, f"{path} is not in {name}", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return 200, blob.data, headers
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        return 302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{name}/{blob.sha256}"}

    def cdn(self, _: bytes, name: str, oid: str) -> Any:
        return 200, self.hub.repos[name].objects[oid], {"ETag": f'"{oid}"'}


_ID, _REV = "([^/]+/[^/]+)", "([^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{_ID}(?:/revision/{_REV})?", "info"),
    ("GET", f"/api/models/{_ID}/refs", "refs"),
    ("GET", f"/api/models/{_ID}/tree/{_REV}(?:/(.+))?", "tree"),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", "branch"),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", "preupload"),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", "commit"),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", f"/lfs/{_ID}/([0-9a-f]+)(?:/(\\d+))?", "put"),
    ("POST", f"/lfs/{_ID}/([0-9a-f]+)", "complete"),
    ("GET", f"/{_ID}/resolve/{_REV}/(.+)", "resolve"),
    ("GET", f"/cdn/{_ID}/([0-9a-f]+)", "cdn"),
]
