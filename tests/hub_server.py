"""A local server that speaks the Hub's API as huggingface_hub uses it, and the storage that it redirects to.

`with HubServer() as hub`: set `HF_ENDPOINT` to `hub.url`. Files that are stored with LFS come by a redirect to
`hub.storage`, another host and port, under a signed address; others come from the Hub itself. Both have ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import unquote, urlsplit

from raw_server import RawServer, Request

SIGNATURE = "signature=of-this-hour"


def commit_of(text: str) -> str:
    """Make a commit's name out of any text."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repo:
    """A model: files by revision (`commits` maps a revision to a commit), and who may have it.

    Files whose name ends as one in `stored` are stored with LFS. With `token`, whoever has none gets status 401; with
    `gated`, whoever has another one gets 403.
    """

    files: dict[str, dict[str, bytes]]
    commits: dict[str, str]
    stored: tuple[str, ...] = (".safetensors", ".bin")
    token: str = ""
    gated: bool = False
    # What the listing tells in place of the truth, by name of a file.
    lies: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Mapping[str, bytes], **more: object) -> Repo:
        """Make a model with one commit, `main`."""
        commit = commit_of("main")
        return cls({commit: dict(files)}, {"main": commit}, **more)  # type: ignore[arg-type]

    def commit(self, revision: str) -> str | None:
        """Give the commit of a branch, or of itself."""
        return self.commits.get(revision, revision if revision in self.files else None)


class HubServer:
    """The Hub and its storage; `requests` of both are remembered by them."""

    def __init__(self, host: str = "127.0.0.1", storage_host: str = "127.0.0.2") -> None:
        self.repos: dict[str, Repo] = {}
        self.signature = SIGNATURE
        self.hub = RawServer(self._answer, host)
        self.storage = RawServer(self._answer_storage, storage_host)
        self.url = self.hub.url
        self._objects: dict[str, bytes] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> HubServer:
        self._stack.enter_context(self.hub)
        self._stack.enter_context(self.storage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _answer(self, request: Request) -> None:
        path = urlsplit(request.path).path
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) in (4, 6):
            self._answer_api(request, "/".join(parts[2:4]), parts[5] if len(parts) == 6 else "main")
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._answer_resolve(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            request.reply(404)

    def _allowed(self, request: Request, name: str) -> Repo | None:
        """Give a model to whoever may have it, or answer why not."""
        repo = self.repos.get(name)
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if repo is None:
            request.reply(404 if given else 401, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and given != repo.token:
            request.reply(403 if given else 401, {"X-Error-Code": "GatedRepo"})
        elif repo.token and not given:
            request.reply(401, {"X-Error-Code": "RepoNotFound"})
        elif repo.token and given != repo.token:
            request.reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            return repo
        return None

    def _answer_api(self, request: Request, name: str, revision: str) -> None:
        repo = self._allowed(request, name)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None:
            request.reply(404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [self._sibling(repo, file, content) for file, content in repo.files[commit].items()]
        body = {"id": name, "modelId": name, "sha": commit, "private": bool(repo.token), "siblings": siblings}
        body |= {"tags": [], "downloads": 0, "likes": 0, "gated": "manual" if repo.gated else False}
        request.reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _sibling(self, repo: Repo, name: str, content: bytes) -> dict[str, object]:
        told: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
        if name.endswith(repo.stored):
            digest = hashlib.sha256(content).hexdigest()
            told["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
        lie = repo.lies.get(name)
        return {**told, **lie} if isinstance(lie, dict) else told

    def _answer_resolve(self, request: Request, name: str, revision: str, file: str) -> None:
        repo = self._allowed(request, name)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None or file not in repo.files[commit]:
            request.reply(404, {"X-Error-Code": "RevisionNotFound" if commit is None else "EntryNotFound"})
            return
        content = repo.files[commit][file]
        if not file.endswith(repo.stored):
            request.reply_file(content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit})
            return
        digest = hashlib.sha256(content).hexdigest()
        self._objects[digest] = content
        headers = {
            "Location": f"{self.storage.url}/objects/{digest}?{self.signature}",
            "X-Repo-Commit": commit,
            "X-Linked-Size": len(content),
            "X-Linked-ETag": f'"{digest}"',
        }
        request.reply(302, headers)

    def _answer_storage(self, request: Request) -> None:
        url = urlsplit(request.path)
        content = self._objects.get(url.path.removeprefix("/objects/"))
        if url.query != self.signature:
            request.reply(403, {"Connection": "keep-alive", "Content-Length": 9}, b"<x>")
            request.hold()
        elif content is None or "authorization" in request.headers:
            # Real storage refuses a request that is both signed and authorized.
            request.reply(400)
        else:
            request.reply_file(content, {"ETag": '"of-the-storage"'})


def blob_id(content: bytes) -> str:
    """Give git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
