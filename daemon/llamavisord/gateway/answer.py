"""One client's answer: a child's response, held back until it can be trusted, then passed on as it comes."""

from __future__ import annotations

import time
from collections import deque
from enum import Enum, auto
from functools import lru_cache

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from llamavisord.gateway.framing import LAST_CHUNK, EventPeek, Framing, Head, as_chunk, dechunked

HELD_BYTES = 1024 * 1024
"""So much of an answer is held back until it is whole; a longer one flows from there on, and is not asked for again."""

TAIL_BYTES = 8 * 1024
"""So much of a body's end is remembered: the usage stands there."""

_LINES_KEPT = 64  # most answers have the same fields of ours
_TAIL_PIECES = 8  # usage, the event that says the end, and the last chunk may come one by one
_EVENT_STREAM = b"text/event-stream"

# For the hop between the child and us only, or said by us: RFC 9110, 7.6.1; and who may read the answer is decided by
# the gateway (CORS), not by a child that knows nothing of who asks.
_NOT_PASSED_ON = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class _Mode(Enum):
    """What happens to the bytes of a child's body."""

    HOLD_UNTIL_DATA = auto()
    """An event stream that has not said anything."""
    HOLD_UNTIL_WHOLE = auto()
    """Anything else."""
    REFUSED = auto()
    """Held until it is whole and never passed on: the client was promised a stream, and this is none."""
    FLOW = auto()
    """Passed on at once."""


