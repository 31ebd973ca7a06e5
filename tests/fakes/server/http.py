"""The little HTTP/1.1 that llama-server speaks: one thread per connection, bodies by length or in chunks.

Python's own http.server and http.client take longer to import than this whole stand-in takes to start.
"""

from __future__ import annotations

import json
import re
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

JSON = "application/json; charset=utf-8"
_KEEP_ALIVE_S = 5.0
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}


class Request:
    """One request, as far as llama-server looks at it."""

    def __init__(self, method: str, target: str, headers: dict[str, str], body: bytes, peer: socket.socket) -> None:
        self.method = method
        self.target = target
        path, _, query = target.partition("?")
        self.path = _decoded(path)
        pairs = (piece.partition("=") for piece in query.split("&") if piece)
        self.query = {_decoded(name): _decoded(value) for name, _, value in pairs}
        self.headers = headers
        self.body = body
        self._peer = peer

    def has_left(self) -> bool:
        """Whether the client has closed its end."""
        if not select.select([self._peer], [], [], 0)[0]:
            return False
        try:
            return self._peer.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True


class Response:
    """One answer: a body, or pieces that are sent as they come."""

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        *,
        content_type: str = JSON,
        chunks: Iterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.chunks = chunks
        self.headers = headers or {}


class AnswerError(Exception):
    """Raised when a request is answered with one of llama-server's error bodies.

    Args:
        status: HTTP status, repeated in the body.
        message: what it says.
        kind: llama-server's name for the class of the error.
        is_general: whether it comes from the server at large; there the fields have another order.
    """

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", *, is_general: bool = False
    ) -> None:
        super().__init__(message)
        code, said, named = {"code": status}, {"message": message}, {"type": kind}
        error = {**said, **named, **code} if is_general else {**code, **said, **named}
        self.response = json_response({"error": error}, status)


def json_response(value: object, status: int = 200) -> Response:
    """An answer in JSON, written as compactly as llama-server writes it."""
    return Response(status, dumps(value).encode())


def dumps(value: object) -> str:
    """JSON without spaces and with plain UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def not_found() -> AnswerError:
    """What every 404 says, whatever it is that was not found."""
    return AnswerError(404, "File Not Found", "not_found_error", is_general=True)


def not_ready() -> AnswerError:
    """What everything is answered with before a server is ready."""
    return AnswerError(503, "Loading model", "unavailable_error", is_general=True)


def check_key(request: Request, keys: list[str]) -> None:
    """See that a request carries one of the keys, if there are any.

    Raises:
        AnswerError: it does not.
    """
    if not keys or request.path in {"/health", "/v1/health", "/"}:
        return
    given = request.headers.get("authorization") or request.headers.get("x-api-key", "")
    if given.removeprefix("Bearer ") not in keys:
        raise AnswerError(401, "Invalid API Key", "authentication_error", is_general=True)


def body_object(request: Request) -> dict[str, object]:
    """The JSON object in the body; what is JSON but no object counts as an empty one.

    Raises:
        AnswerError: it is no JSON.
    """
    try:
        value = json.loads(request.body)
    except ValueError as exc:
        line, column = getattr(exc, "lineno", 1), getattr(exc, "colno", 1)
        where = f"parse error at line {line}, column {column}: syntax error while parsing value"
        raise AnswerError(400, f"[json.exception.parse_error.101] {where}") from exc
    return value if isinstance(value, dict) else {}


class HttpServer:
    """Listens and answers every request with what `answer` returns.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, host: str, port: int, answer: Callable[[Request], Response]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self._answer = answer
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those there are stay until the process ends."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = connection.makefile("rb")
            stays = True
            while stays:
                connection.settimeout(_KEEP_ALIVE_S)
                head = read_head(stream)
                if head is None:
                    return
                connection.settimeout(None)
                (method, target, _), headers = head
                body = b"".join(read_body(stream, headers, to_end=False))
                request = Request(method, target, headers, body, connection)
                stays = _send(connection, self._answer(request)) and headers.get("connection", "") != "close"


def read_head(stream: Iterable[bytes]) -> tuple[list[str], dict[str, str]] | None:
    """The three words of the first line and the headers in small letters, None at the end of the stream.

    Raises:
        ValueError: that is not HTTP.
    """
    lines: list[str] = []
    for raw in stream:
        line = raw.decode("latin-1").rstrip("\r\n")
        if not line:
            break
        lines.append(line)
    if not lines:
        return None
    words = lines[0].split(" ", 2)
    if len(words) != 3:
        raise ValueError(lines[0])
    fields = (line.partition(":") for line in lines[1:])
    return words, {name.strip().lower(): value.strip() for name, _, value in fields}


def read_body(stream: object, headers: dict[str, str], *, to_end: bool) -> Iterator[bytes]:
    """The pieces of a body as they arrive; without a length it lasts `to_end` of the stream, or is empty.

    Raises:
        EOFError: the stream ended before the body did.
    """
    if headers.get("transfer-encoding", "") == "chunked":
        while size := int(stream.readline() or b"-1", 16):
            if size < 0:
                raise EOFError
            piece = stream.read(size)
            if len(piece) < size:
                raise EOFError
            stream.readline()
            yield piece
        stream.readline()
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            piece = stream.read1(min(left, 65536))
            if not piece:
                raise EOFError
            left -= len(piece)
            yield piece
    elif to_end:
        while piece := stream.read1(65536):
            yield piece


def _decoded(text: str) -> str:
    raw = re.sub("%([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text.replace("+", " "))
    return raw.encode("latin-1", "replace").decode("utf-8", "replace")


def _send(connection: socket.socket, response: Response) -> bool:
    """Send an answer; returns whether the connection stays open after it."""
    stays = response.status < 400 and "Connection" not in response.headers
    lines = [f"HTTP/1.1 {response.status} {_REASONS.get(response.status, 'Unknown')}", "Server: llama.cpp"]
    lines.append("Access-Control-Allow-Origin: ")
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    if response.status >= 400 and "Connection" not in response.headers:
        lines.append("Connection: close")
    if response.chunks is not None:
        lines.append("X-Accel-Buffering: no")
    lines.append(f"Content-Type: {response.content_type}")
    if response.chunks is None:
        lines.append(f"Content-Length: {len(response.body)}")
    else:
        lines.append("Transfer-Encoding: chunked")
    if response.status < 400:
        lines.append("Keep-Alive: timeout=5, max=100")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
    if response.chunks is None:
        connection.sendall(head + response.body)
        return stays
    connection.sendall(head)
    chunks = iter(response.chunks)
    try:
        for chunk in chunks:
            if chunk:
                connection.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
    finally:
        if hasattr(chunks, "close"):
            chunks.close()  # whoever makes the pieces learns at once that nobody wants them any more
    return stays
