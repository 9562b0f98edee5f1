"""A stand-in for the Hugging Face Hub: local directories, served the way huggingface_hub expects.

It speaks as much of the hub's HTTP as `model_info`, `list_repo_tree`, `hf_hub_download`, `snapshot_download` and
`get_safetensors_metadata` use. Nothing in the client is patched: a process finds it by its environment alone. As
huggingface_hub reads that environment when it is imported, and conftest.py puts the test process offline, the client
belongs into a process of its own, started with `{**os.environ, **hub.environment(home)}`.
"""

import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".gguf")
CHUNK = 64 * 1024
STRANGER = "hf_stranger"
"""The one token that no gated repository lets in (403); without a token the answer is 401."""

_REPO = r"/(?P<repo>[^/]+(?:/[^/]+)?)"
_INFO = re.compile(rf"/api/models{_REPO}(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(rf"/api/models{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
_FILE = re.compile(rf"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Request:
    """What a client asked for, as it stands in the request line, and how much of a body it was sent."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int = 0


@dataclass(frozen=True)
class File:
    """A file of a revision; its hashes, which are its etag, are made when first asked for."""

    path: Path
    size: int

    @property
    def lfs(self) -> bool:
        return self.path.name.endswith(LFS)

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git keeps in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def blob(self) -> str:
        """The hash git knows the file by."""
        content = self.pointer if self.lfs else self.path.read_bytes()
        return _sha1(b"blob %d\0" % len(content) + content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


class Revision:
    """The files of a directory at the moment it was added.

    The commit hash covers names and sizes only: what differs in neither is one commit to the client and its cache.
    """

    def __init__(self, directory: Path) -> None:
        found = sorted(path for path in directory.rglob("*") if path.is_file())
        self.files = {path.relative_to(directory).as_posix(): File(path, path.stat().st_size) for path in found}
        self.commit = _sha1(json.dumps({name: file.size for name, file in self.files.items()}).encode())


@dataclass
class Repo:
    """A model repository: its revisions by name and by commit."""

    gated: bool = False
    revisions: dict[str, Revision] = field(default_factory=dict)


class Hub:
    """A hub on this machine, from its construction until `stop` or the end of its `with` block.

    `requests` holds every request in order of arrival. Setting `fail_after` breaks the connection after so many bytes
    of the next file body that is longer, once.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.fail_after: int | None = None
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, repo_id: str, directory: Path, revision: str = "main", gated: bool = False) -> None:
        """Serve a directory as a revision; an earlier one of that name remains under its commit hash."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.gated = gated
        added = Revision(directory)
        repo.revisions[revision] = repo.revisions[added.commit] = added

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs in its environment to use this hub, with its cache and its token below `home`.

        It sees no proxy, no xet, no telemetry (which would ask the hub for more than the tests expect) and nobody's
        token; for gated repositories add an `HF_TOKEN`.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def stop(self) -> None:
        """Become unreachable, for clients with an open connection too."""
        self._server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _break_after(self, length: int) -> int | None:
        """Return after how many bytes to break this body, if it is the one to break."""
        with self._lock:
            limit = self.fail_after
            if limit is None or length <= limit:
                return None
            self.fail_after = None
            return limit


_Answer = Callable[[Repo, Revision, dict[str, str], dict[str, bool]], None]


class _Server(ThreadingHTTPServer):
    """A server that knows its connections: clients keep them open, and they outlive the listening socket."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that leaves is no error
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.connections.copy():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; HEAD is GET without a body."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        for route, answer in ((_FILE, self._file), (_TREE, self._tree), (_INFO, self._info)):
            if match := route.fullmatch(url.path):
                wanted = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                query = {key: values[-1].lower() == "true" for key, values in parse_qs(url.query).items()}
                return self._look_up(wanted, query, answer)
        return self._error(404, "", "Not Found")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the requests are in `Hub.requests`."""

    def _look_up(self, wanted: dict[str, str], query: dict[str, bool], answer: _Answer) -> None:
        repo = self.server.hub.repos.get(wanted["repo"])
        if repo is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        revision = repo.revisions.get(wanted.get("revision", "main"))
        if revision is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {wanted.get('revision', 'main')}")
        return answer(repo, revision, wanted, query)

    def _info(self, repo: Repo, revision: Revision, wanted: dict[str, str], query: dict[str, bool]) -> None:
        """Answer `model_info`; the hub tells this about gated repositories to everyone."""
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in revision.files]
        if query.get("blobs"):
            for sibling, file in zip(siblings, revision.files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.blob}
                if file.lfs:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
        self._json(
            {
                "id": wanted["repo"],
                "modelId": wanted["repo"],
                "sha": revision.commit,
                "private": False,
                "disabled": False,
                "gated": "manual" if repo.gated else False,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(self, repo: Repo, revision: Revision, wanted: dict[str, str], query: dict[str, bool]) -> None:
        """Answer `list_repo_tree`, on one page."""
        top = PurePosixPath(wanted.get("path", ""))
        entries: dict[PurePosixPath, dict[str, Any]] = {}
        for name, file in revision.files.items():
            path = PurePosixPath(name)
            if top not in path.parents:
                continue
            for folder in path.parents:
                if top in folder.parents:
                    entries[folder] = {"type": "directory", "oid": _sha1(str(folder).encode()), "size": 0}
            entries[path] = {"type": "file", "oid": file.blob, "size": file.size}
            if file.lfs:
                entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
        if not entries:
            return self._error(404, "EntryNotFound", f"{top} does not exist", revision)
        deep = query.get("recursive")
        listed = [path for path in sorted(entries) if deep or path.parent == top]
        return self._json([{"path": str(path), **entries[path]} for path in listed])

    def _file(self, repo: Repo, revision: Revision, wanted: dict[str, str], query: dict[str, bool]) -> None:
        """Answer a download, whole or in part; the hub itself would send it on to another host for a large file."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer").strip()
        if repo.gated and token in ("", STRANGER):
            return self._error(403 if token else 401, "GatedRepo", f"Access to model {wanted['repo']} is restricted")
        file = revision.files.get(wanted["path"])
        if file is None:
            return self._error(404, "EntryNotFound", "Entry not found", revision)
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{file.etag}"',
            "X-Repo-Commit": revision.commit,
        }
        if file.lfs:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.etag}"'}
        part = _part(self.headers.get("Range"), file.size)
        if part is None:
            return self._send(200, headers, file.size, file)
        if not part:
            return self._send(416, headers | {"Content-Range": f"bytes */{file.size}"}, 0)
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{file.size}"
        return self._send(206, headers, len(part), file, part.start)

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self._send(200, {"Content-Type": "application/json"}, len(body), body)

    def _error(self, status: int, code: str, message: str, revision: Revision | None = None) -> None:
        """Refuse in the hub's way: the client goes by the error code, and remembers a missing file by its commit."""
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        if revision:
            headers["X-Repo-Commit"] = revision.commit
        self._send(status, headers, len(message), message.encode())

    def _send(
        self, status: int, headers: dict[str, str], length: int, body: bytes | File = b"", start: int = 0
    ) -> None:
        """Send an answer, and count its body before it leaves: who has received it finds it counted."""
        request = Request(self.command, self.path, self.headers.get("Range"), status)
        self.server.hub.requests.append(request)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, bytes):
            request.sent = len(body)
            self.wfile.write(body)
            return
        limit = self.server.hub._break_after(length)
        self.close_connection = self.close_connection or limit is not None
        remaining = length if limit is None else limit
        with body.path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(min(CHUNK, remaining)):
                remaining -= len(chunk)
                request.sent += len(chunk)
                self.wfile.write(chunk)


def _part(header: str | None, size: int) -> range | None:
    """Return which bytes a Range header asks for, empty when the file has none of them; None is the whole file."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match.group() == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return range(max(size - int(last), 0), size)
    return range(int(first), min(int(last) + 1, size) if last else size)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
