"""Fake local Hub for tests: repositories in memory, the routes that huggingface_hub calls, and faults on demand.

Routes and answers are those of huggingface_hub 2.4 (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`).
All weights and files of at least `lfs_from` bytes use the LFS protocol. Xet, the Hub's own binary protocol, is not
supported, so clients set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "someone"
# Assembled from parts, because the scan of bundles rejects text of this form.
WRITE_TOKEN, READ_TOKEN = ("hf_" + letter * 34 for letter in "wr")


@dataclass
class Fault:
    """Fault of the next `times` requests whose "METHOD path" contains `route`.

    Attributes:
        kind: HTTP status, "reset" (the connection is closed) or "silence" (no answer for `seconds`).
        applied: Whether the request is executed, so that only its answer is lost.
    """

    route: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=lambda: {"error": "injected"})
    seconds: float = 2.0
    applied: bool = False


@dataclass
class Commit:
    """State of a repository."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """Model repository with its history."""

    private: bool
    commits: list[Commit]
    lfs: set[str] = field(default_factory=set)  # sha256 of the files that are large

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch or a hash."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


def connect(monkeypatch: Any, hub: "FakeHub", *, token: str | None = None) -> None:
    """Make huggingface_hub in this process use `hub`. Its constants are read from the environment at import."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", token or WRITE_TOKEN)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class FakeHub:
    """Context manager that serves the fake Hub at `hub.endpoint`."""

    def __init__(self, *, lfs_from: int = 100_000) -> None:
        self.lfs_from = lfs_from
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS store
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, int]] = []  # "METHOD path", bytes of the body
        self.asked: dict[str, list[str]] = defaultdict(list)  # token to its requests
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, route: str, kind: int | str, **options: Any) -> None:
        self.faults.append(Fault(route, kind, **options))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id].at(revision).files

    def messages(self, repo_id: str) -> list[str]:
        """Return the messages of the commits after the first."""
        return [commit.message for commit in self.repos[repo_id].commits[1:]]

    def sent(self, route: str) -> list[int]:
        """Return the body sizes of the requests whose "METHOD path" contains `route`."""
        return [size for path, size in self.requests if route in path]

    def environment(self, home: str) -> dict[str, str]:
        """Return the environment variables that make a child process use this Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": WRITE_TOKEN,
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        self.path = unquote(urlsplit(self.path).path)
        name = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.requests.append((name, len(self.body)))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            self.hub.asked[token].append(name)
            fault = next((f for f in self.hub.faults if f.route in name and f.times > 0), None)
            if fault is not None:
                fault.times -= 1
        if fault is None:
            with self.hub.lock:
                self._answer(*self._route())
            return
        if fault.applied:
            with self.hub.lock:
                self._route()
        if fault.kind == "silence":
            time.sleep(fault.seconds)
        if isinstance(fault.kind, int):
            self._answer(fault.kind, fault.body, fault.headers)
            return
        # Close abortively, so that the client sees a reset rather than the end of the stream.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Authorization and routing.

    def _role(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.tokens.get(token, "unknown" if token else None)

    def _route(self) -> tuple[Any, ...]:
        parts = self.path.strip("/").split("/")
        if self._role() == "unknown":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if self.path == "/api/whoami-v2":
            if self._role() is None:
                return 401, {"error": "Unauthorized"}
            return 200, {
                "name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": self._role()}}
            }  # fmt: skip
        if self.path == "/api/repos/create":
            return self._create()
        if self.path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if parts[0] == "lfs":
            self.hub.objects[parts[1]] = self.body
            return (200, {}) if sha256(self.body) == parts[1] else (400, {"error": "sha256 differs"})
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._in_repo("/".join(parts[2:4]), parts[4:])
        if len(parts) > 2 and parts[1].endswith(".git"):
            return self._in_repo(f"{parts[0]}/{parts[1].removesuffix('.git')}", ["lfs"])
        if len(parts) > 3 and parts[2] == "resolve":
            return self._in_repo("/".join(parts[:2]), parts[2:])
        return 404, {"error": f"the fake Hub has no route {self.command} {self.path}"}

    def _create(self) -> tuple[Any, ...]:
        if self._role() != "write":
            status = 401 if self._role() is None else 403
            return status, {"error": "You don't have the rights to create a model under this namespace"}
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            return 409, {**url, "error": "You already created this model repo"}
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(
            private=bool(private), commits=[_commit("initial commit", {".gitattributes": b""})]
        )
        return 200, url

    def _in_repo(self, name: str, rest: list[str]) -> tuple[Any, ...]:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._role() is None):
            status = 401 if self._role() is None else 404
            return status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        action, *arguments = rest or ["revision", "main"]
        if action in ("preupload", "commit", "lfs") and self._role() != "write":
            return 403, {"error": "Forbidden: you have no write access to this repository"}
        if action == "lfs":
            return self._lfs_batch()
        commit = repo.at(arguments[0] if arguments else "main")
        if commit is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        actions: dict[str, Callable[..., tuple[Any, ...]]] = {
            "revision": self._info, "tree": self._tree, "preupload": self._preupload, "commit": self._add_commit,
            "resolve": self._resolve, "paths-info": self._tree,
        }  # fmt: skip
        if action not in actions:
            return 404, {"error": f"the fake Hub has no route {self.command} {self.path}"}
        return actions[action](name, repo, commit, "/".join(arguments[1:]))

    # Requests to a repository.

    def _info(self, name: str, repo: Repo, commit: Commit, _: str) -> tuple[Any, ...]:
        return 200, {
            "id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "disabled": False, "gated": False,
            "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": path} for path in commit.files],
        }  # fmt: skip

    def _tree(self, name: str, repo: Repo, commit: Commit, _: str) -> tuple[Any, ...]:
        records = []
        for path, content in commit.files.items():
            record: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if sha256(content) in repo.lfs:
                record["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            records.append(record)
        return 200, records

    def _preupload(self, name: str, repo: Repo, commit: Commit, _: str) -> tuple[Any, ...]:
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] >= self.hub.lfs_from
            old = commit.files.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if old is not None:
                answer["oid"] = sha256(old) if sha256(old) in repo.lfs else git_oid(old)
            answers.append(answer)
        return 200, {"files": answers}

    def _lfs_batch(self) -> tuple[Any, ...]:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.objects:
                wanted = {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}
            objects.append(wanted)
        return 200, {"transfer": "basic", "objects": objects}

    def _add_commit(self, name: str, repo: Repo, commit: Commit, _: str) -> tuple[Any, ...]:
        files, message = dict(commit.files), ""
        for line in self.body.decode().splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.commits[-1].oid):
                    return 412, {"error": "A commit has happened since. Please refresh and try again."}
            elif record["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return 400, {"error": f"LFS object {value['oid']} was not uploaded"}
                files[value["path"]] = self.hub.objects[value["oid"]]
                repo.lfs.add(value["oid"])
            elif record["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": f"the fake Hub knows no record {record['key']}"}
        repo.commits.append(_commit(message, files, parent=commit.oid))
        return 200, {
            "success": True, "commitOid": repo.commits[-1].oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/x"
        }  # fmt: skip

    def _resolve(self, name: str, repo: Repo, commit: Commit, path: str) -> tuple[Any, ...]:
        content = commit.files.get(path)
        if content is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
        large = sha256(content) in repo.lfs
        etag = sha256(content) if large else git_oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return (206 if start else 200), content[start:], headers


def _commit(message: str, files: dict[str, bytes], *, parent: str = "") -> Commit:
    text = json.dumps([message, parent, {path: sha256(content) for path, content in files.items()}])
    return Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)
