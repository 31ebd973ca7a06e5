"""A gateway that is none: answers each chat completion with a script, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from fakes.waiting import PATIENCE_S


def words(*texts: str, reasoning: bool = False) -> list[str]:
    """Events of a stream, one for each text."""
    key = "reasoning_content" if reasoning else "content"
    return [event({"choices": [{"delta": {key: text}, "finish_reason": None}]}) for text in texts]


def end(reason: str = "stop", **more: object) -> list[str]:
    """The last events of a stream."""
    return [event({"choices": [{"delta": {}, "finish_reason": reason}], **more}), "data: [DONE]\n\n"]


def event(document: object) -> str:
    """One event."""
    return f"data: {json.dumps(document)}\n\n"


class Talker:
    """Answers on a port of its own. A stream that is cut ends without its last event.

    Attributes:
        asked: the bodies of the requests.
        headers: and their headers.
        left: set once a client has left before its answer had ended.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.left = threading.Event()
        self._answers: deque[tuple[int, list[str], bool, dict[str, str]]] = deque()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.talker = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        """Begin to answer."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave no thread behind."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def say(self, *events: Iterable[str], hold: bool = False) -> None:
        """Answer the next request with these events, and then close, or `hold` the stream until the client leaves."""
        self._answers.append((200, [each for part in events for each in part], hold, {}))

    def refuse(self, status: int, message: str, **headers: str) -> None:
        """Refuse the next request."""
        body = json.dumps({"error": {"code": status, "message": message, "type": "x"}})
        self._answers.append((status, [body], False, headers))

    def handle(self, handler: _Handler) -> None:
        """Answer one request."""
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.asked.append(json.loads(body))
        self.headers.append(dict(handler.headers.items()))
        status, parts, hold, headers = self._answers.popleft()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part.encode())
        if hold:
            handler.connection.settimeout(PATIENCE_S)
            if not handler.connection.recv(1):
                self.left.set()


class _Server(ThreadingHTTPServer):
    talker: Talker
    daemon_threads = False


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def handle(self) -> None:
        """One request; a client may leave at any time."""
        with suppress(ConnectionError):
            super().handle()

    def do_POST(self) -> None:
        """Answer."""
        self.server.talker.handle(self)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""
