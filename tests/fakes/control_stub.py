"""A daemon that is not one: a Unix socket that gives scripted answers to control requests, and remembers them."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, urlsplit

Answer = Callable[[dict[str, str]], tuple[int, str, bytes]]
"""From the arguments of a query to a status, a content type and a body."""


def router(name: str = "main", **changes: object) -> dict[str, object]:
    """A router as the control API shows it; ready if nothing else is said."""
    return {
        "name": name,
        "state": "ready",
        "since_unix": 0.0,
        "url": "http://127.0.0.1:8080",
        "pid": 4711,
        "reason": None,
        "hint": None,
        "failures": 0,
        "crash_loop": False,
        "restarts": 0,
        "retry_in_s": None,
        "models_max": 4,
        "models_dir": "/srv/models",
        "model_count": 2,
        "loaded_count": 1,
        "devices": [{"id": "RAM", "name": "RAM", "budget_bytes": 24 * 2**30}],
        "llama_server": "/usr/bin/llama-server",
        "build": "b11434",
        "log_file": "/var/lib/llamavisor/logs/main.log",
        "log_tail": [],
        **changes,
    }


def model(name: str = "alpha", **changes: object) -> dict[str, object]:
    """A model as the control API shows it; loaded if nothing else is said."""
    return {
        "name": name,
        "router": "main",
        "state": "loaded",
        "file_state": "ready",
        "problem": None,
        "notes": [],
        "stale": None,
        "size_bytes": 1536,
        "quantization": "Q4_K_M",
        "architecture": "llama",
        "kind": "model",
        "parameter_count": 8_030_261_248,
        "n_ctx": 4096,
        "n_ctx_train": 131_072,
        "aliases": [],
        "tags": [],
        "used_unix": None,
        "in_flight": 0,
        "stage": None,
        "progress": None,
        "pid": 4712,
        "port": 40000,
        "since_unix": 0.0,
        "error": None,
        "path": f"/srv/models/{name}.gguf",
        **changes,
    }


def folder(path: str = "/srv/models", **changes: object) -> dict[str, object]:
    """A models folder as the control API shows it; all is well if nothing else is said."""
    return {"path": path, "stale": None, "mode": "inotify", "mode_reason": None, "models": {"ready": 1}, **changes}


def device(name: str = "RAM", **changes: object) -> dict[str, object]:
    """A device as the control API shows it; half of it is taken by models if nothing else is said."""
    return {
        "id": name.partition(" ")[0],
        "name": name,
        "total_bytes": 32 * 2**30,
        "used_bytes": 18 * 2**30,
        "free_bytes": 14 * 2**30,
        "budget_bytes": 24 * 2**30,
        "budget_auto": True,
        "expected_bytes": 17 * 2**30,
        "measured_bytes": 16 * 2**30,
        "models_bytes": 16 * 2**30,
        "others_bytes": 2 * 2**30,
        "reason": None,
        **changes,
    }


def occupant(name: str = "alpha", **changes: object) -> dict[str, object]:
    """A model in memory as the control API shows it; loaded and idle if nothing else is said."""
    return {
        "model": name,
        "router": "main",
        "state": "loaded",
        "expected_bytes": {"RAM": 2 * 2**30},
        "expected_from": "fit-params",
        "growth_bytes": 0,
        "measured_bytes": {"RAM": 2**30},
        "in_flight": 0,
        "leases": 0,
        "used_unix": 0.0,
        "loaded_unix": 0.0,
        "idle_s": 42.0,
        "ttl_s": None,
        "ttl_left_s": None,
        "expires_unix": None,
        "pinned": False,
        "n_ctx": 4096,
        "n_ctx_asked": 4096,
        "n_ctx_ours": False,
        **changes,
    }


def memory(*devices: dict[str, object], **changes: object) -> dict[str, object]:
    """How it stands about memory as the control API shows it; budgets are not enforced if nothing else is said."""
    return {"devices": list(devices), "enforced": False, "strain": None, "pinned": [], **changes}


def gateway(**changes: object) -> dict[str, object]:
    """The gateway as the control API shows it; open and idle if nothing else is said."""
    return {
        "urls": ["http://127.0.0.1:8080", "http://[::1]:8080"],
        "draining": False,
        "in_flight": {},
        "waiting": 0,
        "held_bytes": 0,
        "connections": 0,
        **changes,
    }


def details(*routers: dict[str, object], **changes: object) -> dict[str, object]:
    """Everything about a model as the control API shows it; loaded on one router if nothing else is said."""
    items = routers or (model(),)
    shared = ("name", "state", "problem", "notes", "file_state", "size_bytes", "quantization", "architecture", "kind")
    shared += ("parameter_count", "n_ctx_train", "aliases", "tags", "path")
    return {
        "model": {**{key: items[0][key] for key in shared}, "routers": [each for each in items if each["router"]]},
        "files": [{"path": items[0]["path"], "size_bytes": 1536, "mtime_unix": 0.0}],
        "projector": None,
        "draft": None,
        "header": None,
        "effective": {},
        "origins": {},
        "layers": {},
        "command": {},
        **changes,
    }


def status(
    routers: Iterable[dict[str, object]] = (), models: Iterable[dict[str, object]] = (), **changes: object
) -> dict[str, object]:
    """The answer to `status`; all is well if nothing else is said."""
    return {
        "version": "0.1.0",
        "pid": 4710,
        "uptime_s": 3720.0,
        "started_unix": 0.0,
        "serve": "router",
        "config_path": "/etc/llamavisor/llamavisor.toml",
        "config_error": None,
        "config_loaded_unix": 0.0,
        "socket": "/run/llamavisor/control.sock",
        "metrics_url": "http://127.0.0.1:9155/metrics",
        "ready": True,
        "gateway": None,
        "warnings": [],
        "event_id": 7,
        "routers": list(routers) or [router()],
        "folders": [],
        "memory": memory(device()),
        "models": list(models),
        "models_left_out": 0,
        **changes,
    }


def event(number: int, name: str = "ModelLoaded", message: str = "model alpha: loaded") -> dict[str, object]:
    """An event as the control API shows it."""
    return {"id": number, "time": 0.0, "event": name, "message": message}


class ControlStub:
    """Answers on `path` what it was told to; everything else is a problem with the code "not_found"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.closing = threading.Event()
        self._answers: dict[tuple[str, str], Answer] = {}
        self._streams: dict[str, tuple[list[bytes], bool]] = {}
        self._server = _Server(str(path), _Handler)
        self._server.stub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        """Begin to answer."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hang up on everybody, and leave no thread behind."""
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method: str, path: str, body: object, *, code: int = 200) -> None:
        """Answer with this JSON."""
        raw = json.dumps(body).encode("utf-8")
        self.answer_with(method, path, lambda _: (code, "application/json", raw))

    def answer_with(self, method: str, path: str, answer: Answer) -> None:
        """Answer with what `answer` makes of the query."""
        self._answers[method, path] = answer

    def problem(self, method: str, path: str, code: str, detail: str, hint: str = "", *, http: int = 500) -> None:
        """Answer with a problem document."""
        self.answer(method, path, {"status": http, "code": code, "detail": detail, "hint": hint}, code=http)

    def stream(self, path: str, chunks: Iterable[str], *, hold: bool = False) -> None:
        """Answer with these chunks, and then end, or hold the connection until everything ends."""
        self._streams[path] = ([chunk.encode("utf-8") for chunk in chunks], hold)

    def events(self, events: Iterable[Mapping[str, object]], *, hold: bool = False) -> None:
        """Answer a request for events with these."""
        chunks = [f"id: {each['id']}\nevent: {each['event']}\ndata: {json.dumps(each)}\n\n" for each in events]
        self.stream("/control/v1/events", [": hello\n\n", *chunks], hold=hold)

    def handle(self, handler: _Handler) -> None:
        """Give one request its answer."""
        url = urlsplit(handler.path)
        query = dict(parse_qsl(url.query))
        self.requests.append((handler.command, url.path, query))
        if handler.command == "GET" and url.path in self._streams:
            self._send_stream(handler, *self._streams[url.path])
            return
        code, kind, body = self._answers.get((handler.command, url.path), _not_found)(query)
        handler.send_response(code)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _send_stream(self, handler: _Handler, chunks: list[bytes], hold: bool) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        if hold:
            self.closing.wait()
        handler.wfile.write(b"0\r\n\r\n")


def _not_found(_: dict[str, str]) -> tuple[int, str, bytes]:
    return 404, "application/problem+json", b'{"code": "not_found", "detail": "no such address"}'


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    stub: ControlStub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle(self) -> None:
        """One request; a client may leave at any time."""
        self.close_connection = True
        with suppress(ConnectionError):
            self.handle_one_request()

    def do_GET(self) -> None:
        """Answer."""
        self.server.stub.handle(self)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: an address on a Unix socket has no host to log."""
