"""A Hugging Face Hub on this machine's loopback, for tests: it speaks to huggingface_hub itself.

Repositories of models live in memory, each a list of commits. It serves what ``snapshot_download``,
``from_pretrained``, ``create_repo`` and ``upload_folder`` ask for: revisions, listings, files with
entity tags and ranges, git-LFS uploads and commits. Set ``HF_ENDPOINT`` to its address before
huggingface_hub is imported, since it reads the variable then.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]
LARGE = 1 << 12
"""Bytes from which a file that is no text is uploaded by git-LFS."""


@dataclass
class Repository:
    """A repository's history.

    Attributes:
        commits: id of each commit to its files, oldest first.
        branches: name of each branch or tag to a commit's id.
        private: whether it was made as such.
    """

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit of these files on a branch; its id."""
        text = json.dumps([branch, len(self.commits), sorted(files)])
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or id names."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class LoopbackHub:
    """The server; a context manager that runs it in a thread.

    Attributes:
        repositories: by name, ``"owner/name"``.
        requests: how often each method and path was asked for, without queries.
        ranges: the byte ranges that were asked for, in order.
        interrupt_after: bytes after which the next download of a file breaks off; once.

    Example:
        >>> with LoopbackHub() as hub:                                    # doctest: +SKIP
        ...     hub.repositories["me/tiny"] = Repository()
        ...     run(env={"HF_ENDPOINT": hub.address})
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.interrupt_after: int | None = None
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            """Bound to this hub."""

            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        """What ``HF_ENDPOINT`` has to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ---- what requests do ------------------------------------------------------------------------

    def _info(self, name: str, revision: str) -> dict[str, Any] | None:
        repository = self.repositories.get(name)
        commit = repository.find(revision) if repository else None
        if repository is None or commit is None:
            return None
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        private = repository.private
        return {
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": siblings,
            "private": private,
        }

    def _tree(self, name: str, revision: str) -> list[dict[str, Any]] | None:
        repository = self.repositories.get(name)
        commit = repository.find(revision) if repository else None
        if repository is None or commit is None:
            return None
        return [_entry(path, data) for path, data in sorted(repository.commits[commit].items())]

    def _create(self, asked: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.repositories
        if not known:
            hidden = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.repositories[name] = Repository(private=hidden)
            self.repositories[name].commit({})
        return (409 if known else 200), {"url": f"{self.address}/{name}", "name": name}

    def _commit(self, name: str, branch: str, lines: list[Any]) -> dict[str, Any]:
        repository = self.repositories[name]
        files = dict(repository.commits[repository.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch)
        url = f"{self.address}/{name}/commit/{commit}"
        return {"commitUrl": url, "commitOid": commit, "hookOutput": "", "success": True}

    def _batch(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        objects = []
        for found in asked["objects"]:
            actions = {"upload": {"href": f"{self.address}/upload/{found['oid']}"}}
            new = found["oid"] not in self._large
            objects.append({**found, **({"actions": actions} if new else {})})
        return {"transfer": "basic", "objects": objects}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
    if _is_large(data):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
    return entry


def _is_large(data: bytes) -> bool:
    return len(data) >= LARGE and b"\0" in data[:512]


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server_hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("HEAD")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _dispatch(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server_hub.requests[f"{method} {path}"] += 1
        for pattern, methods, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods:
                handle(self, body, *match.groups())
                return
        self._answer(404, {"error": f"{method} {path} is not served"})

    def _answer(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _whoami(self, body: bytes) -> None:
        self._answer(200, {"type": "user", "name": "me", "orgs": [], "auth": {}})

    def _fine(self, body: bytes, *_: str) -> None:
        self._answer(200, {"warnings": [], "errors": []})

    def _create(self, body: bytes) -> None:
        self._answer(*self.server_hub._create(json.loads(body)))

    def _info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if name not in self.server_hub.repositories:
            self._missing("RepoNotFound")
            return
        found = self.server_hub._info(name, revision or "main")
        if found is None:
            self._missing("RevisionNotFound")
        else:
            self._answer(200, found)

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        found = self.server_hub._tree(name, revision)
        if found is None:
            self._missing("RevisionNotFound")
        else:
            self._answer(200, found)

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        files = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if asked["size"] >= LARGE and _binary(asked) else "regular",
                "shouldIgnore": False,
            }
            for asked in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        self._answer(200, self.server_hub._batch(json.loads(body)))

    def _upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "the digest is another"})
            return
        self.server_hub._large[oid] = body
        self._answer(200, {})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line]
        self._answer(200, self.server_hub._commit(name, revision, lines))

    def _file(self, body: bytes, name: str, revision: str, path: str) -> None:
        hub = self.server_hub
        repository = hub.repositories.get(name)
        commit = repository.find(revision) if repository else None
        if repository is None or commit is None:
            self._missing("RepoNotFound" if repository is None else "RevisionNotFound")
        elif path not in repository.commits[commit]:
            self._missing("EntryNotFound")
        else:
            self._send(repository.commits[commit][path], commit)

    def _send(self, data: bytes, commit: str) -> None:
        """A file, or the asked part of it."""
        start, asked = 0, self.headers.get("Range")
        if asked:
            self.server_hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        etag = hashlib.sha256(data).hexdigest() if _is_large(data) else _git_id(data)
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        part = data[start:]
        limit = self.server_hub.interrupt_after
        if limit is not None and len(part) > limit:
            self.server_hub.interrupt_after = None
            self.wfile.write(part[:limit])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(part)


def _binary(asked: Mapping[str, Any]) -> bool:
    return b"\0" in base64.b64decode(asked["sample"])


_NAME, _REV = r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES: list[tuple[str, tuple[str, ...], Callable[..., None]]] = [
    (r"/api/whoami-v2", ("GET",), _Handler._whoami),
    (r"/api/validate-yaml", ("POST",), _Handler._fine),
    (r"/api/repos/create", ("POST",), _Handler._create),
    (rf"/api/models/{_NAME}/revision/{_REV}", ("GET",), _Handler._info),
    (rf"/api/models/{_NAME}/tree/{_REV}", ("GET",), _Handler._tree),
    (rf"/api/models/{_NAME}/preupload/{_REV}", ("POST",), _Handler._preupload),
    (rf"/api/models/{_NAME}/commit/{_REV}", ("POST",), _Handler._commit),
    (rf"/api/models/{_NAME}", ("GET",), _Handler._info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", ("POST",), _Handler._batch),
    (r"/upload/([0-9a-f]{64})", ("PUT",), _Handler._upload),
    (rf"/{_NAME}/resolve/{_REV}/(.+)", ("GET", "HEAD"), _Handler._file),
]
