"""A local server with those parts of the Hugging Face Hub that its Python client calls.

It keeps repositories in memory, one dictionary of files for each branch, and receives files as the
Hub does: small ones inside the commit, others as Git LFS objects, whose hash it checks.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_standin"
LARGE_BYTES = 4096
"""Size from which a file is an LFS object; the Hub decides by name and size."""


@dataclass
class Repository:
    """A repository: settings at its creation, files by branch, and commits, oldest first."""

    settings: dict[str, Any]
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Hub:
    """The Hub: repositories by "model/USER/NAME" or "space/USER/NAME", and LFS objects by hash."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run the server in a thread."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", answer: Any = None):
        super().__init__(message)
        self.status, self.message, self.code, self.answer = status, message, code, answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def _handle(self) -> None:
        body = self._read()
        path = unquote(urlsplit(self.path).path)
        try:
            self._route(path, body)
        except _Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            message = {"X-Error-Message": refused.message}
            self._send(json.dumps(refused.answer or {}).encode(), refused.status, code | message)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _route(self, path: str, body: bytes) -> None:
        if not path.startswith("/lfs/"):
            self._check_token()
        for methods, pattern, answer in _ROUTES:
            if self.command in methods and (found := re.fullmatch(pattern, path)):
                return answer(self, body, **found.groupdict())
        raise _Refused(404, f"no such route: {self.command} {path}")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _check_token(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.tokens.add(token)
        if self.command not in ("GET", "HEAD") and token != TOKEN:
            raise _Refused(401, "Invalid username or password.")

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _find(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return repository

    def _files(self, kind: str, name: str, branch: str) -> dict[str, bytes]:
        branches = self._find(kind, name).branches
        if branch not in branches:
            raise _Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return branches[branch]

    # ---- Routes

    def create(self, body: bytes) -> None:
        settings = json.loads(body)
        if settings["organization"] not in (None, "me"):
            raise _Refused(403, f"You don't have the rights to create under {settings['name']}")
        kind, name = settings.get("type", "model"), f"{settings['organization']}/{settings['name']}"
        answer = {"url": f"{self.hub.endpoint}/{'spaces/' if kind == 'space' else ''}{name}"}
        if f"{kind}/{name}" in self.hub.repositories:
            raise _Refused(409, "You already created this repo", answer=answer)
        made = self.hub.repositories[f"{kind}/{name}"] = Repository(settings)
        made.branches["main"][".gitattributes"] = b"*.onnx filter=lfs\n"
        if kind == "space":
            made.branches["main"] |= {"index.html": b"new", "style.css": b"new", "README.md": b""}
        made.commits.append({"summary": "initial commit"})
        self._answer(answer)

    def branch(self, _: bytes, kind: str, name: str, branch: str) -> None:
        branches = self._find(kind, name).branches
        if branch in branches:
            raise _Refused(409, "Reference already exists")
        branches[branch] = dict(branches["main"])
        self._answer({})

    def tree(self, _: bytes, kind: str, name: str, branch: str) -> None:
        files = self._files(kind, name, branch)
        self._answer(
            [
                {"type": "file", "path": path, "size": len(data), "oid": _hash_blob(data)}
                for path, data in files.items()
            ]
        )

    def validate(self, body: bytes) -> None:
        before, header, _ = json.loads(body)["content"].split("---\n", 2)
        assert before == ""
        json.dumps(yaml.safe_load(header), ensure_ascii=False).encode()
        self._answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, kind: str, name: str, branch: str) -> None:
        ignored = self._files(kind, name, branch).get(".gitignore", b"").split()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE_BYTES else "regular",
                "shouldIgnore": file["path"].encode() in ignored,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def batch(self, body: bytes, prefix: str, name: str) -> None:
        self._find("space" if prefix else "model", name)
        href = f"{self.hub.endpoint}/lfs/"
        objects = [
            {**entry, "actions": {"upload": {"href": href + entry["oid"]}}}
            for entry in json.loads(body)["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._send(b"")

    def commit(self, body: bytes, kind: str, name: str, branch: str) -> None:
        files, changes = (
            dict(self._files(kind, name, branch)),
            [*map(json.loads, body.splitlines())],
        )
        for change in changes:
            value = change["value"]
            match change["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                    assert len(files[value["path"]]) == value["size"]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    assert other == "header"
        repository = self._find(kind, name)
        repository.branches[branch] = files
        repository.commits.append(changes[0]["value"])
        oid = f"{len(repository.commits):040x}"
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url})

    def info(self, _: bytes, kind: str, name: str, branch: str | None) -> None:
        branch = branch or "main"
        files = [{"rfilename": path} for path in self._files(kind, name, branch)]
        self._answer({"id": name, "sha": branch, "siblings": files})

    def commits(self, _: bytes, kind: str, name: str, branch: str) -> None:
        self._files(kind, name, branch)
        self._answer(
            [
                {
                    "id": f"{number:040x}",
                    "authors": [],
                    "date": "2026-01-01T00:00:00.000Z",
                    "title": commit["summary"],
                    "message": "",
                }
                for number, commit in reversed([*enumerate(self._find(kind, name).commits)])
            ]
        )

    def resolve(self, _: bytes, prefix: str, name: str, branch: str, path: str) -> None:
        files = self._files("space" if prefix else "model", name, branch)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        data = files[path]
        oid = hashlib.sha256(data).hexdigest()
        if oid in self.hub.objects:
            return self._send(b"", 302, {"Location": f"{self.hub.endpoint}/lfs/{oid}"})
        return self._send_file(data, _hash_blob(data))

    def get(self, _: bytes, oid: str) -> None:
        self._send_file(self.hub.objects[oid], oid)

    def _send_file(self, data: bytes, tag: str) -> None:
        self._send(data, headers={"ETag": f'"{tag}"', "X-Repo-Commit": "main"})


def _hash_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = "(?P<name>[^/]+/[^/]+)"
_API = f"/api/(?P<kind>model|space)s/{_NAME}"
_BRANCH = "(?P<branch>[^/]+)"
_OBJECT = "/lfs/(?P<oid>[0-9a-f]{64})"
_READ = ("GET", "HEAD")
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), f"{_API}/branch/{_BRANCH}", _Handler.branch),
    (_READ, f"{_API}/tree/{_BRANCH}", _Handler.tree),
    (("POST",), f"{_API}/preupload/{_BRANCH}", _Handler.preupload),
    (("POST",), f"{_API}/commit/{_BRANCH}", _Handler.commit),
    (_READ, f"{_API}(/revision/{_BRANCH})?", _Handler.info),
    (("POST",), f"/(?P<prefix>spaces/)?{_NAME}.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), _OBJECT, _Handler.put),
    (_READ, _OBJECT, _Handler.get),
    (_READ, f"{_API}/commits/{_BRANCH}", _Handler.commits),
    (_READ, f"/(?P<prefix>spaces/)?{_NAME}/resolve/{_BRANCH}/(?P<path>.*)", _Handler.resolve),
]