class OtherAnswerError(Exception):
    """Raised when the client was sent the head of a stream already, and the child's answer is something else."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"status {status} instead of a stream")
        self.status = status
        self.content = content


class Answer(web.StreamResponse):
    """One client's answer, to be returned by the handler once the client was sent a head.

    Its bytes go straight to the client's transport; aiohttp only learns from it whether the connection goes on.
    `Relay.exchange` feeds it. An exchange that failed before `has_data` may be followed by another.

    Attributes:
        has_head: the client was sent a head.
        has_data: the client was sent data of a stream, or bytes of a body.
        bytes_sent: all bytes that the client was sent.
        first_data_at: when it was sent the first data, in monotonic seconds.
        extra_headers: headers that are added to the head, to be set before it goes out.
        is_stream: the client was sent the head of an event stream.
        outlives_client: a client that leaves does not end it.
    """

    def __init__(self, request: web.BaseRequest) -> None:
        super().__init__()
        self.has_head = False
        self.has_data = False
        self.is_stream = False
        self.bytes_sent = 0
        self.first_data_at: float | None = None
        self.extra_headers: list[tuple[str, str]] = []
        self.outlives_client = False
        self._asked = request
        self._protocol = request.protocol
        self._transport = request.transport
        self._is_new = request.version >= HttpVersion11
        self._is_chunked = False  # as the client sees it
        self._is_straight = False  # as the child sends it, and so nothing is to be done
        self._unsent_head = b""  # a head that goes out with what comes next
        self._is_head_only = request.method == "HEAD"
        self._is_ended = False
        self._head: Head | None = None  # the child's
        self._mode = _Mode.HOLD_UNTIL_WHOLE
        self._peek: EventPeek | None = None  # while nothing but comments of an event stream has come
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tail: deque[bytes] = deque(maxlen=_TAIL_PIECES)

    def __repr__(self) -> str:
        sent = "data" if self.has_data else "a head" if self.has_head else "nothing"
        return f"<Answer {self.status}, {sent} sent, {self._held_bytes} bytes held, {self._mode.name}>"

    # What the gateway says.

    @property
    def tail(self) -> bytes:
        """The end of the body so far, `TAIL_BYTES` at most, without its framing."""
        return self._payload(b"".join(self._tail))[-TAIL_BYTES:]

    def begin_stream(self) -> None:
        """Send the head of an event stream now, before any child has answered."""
        if not self.has_head:
            # As llama-server says of its streams.
            fields = [b"Content-Type: " + _EVENT_STREAM, b"X-Accel-Buffering: no"]
            self._begin(200, b"OK", fields, is_stream=True)
            self._write(b"")

    def comment(self, text: str) -> None:
        """Send a comment in the stream, unless the client does not even read what it was sent before."""
        if not self.is_congested:
            self._write(self._framed(b": %b\n\n" % text.encode()))

    def end_with_event(self, event: bytes) -> None:
        """End a stream that broke: send one last event, with its blank line, and the end of the body."""
        self.begin_stream()
        tail = self.tail
        before = b"" if not tail or tail.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
        self._write(self._framed(before + event) + (LAST_CHUNK if self._is_chunked else b""))
        self.has_data = True
        self._is_ended = True

    def cut_off(self) -> None:
        """End an answer that broke and cannot be ended properly: the client must not take it for whole."""
        self._keep_alive = False
        self._is_ended = True
        if self._transport is not None:
            self._transport.abort()

    def detach(self) -> None:
        """The client has left, and the exchange goes on: from here on bytes are dropped."""
        self.outlives_client = True
        self._transport = None

    # What the relay says.

    @property
    def is_congested(self) -> bool:
        """The client reads more slowly than it is sent bytes."""
        return self._protocol.writing_paused and self._transport is not None and not self._transport.is_closing()

    async def drain(self) -> None:
        """Wait until the client has read most of what it was sent.

        Raises:
            ConnectionError: it has left, and the answer does not outlive it.
        """
        try:
            await self._asked.writer.drain()
        except ConnectionError:
            if not self.outlives_client:
                raise

    def start(self, head: Head) -> None:
        """A child answers: hold back what comes until it can be trusted.

        Drops what was held back of an earlier exchange.
        """
        is_stream = head.status == 200 and head.content_type == _EVENT_STREAM
        self._drop_held()
        self._head = head
        self._peek = EventPeek() if is_stream else None
        if is_stream:
            self._mode = _Mode.HOLD_UNTIL_DATA
        else:
            self._mode = _Mode.REFUSED if self.has_head else _Mode.HOLD_UNTIL_WHOLE

    def add(self, piece: bytes) -> None:
        """Take bytes of the body, in the child's framing.

        Raises:
            OtherAnswerError: the client waits for a stream, and this has become too long for an error.
        """
        if self._mode is _Mode.FLOW:
            self._pass_on(piece)
            return
        self._held.append(piece)
        self._held_bytes += len(piece)
        if self._peek is not None:
            self._peek.feed(self._payload(piece))
            if self._peek.has_data:
                self._release()
            elif self._peek.is_idle:  # the child's ping: it goes on, but says nothing yet
                self._release(is_data=False)
        if self._held_bytes > HELD_BYTES:
            if self._mode is _Mode.REFUSED:
                self._refuse()
            self._release()

    def finish(self) -> None:
        """The child's answer is whole.

        Raises:
            OtherAnswerError: the client waits for a stream, and this was none.
        """
        if self._mode is _Mode.REFUSED:
            self._refuse()
        if self._mode is not _Mode.FLOW:
            self._release(is_whole=True)
        if self._is_chunked and self._child_framing is not Framing.CHUNKED:
            self._write(LAST_CHUNK)
        self._is_ended = True

    # What aiohttp asks.

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002 (aiohttp's)
        """Its head was sent before it was returned."""
        if not self.has_head:
            raise RuntimeError("an answer was returned of which the client was sent nothing")
        return None

    async def write_eof(self, data: bytes = b"") -> None:  # noqa: ARG002 (aiohttp's)
        """Its end was sent as well; wait until the client has taken most of it, before its next request is read."""
        if not self._is_ended:
            self.cut_off()
        await self._asked.writer.drain()
        self._eof_sent = True
        self._body_length = self.bytes_sent

    # How it is done.

    @property
    def _child_framing(self) -> Framing:
        return self._head.framing if self._head is not None else Framing.NONE

    def _payload(self, pieces: bytes) -> bytes:
        return dechunked(pieces) if self._child_framing is Framing.CHUNKED else pieces

    def _framed(self, payload: bytes) -> bytes:
        return as_chunk(payload) if self._is_chunked else payload

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0
        self._tail.clear()

    def _refuse(self) -> None:
        head = self._head
        raise OtherAnswerError(head.status if head is not None else 0, self._payload(b"".join(self._held)))

    def _release(self, *, is_data: bool = True, is_whole: bool = False) -> None:
        """Send what was held back, before it the head if need be; if this was data, what follows flows."""
        body = b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        if not self.has_head:
            self._begin_as_child(body, is_whole=is_whole)
        self._is_straight = self._is_chunked and self._child_framing is Framing.CHUNKED
        if is_data:
            self._mode, self._peek = _Mode.FLOW, None
            if body and not self.has_data:
                self.has_data = True
                self.first_data_at = time.monotonic()
        self._pass_on(body)

    def _begin_as_child(self, body: bytes, *, is_whole: bool) -> None:
        head = self._head
        if head is None:
            raise RuntimeError("bytes of a body before any head")
        dropped = _NOT_PASSED_ON.union(head.connection) if head.connection else _NOT_PASSED_ON
        lines = [line for name, line in head.fields if name not in dropped and not name.startswith(b"access-control-")]
        is_stream = self._mode is _Mode.HOLD_UNTIL_DATA
        length: bytes | None = None
        match head.framing:
            case Framing.NONE if self._is_head_only:
                length = next((line[15:].strip() for name, line in head.fields if name == b"content-length"), None)
            case Framing.NONE if head.status not in {204, 304}:
                length = b"0"
            case Framing.LENGTH if not is_stream:
                length = b"%d" % head.length
            case Framing.CHUNKED if is_whole and not self._is_new:
                length = b"%d" % len(dechunked(body))
            case Framing.CLOSE if is_whole:
                length = b"%d" % len(body)
        has_body = head.framing is not Framing.NONE
        self._begin(head.status, head.reason, lines, length=length, has_body=has_body, is_stream=is_stream)

    def _begin(
        self,
        status: int,
        reason: bytes,
        fields: list[bytes],
        *,
        length: bytes | None = None,
        has_body: bool = True,
        is_stream: bool = False,
    ) -> None:
        self._set_status(status, reason.decode("latin-1"))
        self.has_head = True
        self.is_stream = is_stream
        self._is_chunked = has_body and length is None and self._is_new
        # Without a length and without chunks, only the end of the connection tells the end of the body.
        self._keep_alive = self._asked.keep_alive and (self._is_chunked or length is not None or not has_body)
        lines = [b"HTTP/1.%d %d %b" % (self._is_new, status, reason), *fields]
        lines += [_line(name, value) for name, value in self.extra_headers]
        if length is not None:
            lines.append(b"Content-Length: " + length)
        elif self._is_chunked:
            lines.append(b"Transfer-Encoding: chunked")
        if self._keep_alive != self._is_new:  # what the version does not say by itself
            lines.append(b"Connection: keep-alive" if self._keep_alive else b"Connection: close")
        lines.append(b"\r\n")
        self._unsent_head = b"\r\n".join(lines)
        self._asked.writer.output_size = len(self._unsent_head)  # so that aiohttp never puts an error page behind it

    def _pass_on(self, piece: bytes) -> None:
        # Per chunk of a stream: nothing may be done here that can be done once.
        if self._is_straight and len(piece) <= TAIL_BYTES:
            self._tail.append(piece)
        elif self._child_framing is Framing.CHUNKED:
            payload = dechunked(piece)
            self._tail.append(as_chunk(payload[-TAIL_BYTES:]))
            if not self._is_chunked:
                piece = payload
        else:
            self._tail.append(piece[-TAIL_BYTES:])
            if self._is_chunked:
                piece = as_chunk(piece)
        self._write(piece)

    def _write(self, data: bytes) -> None:
        if self._unsent_head:
            data = self._unsent_head + data
            self._unsent_head = b""
        transport = self._transport
        if data and transport is not None and not transport.is_closing():
            self.bytes_sent += len(data)
            transport.write(data)


@lru_cache(_LINES_KEPT)
def _line(name: str, value: str) -> bytes:
    line = f"{name}: {value}"
    if "\r" in line or "\n" in line or "\0" in line:
        raise ValueError(f"not a header field: {line!r}")
    return line.encode()
