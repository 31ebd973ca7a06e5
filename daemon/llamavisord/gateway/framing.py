"""HTTP/1.1 responses of a child as their bytes come: heads, the framings of bodies, the first data of event streams.

Nothing here touches a socket. A child is our own process, but it may be broken: whatever it sends, what is kept of it
is bounded, and what is not HTTP raises `GarbageError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache

HEAD_BYTES = 64 * 1024
"""The longest head that is read, and likewise all interim heads (1xx) together with it."""

CHUNK_BYTES = 1024 * 1024
"""The longest chunk that is passed on in one piece; a longer one is passed on as several."""

LAST_CHUNK = b"0\r\n\r\n"
"""The end of a chunked body."""

_TRAILER_BYTES = 8 * 1024
_LINES_KEPT = 256
"""So many lines of heads are remembered: a child says nearly the same in each of its answers."""
_KEPT_HEAD_BYTES = 2 * 1024
"""Of longer heads none are, since what is remembered has to be bounded in bytes too."""
_FRAMING_FIELDS = frozenset({b"content-length", b"content-type", b"transfer-encoding", b"connection"})
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n\0]*))?")
_USUAL = b"HTTP/1.1 200 OK"
_TOKEN = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]{0,8}(?:;[^\r\n\0]{0,200})?\r\n")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_EVENT_LINE_END = re.compile(rb"\r\n|\r|\n")


class GarbageError(ValueError):
    """Raised when what a child sends is not HTTP/1.1, or more than is read of it."""


class Framing(Enum):
    """How the end of a body is known."""

    NONE = auto()
    """There is no body."""
    LENGTH = auto()
    """By its length."""
    CHUNKED = auto()
    """By its last chunk."""
    CLOSE = auto()
    """By the end of the connection."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a response.

    Attributes:
        status: the status code, never 1xx.
        reason: what stands behind it.
        fields: the fields in order, each with its name in lower case and its whole line as sent.
        framing: how the end of its body is known.
        length: the bytes of its body, for `Framing.LENGTH`.
        keeps_alive: the connection can be used again after it.
        content_type: the media type in lower case, without parameters; empty if there is none.
        connection: the names of fields that are for the next hop only, in lower case.
    """

    status: int
    reason: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    framing: Framing
    length: int
    keeps_alive: bool
    content_type: bytes
    connection: tuple[bytes, ...]


def parse_head(raw: bytes, *, is_bodiless: bool = False) -> Head:
    """Read a head, without the blank line at its end.

    Args:
        raw: its bytes.
        is_bodiless: it answers a HEAD, so it has no body whatever it says.

    Raises:
        GarbageError: it is malformed, or says two things about the length of its body.
    """
    status_line, *lines = raw.split(b"\r\n")
    status, reason, is_new = _status_of(status_line)
    if not raw.count(b"\r") == raw.count(b"\n") == len(lines) or b"\0" in raw:
        raise GarbageError("a control character in a head")
    fields = tuple(map(_known_field if len(raw) <= _KEPT_HEAD_BYTES else _field, lines))
    lengths: set[bytes] = set()
    codings: list[bytes] = []
    connection: tuple[bytes, ...] = ()
    content_type = b""
    for name, line in fields:
        if name not in _FRAMING_FIELDS:
            continue
        value = line[len(name) + 1 :]
        if name == b"content-length":
            lengths.add(value.strip(b" \t"))
        elif name == b"content-type":
            content_type = value.partition(b";")[0].strip(b" \t").lower()
        elif name == b"transfer-encoding":
            codings.append(value.strip(b" \t").lower())
        else:
            connection += tuple(token.strip(b" \t") for token in value.lower().split(b","))
    keeps_alive = b"close" not in connection if is_new else b"keep-alive" in connection
    framing, length = _framing(status, lengths, codings, is_bodiless=is_bodiless)
    keeps_alive = keeps_alive and framing is not Framing.CLOSE
    return Head(status, reason, fields, framing, length, keeps_alive, content_type, connection)


def _field(line: bytes) -> tuple[bytes, bytes]:
    """The name of a field in lower case, and its line."""
    name, colon, _ = line.partition(b":")
    if not colon or not name or name.translate(None, _TOKEN):
        raise GarbageError(f"not a header field: {line[:80]!r}")
    return name.lower(), line


_known_field = lru_cache(_LINES_KEPT)(_field)


def _status_of(line: bytes) -> tuple[int, bytes, bool]:
    """The status, its reason, and whether it is said in HTTP/1.1."""
    if line == _USUAL:
        return 200, b"OK", True
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise GarbageError(f"not a status line: {line[:80]!r}")
    return int(found[2]), found[3] or b"", found[1] == b"1"


def _framing(status: int, lengths: set[bytes], codings: list[bytes], *, is_bodiless: bool) -> tuple[Framing, int]:
    # RFC 9112, 6.3. Whoever sends both a length and chunks may mean to have two readers see two different messages.
    if codings and (lengths or codings != [b"chunked"]):
        raise GarbageError(f"a body framed as {codings!r}, with lengths {sorted(lengths)!r}")
    if len(lengths) > 1 or not all(map(_DIGITS.fullmatch, lengths)):
        raise GarbageError(f"a body of the lengths {sorted(lengths)!r}")
    if is_bodiless or status in {204, 304} or status < 200:
        return Framing.NONE, 0
    if codings:
        return Framing.CHUNKED, 0
    if not lengths:
        return Framing.CLOSE, 0
    length = int(lengths.pop())
    return (Framing.LENGTH, length) if length else (Framing.NONE, 0)


class Response:
    """One response, fed as it comes.

    Attributes:
        head: its head, None until it is there.
        is_whole: its end has come.
        has_excess: more came behind its end, so the connection is not to be trusted any more.
        has_begun: any byte of it has come.
    """

    def __init__(self, *, is_bodiless: bool = False) -> None:
        self.head: Head | None = None
        self.is_whole = False
        self.has_excess = False
        self.has_begun = False
        self._is_bodiless = is_bodiless
        self._held = bytearray()  # of a head or of a chunk that is not yet whole
        self._wanted = 0  # Invariant: below so many held bytes there is nothing to be read in them
        self._interim_bytes = 0
        self._left = 0
        # Functions, not bound methods: an object that refers to itself lives until the garbage collector finds it.
        self._take: Callable[[Response, bytes], bytes] = Response._take_head

    def __repr__(self) -> str:
        status = self.head.status if self.head is not None else "no head"
        return f"<Response {status}, {'whole' if self.is_whole else 'not whole'}, {len(self._held)} bytes held>"

    def feed(self, data: bytes) -> bytes:
        """Take bytes; returns those of the body, in its own framing, that can go on: of a chunked one, complete chunks.

        Raises:
            GarbageError: this is not HTTP. Nothing may be fed after that.
        """
        return self._take(self, data)

    def feed_eof(self) -> bool:
        """The connection has ended; returns whether the response is whole with that."""
        if self.head is not None and self.head.framing is Framing.CLOSE:
            self.is_whole = True
        return self.is_whole

    def _take_head(self, data: bytes) -> bytes:
        self.has_begun = self.has_begun or bool(data)
        if self._held:
            self._held += data
            if len(self._held) <= HEAD_BYTES and b"\n" not in data:
                return b""
            data = bytes(self._held)
            self._held.clear()
        start = 0
        while True:
            end = data.find(b"\r\n\r\n", start)
            if (end if end >= 0 else len(data)) - start + self._interim_bytes > HEAD_BYTES:
                raise GarbageError(f"a head of more than {HEAD_BYTES} bytes")
            if end < 0:
                self._held += data[start:]
                return b""
            head = parse_head(data[start:end], is_bodiless=self._is_bodiless)
            if head.status == 101:
                raise GarbageError("the child wants another protocol")
            if head.status >= 200:
                break
            self._interim_bytes += end - start
            start = end + 4
        self.head = head
        body = data[end + 4 :]
        match head.framing:
            case Framing.CHUNKED:
                self._take = Response._take_chunks
            case Framing.LENGTH:
                self._left = head.length
                self._take = Response._take_length
            case Framing.CLOSE:
                self._take = Response._take_all
            case Framing.NONE:
                self.is_whole = True
                self._take = Response._take_excess
        return self._take(self, body) if body else b""

    def _take_length(self, data: bytes) -> bytes:
        left = self._left - len(data)
        if left > 0:
            self._left = left
            return data
        self.is_whole = True
        self._take = Response._take_excess
        if left < 0:
            self.has_excess = True
            data = data[: self._left]
        return data

    def _take_all(self, data: bytes) -> bytes:
        return data

    def _take_excess(self, data: bytes) -> bytes:
        self.has_excess = self.has_excess or bool(data)
        return b""

    def _take_chunks(self, data: bytes) -> bytes:
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return self._split() if len(self._held) >= CHUNK_BYTES else b""
            data = bytes(self._held)
            self._held.clear()
        at, size = 0, len(data)
        while at < size:
            line = _CHUNK_LINE.match(data, at)
            if line is None:
                self._check_line(data[at:])
                self._wanted = 0
                break
            length = int(line[1], 16)
            if length == 0:
                return data[:at] + self._take_trailer(data, at, line.end())
            end = line.end() + length + 2
            if end > size:
                self._wanted = end - at
                break
            if data[end - 2] != 13 or data[end - 1] != 10:
                raise GarbageError(f"a chunk that does not end at its end: {data[end - 2 : end]!r}")
            at = end
        if at == size:  # nearly always: children write whole chunks
            return data
        self._held += data[at:]
        return data[:at] + self._split() if size - at >= CHUNK_BYTES else data[:at]

    @staticmethod
    def _check_line(rest: bytes) -> None:
        # Either the beginning of a chunk's size, so that it matches as soon as the rest of it is there, or garbage.
        line, _, after = rest.partition(b"\r")
        if after or _CHUNK_LINE.fullmatch(line + b"\r\n") is None:
            raise GarbageError(f"not the size of a chunk: {rest[:80]!r}")

    def _split(self) -> bytes:
        # What is held begins with the line of a chunk that is not whole: pass on what there is as a chunk of its own,
        # and go on as if the rest were the next.
        line = _CHUNK_LINE.match(self._held)
        if line is None:  # pragma: no cover (more than a line is held)
            return b""
        start, left = line.end(), int(line[1], 16)
        part = bytes(self._held[start : start + left])
        left -= len(part)
        tail = b""
        if left == 0:  # all but its line end: the last byte waits for that
            part, tail = part[:-1], bytes(self._held[start + len(part) - 1 :])
            left = 1
        rest = b"%x\r\n" % left
        self._held[:] = rest + tail
        self._wanted = len(rest) + left + 2
        return as_chunk(part) if part else b""

    def _take_trailer(self, data: bytes, start: int, after_line: int) -> bytes:
        # Trailers are not passed on: nobody asked for them, and the head that announced them is not passed on either.
        blank = data.find(b"\r\n\r\n", after_line - 2)
        if blank < 0:
            if len(data) - start > _TRAILER_BYTES:
                raise GarbageError(f"trailers of more than {_TRAILER_BYTES} bytes")
            self._held += data[start:]
            self._wanted = 0
            return b""
        self.is_whole = True
        self.has_excess = blank + 4 < len(data)
        self._take = Response._take_excess
        return LAST_CHUNK


def as_chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body; nothing for no payload, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def dechunked(chunks: bytes) -> bytes:
    """The payload of complete chunks, as `Response.feed` returns them."""
    parts: list[bytes] = []
    at = 0
    while (line := _CHUNK_LINE.match(chunks, at)) is not None and (length := int(line[1], 16)):
        start = line.end()
        parts.append(chunks[start : start + length])
        at = start + length + 2
    return b"".join(parts)


class EventPeek:
    """What an event stream has said so far: fed its payload until it has data.

    Attributes:
        has_data: there was a `data` line, or the beginning of one.
        is_idle: there were only comments and blank lines, and all of them are complete.
    """

    def __init__(self) -> None:
        self.has_data = False
        self.is_idle = True
        self._has_fields = False
        self._line = b""  # the beginning of the line that is not complete, long enough to know it

    def feed(self, payload: bytes) -> None:
        """Take some of its payload."""
        *lines, rest = _EVENT_LINE_END.split(self._line + payload)
        for line in lines:
            if line.startswith(b"data:") or line == b"data":
                self.has_data = True
            elif line and not line.startswith(b":"):
                self._has_fields = True
        self._line = rest[:5]
        self.has_data = self.has_data or self._line == b"data:"
        self.is_idle = not (self.has_data or self._has_fields or rest)
