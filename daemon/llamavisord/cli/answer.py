"""An answer of a model as it comes: one chat completion over HTTP, with nothing but the standard library."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from llamavisord.cli.errors import CommandError, UnreachableError
from llamavisord.exit_codes import ExitCode

HEARTBEAT_S = 1
"""So often the gateway says in a stream that the model is still waited for: our progress lives on it."""
SILENCE_S = 1800.0
"""A model may compute for so long and say nothing; it is as long as the daemon itself believes in one that is busy."""
_CONNECT_TIMEOUT_S = 10.0
_TICK_S = 0.25
_PATH = "/v1/chat/completions"
_THIS_MACHINE: Mapping[str, str] = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (nothing is bound here)
"""How to reach what listens on every address."""
_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is no event."""
_REFUSED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class Door:
    """Where models are asked: the gateway, or with serve = "router" a router itself.

    Attributes:
        url: its address, without a path.
        key: what it is to be sent as a key, if any.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    def connect(self) -> HTTPConnection:
        """A connection to it, to be closed.

        Raises:
            UnreachableError: nobody is there.
        """
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        connection = HTTPConnection(_THIS_MACHINE.get(host, host), parts.port or 80, timeout=_CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except OSError as exc:
            hint = "see `llamavisor status`"
            raise UnreachableError(f"{self.url} does not answer: {exc.strerror or exc}", hint=hint) from exc
        connection.sock.settimeout(SILENCE_S)
        return connection


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the reasoning before it."""

    text: str
    is_reasoning: bool = False


class Answer:
    """One answer. Iterate over `pieces`, and close that to have the generation cancelled.

    Args:
        door: where to ask.
        question: the body of the request, all but `stream`.
        tick: called a few times a second until the answer begins.

    Attributes:
        text: what was answered so far, reasoning left out.
        finish_reason: why it ended, None as long as it has not.
        timings: what llama.cpp says of its speed, empty if nothing.
        first_piece_s: seconds from the request to the first piece, None as long as there is none.
    """

    def __init__(self, door: Door, question: Mapping[str, object], tick: Callable[[], None]) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.timings: Mapping[str, Any] = {}
        self.first_piece_s: float | None = None
        self._door = door
        self._body = json.dumps({**question, "stream": True}).encode("ascii")
        self._tick = tick
        self._is_whole = False

    def __repr__(self) -> str:
        return f"<Answer of {len(self.text)} characters, {self.finish_reason or 'under way'}>"

    def pieces(self) -> Generator[Piece]:
        """What is said, as it comes.

        Raises:
            UnreachableError: nobody is there.
            CommandError: it was refused, or broke off.
        """
        began = time.monotonic()
        with closing(self._door.connect()) as connection:
            for document in self._documents(connection):
                for piece in self._read(document):
                    if self.first_piece_s is None:
                        self.first_piece_s = time.monotonic() - began
                    yield piece
        if not self._is_whole:
            raise CommandError("the answer broke off: the connection was closed")

    def _documents(self, connection: HTTPConnection) -> Iterator[dict[str, Any]]:
        """The events of the stream."""
        try:
            response = self._ask(connection)
            while line := response.readline(_LINE_BYTES):
                kind, _, data = line.decode("utf-8", "replace").strip().partition(":")
                if kind == "data" and data.strip() == "[DONE]":
                    self._is_whole = True
                    return
                if kind == "data":
                    yield _parsed(data)
                elif line.startswith(b":") and self.first_piece_s is None:
                    self._tick()  # a sign of life of the gateway
        except TimeoutError as exc:
            raise CommandError(
                f"no word of the model for {SILENCE_S / 60:.0f} minutes", exit_code=ExitCode.TIMEOUT
            ) from exc
        except (OSError, HTTPException) as exc:
            if isinstance(exc, CommandError):
                raise
            raise CommandError(f"the answer broke off: {exc or type(exc).__name__}") from exc

    def _ask(self, connection: HTTPConnection) -> HTTPResponse:
        headers = {"Content-Type": "application/json", "X-Llamavisor-Heartbeat": str(HEARTBEAT_S)}
        if self._door.key is not None:
            headers["Authorization"] = f"Bearer {self._door.key}"
        channel: socket.socket = connection.sock
        connection.request("POST", _PATH, self._body, headers)
        deadline = time.monotonic() + SILENCE_S
        while not select.select([channel], [], [], _TICK_S)[0]:
            if time.monotonic() > deadline:
                raise TimeoutError
            self._tick()
        response = connection.getresponse()
        if response.status != 200:
            body, retry_after = response.read(_LINE_BYTES), response.getheader("Retry-After")
            raise _refusal(response.status, body, retry_after, has_key=self._door.key is not None)
        return response

    def _read(self, document: dict[str, Any]) -> Iterator[Piece]:
        """The text of one event; what else it says is kept."""
        if "error" in document:
            raise _trouble(document)
        if isinstance(timings := document.get("timings"), dict):
            self.timings = timings
        for choice in document.get("choices") or ():
            delta = choice.get("delta") or {}
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if reasoning := delta.get("reasoning_content"):
                yield Piece(str(reasoning), is_reasoning=True)
            if text := delta.get("content"):
                self.text += str(text)
                yield Piece(str(text))


def _parsed(data: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CommandError(f"the answer is not that of a llama-server: {data.strip()[:200]}")
    return document


def _refusal(status: int, body: bytes, retry_after: str | None, *, has_key: bool) -> CommandError:
    """What the gateway or llama-server has said instead of an answer."""
    text = body.decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or "error" not in document:
        document = {"error": {"message": f"status {status}: {' '.join(text.split())[:200]}"}}
    if status in _REFUSED and not has_key:
        return CommandError(
            "an API key is wanted, and none was given",
            hint="give one in LLAMAVISOR_API_KEY or with --api-key-file",
            exit_code=ExitCode.NOT_PERMITTED,
        )
    return _trouble(document, status, retry_after)


def _trouble(document: dict[str, Any], status: int | None = None, retry_after: str | None = None) -> CommandError:
    """An error as its document tells it; one amid a stream has its status in it."""
    error = document["error"]
    message = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    code = status or (error.get("code") if isinstance(error, dict) else None)
    if code in _REFUSED:
        hint = "give another key, in LLAMAVISOR_API_KEY or with --api-key-file"
        return CommandError(message, hint=hint, exit_code=ExitCode.NOT_PERMITTED)
    if code == 404 or (code == 400 and message.startswith("model '")):  # not there, or no good
        return CommandError(message, hint="see `llamavisor models`", exit_code=ExitCode.NOT_FOUND)
    hint = f"try again in {retry_after} s" if retry_after else ""
    return CommandError(message, hint=hint)
