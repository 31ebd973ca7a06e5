"""The router: the HTTP interface over the table of models, and everything that a test makes it do wrong."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator

from .behaviour import Behaviour, end, start_grandchild, start_zombie
from .http import (
    JSON,
    AnswerError,
    HttpServer,
    Request,
    Response,
    body_object,
    check_key,
    json_response,
    not_found,
    not_ready,
    read_body,
    read_head,
)
from .log import Log
from .options import PresetError
from .registry import Model, Registry

PROXIED_GETS = frozenset({"/metrics", "/slots", "/props", "/lora-adapters"})
PROXIED_POSTS = frozenset(
    {
        *("/completion", "/completions", "/v1/completions", "/chat/completions", "/v1/chat/completions"),
        *("/v1/responses", "/v1/messages", "/v1/embeddings", "/embeddings", "/embedding", "/infill"),
        *("/rerank", "/v1/rerank", "/tokenize", "/detokenize", "/apply-template"),
    }
)
_NOT_RELAYED = frozenset({"server", "transfer-encoding", "content-length", "keep-alive", "connection", "content-type"})
_CANNOT_CONNECT = b"proxy error: Could not establish connection"
_CANNOT_READ = b"proxy error: Failed to read connection"
_FLOOD_EVERY_S = 0.05


class Router:
    """One router, from listening to its end.

    Args:
        registry: its models.
        script: how it misbehaves.
        keys: API keys that it asks for, none = no question.
        autoload: whether a request may load a model.
        log: its standard error.
    """

    def __init__(self, registry: Registry, script: Behaviour, *, keys: list[str], autoload: bool, log: Log) -> None:
        self._registry = registry
        self._script = script
        self._keys = keys
        self._autoload = autoload
        self._log = log
        self._listens_since = float("inf")
        self._lock = threading.Lock()
        self._requests = 0

    def run(self, host: str, port: int) -> None:
        """Live until SIGTERM or SIGINT; returns never."""
        # Signals are waited for, not handled: a handler would run Python at any moment, under any lock.
        ending = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, ending)
        try:
            server = HttpServer(host, port, self.answer)
        except OSError:
            self._log("start", f"couldn't bind HTTP server socket, hostname: {host}, port: {port}", "E")
            self._log("llama_server", "exiting due to HTTP server error", "E")
            end(1)
        self._listens_since = time.monotonic()
        self._log("llama_server", f"listening on {server.url}")
        self._misbehave()
        self._registry.load_on_startup()
        while signal.sigwait(ending) and self._script.ignore_sigterm:
            pass
        for number in ending:
            signal.signal(number, lambda *_: end(1))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
        server.close()
        self._log("operator()", "operator(): cleaning up before exit...")
        self._registry.end()
        end(0)

    def answer(self, request: Request) -> Response:
        """Answer one request."""
        scripted = self._script.answers.get(request.path)
        if scripted is not None:
            time.sleep(scripted.get("delay_s", 0.0))
            if "body" in scripted:
                return _scripted_response(scripted)
        try:
            if time.monotonic() < self._listens_since + self._script.unready_s:
                raise not_ready()
            self._hang_if_told(request.path)
            check_key(request, self._keys)
            return self._answer(request)
        except AnswerError as error:
            if error.response.status >= 500:
                self._log("operator()", f"got exception: {error.response.body.decode()}", "W")
            return error.response

    def _answer(self, request: Request) -> Response:
        path, name = request.path, request.query.get("model", "")
        if request.method == "GET":
            if path in {"/health", "/v1/health"}:
                return json_response({"status": "ok"})
            if path in {"/models", "/v1/models"}:
                return self._list(request)
            if path == "/models/sse" and self._script.sse:
                events = self._events(request)
                return Response(200, content_type="text/event-stream", chunks=events)
            if path == "/props" and not name:
                return json_response(self._props())
            if path in PROXIED_GETS:
                return self._proxy(request, name)
        elif request.method == "POST":
            if path == "/models/load":
                return self._load(request)
            if path == "/models/unload":
                return self._unload(request)
            if path in PROXIED_POSTS:
                return self._proxy(request, body_object(request).get("model"))
        raise not_found()

    def _list(self, request: Request) -> Response:
        if request.query.get("reload"):
            try:
                self._registry.reload()
            except PresetError as exc:
                raise AnswerError(500, str(exc), "server_error") from exc
        return json_response({"data": self._registry.listed(), "object": "list"})

    def _events(self, request: Request) -> Iterable[bytes]:
        events = self._registry.listen()
        return iter(lambda: self._registry.next_event(events, request.has_left), None)

    def _props(self) -> dict[str, object]:
        props: dict[str, object] = {
            "role": self._script.role,
            "max_instances": self._registry.models_max,
            "models_autoload": self._autoload,
            "model_alias": "llama-server",
            "model_path": "none",
            "default_generation_settings": {"params": None, "n_ctx": 0},
            "ui_settings": {},
            "build_info": "b0-unknown",
            "cors_proxy_enabled": False,
        }
        if not self._script.role:
            for key in ("role", "max_instances", "models_autoload"):
                del props[key]
        return props

    def _load(self, request: Request) -> Response:
        model = self._registry.find(body_object(request).get("model"))
        if model is None:
            raise not_found()
        if model.is_running:
            raise AnswerError(400, "model is already running")
        self._registry.load(model)
        return json_response({"success": True})

    def _unload(self, request: Request) -> Response:
        model = self._registry.find(body_object(request).get("model"))
        if model is None:
            raise AnswerError(400, "model is not found")
        if not model.is_running:
            raise AnswerError(400, "model is not running")
        self._registry.unload(model)
        return json_response({"success": True})

    # Requests for a model

    def _proxy(self, request: Request, name: object) -> Response:
        with self._lock:
            self._requests += 1
            if self._requests == self._script.exit_after_requests:
                end(self._script.exit_with)
        if not isinstance(name, str) or not name:
            raise AnswerError(400, "model name is missing from the request")
        model = self._registry.find(name)
        if model is None:
            raise AnswerError(400, f"model '{name}' not found")
        wish = request.query.get("autoload", "")
        autoload = wish in {"true", "1"} if wish else self._autoload
        if autoload:
            self._registry.make_ready(model, request.has_left)
        elif not model.is_running:
            raise AnswerError(400, "model is not loaded")
        if not model.is_running:
            raise AnswerError(400, f"model name={model.name} is not running")
        return self._relay(request, model)

    def _relay(self, request: Request, model: Model) -> Response:
        """Pass a request on to a model's process; the answer is passed back piece by piece."""
        self._log("proxy_request", f"proxying request to model {model.name} on port {model.port}")
        self._registry.begin_request(model, counts_as_use=request.method == "POST")
        head = {**request.headers, "host": f"127.0.0.1:{model.port}", "connection": "close"}
        head["content-length"] = str(len(request.body))
        fields = [f"{name}: {value}" for name, value in head.items()]
        lines = [f"{request.method} {request.target} HTTP/1.1", *fields]
        closing = {"Connection": "close"}
        try:
            connection = socket.create_connection(("127.0.0.1", model.port))
        except OSError:
            self._registry.end_request(model)
            return Response(500, content_type=JSON, chunks=[_CANNOT_CONNECT], headers=closing)
        stream = connection.makefile("rb")
        try:
            connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + request.body)
            answer = read_head(stream)
        except (OSError, ValueError):
            answer = None
        if answer is None:
            connection.close()
            self._registry.end_request(model)
            return Response(500, content_type=JSON, chunks=[_CANNOT_READ], headers=closing)
        (_, status, _), headers = answer
        return Response(
            int(status),
            content_type=headers.get("content-type", JSON),
            chunks=self._pieces(model, connection, stream, headers),
            headers={name.title(): value for name, value in headers.items() if _is_relayed(name)} | closing,
        )

    def _pieces(
        self, model: Model, connection: socket.socket, stream: object, headers: dict[str, str]
    ) -> Iterator[bytes]:
        try:
            yield from read_body(stream, headers, to_end=True)
        except (OSError, EOFError, ValueError):
            yield _CANNOT_READ
        finally:
            connection.close()
            self._registry.end_request(model)

    # What goes wrong

    def _hang_if_told(self, path: str) -> None:
        script = self._script
        if script.hang_after_s is None or time.monotonic() < self._listens_since + script.hang_after_s:
            return
        if not script.hang_paths or path in script.hang_paths:
            threading.Event().wait()

    def _misbehave(self) -> None:
        if self._script.grandchild:
            start_grandchild(self._script.grandchild)
        for _ in range(self._script.zombies):
            start_zombie()
        if self._script.log_giant_line_bytes:
            self._log.raw(b"x" * self._script.log_giant_line_bytes)
        if self._script.log_lines_per_s:
            threading.Thread(target=self._flood, daemon=True).start()
        if self._script.exit_after_s is not None:
            threading.Timer(self._script.exit_after_s, end, (self._script.exit_with,)).start()

    def _flood(self) -> None:
        line = b"0.00.000.000 I srv         flood: " + b"z" * 90 + b"\n"
        while True:
            time.sleep(_FLOOD_EVERY_S)
            self._log.raw(line * max(1, int(self._script.log_lines_per_s * _FLOOD_EVERY_S)))


def _is_relayed(name: str) -> bool:
    return name not in _NOT_RELAYED and not name.startswith(("access-control-", "x-accel-"))


def _scripted_response(scripted: dict[str, object]) -> Response:
    body = str(scripted["body"]).encode()
    pieces = (body for _ in range(scripted.get("repeat", 1)))
    return Response(scripted.get("status", 200), content_type=scripted.get("type", JSON), chunks=pieces)
