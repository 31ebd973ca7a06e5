"""A Hugging Face Hub of our own: real sockets, the Hub's protocol, and faults on demand.

As there, a large file is answered by a redirect to another origin (`resolve` says what it is, the store sends it),
which refuses whoever brings a token along. What it speaks is held against the Hub's own client in `test_hub_server.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 1000
"""Files on one page of a tree, as on the Hub."""
_SLICE = 1024 * 1024
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|refs)(?:/(?P<revision>[^/]+))?)?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class HubFile:
    """One file of a repository: `content`, then zeros up to `size`.

    Attributes:
        content: how it begins.
        size: bytes of all of it; as long as its content if it is not said.
        is_lfs: whether it lies in the store, with its hash known, or in git itself.
        tells_hash: whether the store's hash is told; a mirror may not.
    """

    content: bytes
    size: int = -1
    is_lfs: bool = True
    tells_hash: bool = True

    @cached_property
    def length(self) -> int:
        """Bytes of all of it."""
        return len(self.content) if self.size < 0 else self.size

    @cached_property
    def oid(self) -> str:
        """Its SHA-256; of one that is longer than its content, of that content."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """What git calls what it holds: all of it, or a pointer into the store."""
        held = self.content
        if self.is_lfs:
            held = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.length}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(held) + held, usedforsecurity=False).hexdigest()

    def part(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from `begin` up to `end`, in pieces."""
        view = memoryview(self.content)
        while begin < end:
            upto = min(end, begin + _SLICE)
            if begin < len(self.content):
                upto = min(upto, len(self.content))
                yield bytes(view[begin:upto])
            else:
                yield bytes(upto - begin)
            begin = upto


@dataclass
class Repository:
    """A repository, whose branch `main` is at `commit`.

    Attributes:
        files: by their paths.
        commit: of `main`, and of every revision in `revisions`.
        revisions: other names of that commit.
        is_private: whether it is not there for who brings no token.
        gated_to: the tokens that may read its files, None for everybody.
    """

    files: dict[str, HubFile]
    commit: str = "a" * 40
    revisions: tuple[str, ...] = ()
    is_private: bool = False
    gated_to: tuple[str, ...] | None = None


@dataclass
class Fault:
    """What goes wrong with the next requests whose path holds `path`.

    Attributes:
        path: a part of the path.
        times: how many requests it befalls.
        method: only requests of this method, empty for all.
        at: `hub` or `store`.
        status: it is refused with this.
        headers: that the refusal has besides.
        body: it is answered with this instead.
        cut_after: so many bytes of the body are sent, and the connection is closed.
        stall_after: so many bytes of the body are sent, and nothing more.
        flip: the byte at this place of the file is another.
        ignores_range: the whole file is sent though a part was asked for.
        new_etag: the file has another ETag from now on.
    """

    path: str = ""
    times: int = 1
    method: str = "GET"
    at: str = "store"
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int = -1
    stall_after: int = -1
    flip: int = -1
    ignores_range: bool = False
    new_etag: str = ""


@dataclass(frozen=True)
class Asked:
    """A request that came, and how much of a body was sent."""

    at: str
    method: str
    path: str
    headers: dict[str, str]
    sent: list[int]

    @property
    def range(self) -> str:
        """The range that was asked for, empty for the whole file."""
        return self.headers.get("range", "")


class HubServer:
    """The Hub on one port of 127.0.0.1, its store on another; `url` is for HF_ENDPOINT.

    Args:
        repositories: by their names.
        tokens: those that are good.
        page: files on one page of a tree.
    """

    def __init__(
        self, repositories: dict[str, Repository] | None = None, *, tokens: Sequence[str] = (), page: int = PAGE
    ) -> None:
        self.repositories = repositories or {}
        self.tokens = tuple(tokens)
        self.page = page
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.released = threading.Event()  # ends all stalls
        self.etags: dict[str, str] = {}
        self._lock = threading.Lock()
        self._servers = [_Server(self, handler) for handler in (_Hub, _Store)]
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}) for server in self._servers
        ]

    def __repr__(self) -> str:
        return f"<HubServer {self.url} {sorted(self.repositories)}>"

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.cut_all()
            server.server_close()
        for thread in self._threads:
            thread.join()

    @property
    def url(self) -> str:
        """Where the Hub is."""
        return self._servers[0].url

    @property
    def store_url(self) -> str:
        """Where its large files are."""
        return self._servers[1].url

    def file(self, oid: str) -> HubFile | None:
        """What the store has under this hash."""
        found = (file for repo in self.repositories.values() for file in repo.files.values() if file.oid == oid)
        return next(found, None)

    def fault_for(self, at: str, method: str, path: str) -> Fault | None:
        """What is to go wrong with this request."""
        with self._lock:
            for fault in self.faults:
                if fault.at == at and fault.path in path and fault.method in {"", method} and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def downloads(self) -> list[Asked]:
        """The requests that the store had."""
        return [asked for asked in self.asked if asked.at == "store"]


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, handler: type[_Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        for connection in tuple(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in the middle are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    at: ClassVar[str]
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its own name)
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._asked = Asked(
            self.at, self.command, unquote(self.path), {k.lower(): v for k, v in self.headers.items()}, [0]
        )
        hub = self.server.hub
        hub.asked.append(self._asked)
        fault = hub.fault_for(self.at, self.command, self._asked.path)
        if fault is not None and fault.status:
            self._refuse(fault.status, **fault.headers)
        elif fault is not None and fault.body:
            self._answer(200, fault.body, **{"Content-Type": "application/json"})
        else:
            self._serve(hub, fault)

    do_HEAD = do_GET  # noqa: N815 (its own name)

    def _serve(self, hub: HubServer, fault: Fault | None) -> None:
        raise NotImplementedError

    def _refuse(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        body = json.dumps({"error": message or HTTPStatus(status).phrase}).encode()
        more = {"X-Error-Code": code, "X-Error-Message": message}
        self._answer(status, body, **{name: value for name, value in more.items() if value}, **headers)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, file: HubFile, etag: str, fault: Fault | None, **more: str) -> None:
        fault = fault or Fault()
        begin, end, status = 0, file.length, HTTPStatus.OK
        asked, only_if = self.headers.get("Range"), self.headers.get("If-Range")
        if asked and not fault.ignores_range and only_if in {None, etag}:
            found = _RANGE.fullmatch(asked)
            assert found is not None, asked
            begin, status = int(found[1]), HTTPStatus.PARTIAL_CONTENT
            end = min(end, int(found[2]) + 1) if found[2] else end
            if begin >= file.length:
                self._refuse(416, **{"Content-Range": f"bytes */{file.length}"})
                return
        self.send_response(status)
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Length": str(end - begin), **more}
        if status is HTTPStatus.PARTIAL_CONTENT:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{file.length}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(file, begin, end, fault)

    def _send_body(self, file: HubFile, begin: int, end: int, fault: Fault) -> None:
        limit = max(fault.cut_after, fault.stall_after)
        stop = end if limit < 0 else min(end, begin + limit)
        at = begin
        for piece in file.part(begin, stop):
            if at <= fault.flip < at + len(piece):
                wrong = bytearray(piece)
                wrong[fault.flip - at] ^= 1
                piece = bytes(wrong)  # noqa: PLW2901 (one byte of it is another)
            self.wfile.write(piece)
            at += len(piece)
            self._asked.sent[0] = at - begin
        if stop < end:
            self.close_connection = True
            if fault.stall_after >= 0:
                self.server.hub.released.wait()


class _Hub(_Handler):
    at = "hub"

    def _serve(self, hub: HubServer, fault: Fault | None) -> None:
        url = urlsplit(self.path)
        if found := _API.fullmatch(url.path):
            self._serve_api(hub, found, parse_qs(url.query))
        elif found := _RESOLVE.fullmatch(url.path):
            self._serve_file(hub, found, fault)
        else:
            self._refuse(404, message="Not found")

    def _repository(self, hub: HubServer, found: re.Match[str], *, is_file: bool = False) -> Repository | None:
        """The repository that is asked for, if this client may see it at this revision; else it is told."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in hub.tokens:
            self._refuse(401, message="Invalid credentials in Authorization header")
            return None
        repo = hub.repositories.get(found["repo"])
        if repo is None or (repo.is_private and not token):
            if token:
                self._refuse(404, "RepoNotFound", "Repository not found")
            else:
                self._refuse(401, "RepoNotFound", "Invalid username or password.")
            return None
        revision = unquote(found["revision"] or "main")
        if revision not in {"main", repo.commit, *repo.revisions}:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        if is_file and repo.gated_to is not None and token not in repo.gated_to:
            text = f"Access to model {found['repo']} is restricted."
            self._refuse(403 if token else 401, "GatedRepo", text)
            return None
        return repo

    def _serve_api(self, hub: HubServer, found: re.Match[str], query: dict[str, list[str]]) -> None:
        repo = self._repository(hub, found)
        if repo is None:
            return
        if found["verb"] == "refs":
            branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commit}]
            self._answer(200, json.dumps({"branches": branches, "tags": [], "converts": []}).encode())
        elif found["verb"] == "tree":
            self._serve_tree(hub, repo, query)
        else:
            self._serve_info(found["repo"], repo, has_blobs=query.get("blobs") == ["true"])

    def _serve_info(self, name: str, repo: Repository, *, has_blobs: bool) -> None:
        siblings: list[dict[str, object]] = []
        for path, file in sorted(repo.files.items()):
            sibling: dict[str, object] = {"rfilename": path}
            if has_blobs:
                sibling |= {"size": file.length, "blobId": file.blob_id}
                if file.is_lfs and file.tells_hash:
                    sibling["lfs"] = {"sha256": file.oid, "size": file.length, "pointerSize": 134}
            siblings.append(sibling)
        told = {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "sha": repo.commit,
            "private": repo.is_private,
            "gated": "manual" if repo.gated_to is not None else False,
            "tags": ["gguf"],
            "siblings": siblings,
        }
        self._answer(200, json.dumps(told).encode(), **{"Content-Type": "application/json"})

    def _serve_tree(self, hub: HubServer, repo: Repository, query: dict[str, list[str]]) -> None:
        begin = int(query.get("cursor", ["0"])[0])
        items: list[dict[str, object]] = []
        for path, file in sorted(repo.files.items())[begin : begin + hub.page]:
            item: dict[str, object] = {"type": "file", "path": path, "size": file.length, "oid": file.blob_id}
            if file.is_lfs:
                item["lfs"] = {"oid": file.oid, "size": file.length, "pointerSize": 134}
            items.append(item)
        headers = {"Content-Type": "application/json"}
        if begin + hub.page < len(repo.files):
            path = urlsplit(self.path).path
            headers["Link"] = f'<{hub.url}{path}?recursive=True&cursor={begin + hub.page}>; rel="next"'
        self._answer(200, json.dumps(items).encode(), **headers)

    def _serve_file(self, hub: HubServer, found: re.Match[str], fault: Fault | None) -> None:
        repo = self._repository(hub, found, is_file=True)
        if repo is None:
            return
        file = repo.files.get(unquote(found["path"]))
        if file is None:
            self._refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": repo.commit})
            return
        if not file.is_lfs:
            self._send_file(file, f'"{file.blob_id}"', fault, **{"X-Repo-Commit": repo.commit})
            return
        headers = {
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(file.length),
            "X-Linked-ETag": f'"{file.oid}"',
            "Location": f"{hub.store_url}/repos/{file.oid}?X-Amz-Signature=0123",
        }
        self._answer(302, **headers)


class _Store(_Handler):
    at = "store"

    def _serve(self, hub: HubServer, fault: Fault | None) -> None:
        oid = urlsplit(self.path).path.rpartition("/")[2]
        file = hub.file(oid)
        if file is None:
            self._refuse(404)
        elif "Authorization" in self.headers:
            self._refuse(400, message="Only one auth mechanism allowed")  # as S3 says to a signed address with a token
        else:
            if fault is not None and fault.new_etag:
                hub.etags[oid] = fault.new_etag
            self._send_file(file, hub.etags.get(oid, f'"{oid[:32]}-7"'), fault)
