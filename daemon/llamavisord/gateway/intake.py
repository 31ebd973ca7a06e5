"""Takes in the body of a request: no larger than allowed, no more at once than there is room for, and not for ever."""

from __future__ import annotations

import time
from http import HTTPStatus
from types import TracebackType
from typing import ClassVar, Self

import anyio
from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError

from llamavisor.errors import LlamavisorError
from llamavisord.gateway.peek import Peek

BODY_S = 600.0
"""How long a body may take to arrive, however steadily it trickles: 256 MiB at 450 kB/s."""
PART_BYTES = 64 * 1024
"""What arrives in shorter pieces is put together: a million bytes, one in each object, would take thirty million."""
_ENCODINGS = frozenset({"gzip", "deflate", "br", "zstd"})
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class IntakeError(LlamavisorError):
    """Raised when a body was not taken in. What is left of it was not read: the answer has to close the connection.

    `status` is the HTTP status of that answer.
    """

    code = "body_refused"
    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST


class BodyTooLargeError(IntakeError):
    """Raised when a body is larger than one may be."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the body of the request is larger than {limit_bytes} bytes (max_body in [gateway])")


class BodyEncodedError(IntakeError):
    """Raised when a body is compressed. llama-server, too, refuses these encodings, and takes others for none."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE

    def __init__(self, encoding: str) -> None:
        super().__init__(f"the body of the request has the Content-Encoding {encoding}; send it without")


class ExpectationError(IntakeError):
    """Raised when a client expects something else than to be told to go on."""

    status = HTTPStatus.EXPECTATION_FAILED

    def __init__(self) -> None:
        super().__init__("the only expectation that is met is 100-continue")


class BodyStalledError(IntakeError):
    """Raised when no more of a body has come for a while."""

    status = HTTPStatus.REQUEST_TIMEOUT

    def __init__(self, size: int, stall_s: float) -> None:
        super().__init__(f"the body of the request stopped after {size} bytes: nothing more came for {stall_s:g} s")


class BodyBrokenError(IntakeError):
    """Raised when what is sent as a body breaks the rules of HTTP, such as a chunk without a length."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body of the request is not sent as HTTP wants it: {' '.join(reason.split())[:200]}")


class StockFullError(IntakeError):
    """Raised when the bodies that are held take all the room that there is. It is worth a try a little later."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the bodies of other requests take the {limit_bytes} bytes set aside (max_held in [gateway])")


class Stock:
    """Counts the bytes of all bodies that are held, of those that wait, are sent on, or are still arriving.

    Bytes count as they arrive: to announce many and send few keeps nobody else out.

    Args:
        limit_bytes: how many there may be.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def __repr__(self) -> str:
        return f"<Stock {self.held_bytes}/{self.limit_bytes}>"

    def take(self, size: int) -> None:
        """Count so many bytes more.

        Raises:
            StockFullError: there is no room for them; they are not counted.
        """
        if self.held_bytes + size > self.limit_bytes:
            raise StockFullError(self.limit_bytes)
        self.held_bytes += size

    def give(self, size: int) -> None:
        """Count so many bytes less."""
        self.held_bytes -= size


class Body:
    """The body of a request, held until it is released. Use it as a context manager, or call `release`.

    Attributes:
        parts: its bytes, in order; none after its release.
        size: how many bytes they are.
    """

    __slots__ = ("_held", "_stock", "parts", "size")

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._held = 0
        self.parts: tuple[bytes, ...] = ()
        self.size = 0

    def __repr__(self) -> str:
        return f"<Body {self.size} bytes, {self._held} held>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def grow(self, size: int) -> None:
        """Count so many bytes more as its own.

        Raises:
            StockFullError: there is no room for them.
        """
        self._stock.take(size)
        self._held += size
        self.size += size

    def release(self) -> None:
        """Let go of it. Once is enough, and twice does no harm."""
        self._stock.give(self._held)
        self._held = 0
        self.parts = ()


async def take_in(request: web.BaseRequest, peek: Peek, stock: Stock, *, limit_bytes: int, stall_s: float) -> Body:
    """Read the whole body of a request, and show it to `peek` on the way.

    A client that waits to be told to go on is told so, unless its body is refused for what it has announced.

    The server must not decompress bodies (`auto_decompress=False`): what is held would be larger than what was counted
    for as little as it takes to send a bomb, and llama-server would be told of an encoding that is gone.

    Args:
        request: nothing of its body was read yet.
        peek: is fed all of the body.
        stock: counts the bytes, until the body is released. When this fails, nothing stays counted.
        limit_bytes: the largest body that is allowed.
        stall_s: for how long it may make no progress.

    Raises:
        IntakeError: it is too large (also when that is only announced), compressed, stalled or malformed, the stock is
            full, or the client expects what cannot be.
        ConnectionResetError: the client has left.
    """
    if (request.content_length or 0) > limit_bytes:
        raise BodyTooLargeError(limit_bytes)
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and encoding.lower() in _ENCODINGS:
        raise BodyEncodedError(encoding)
    expectation = request.headers.get("Expect")
    if expectation is not None:
        _meet(request, expectation)
    body = Body(stock)
    try:
        body.parts = await _read(request, peek, body, limit_bytes, stall_s)
    except BaseException:
        body.release()
        raise
    return body


async def _read(
    request: web.BaseRequest, peek: Peek, body: Body, limit_bytes: int, stall_s: float
) -> tuple[bytes, ...]:
    content = request.content
    parts: list[bytes] = []
    short = bytearray()
    ends_at = time.monotonic() + BODY_S
    try:
        piece = content.read_nowait()
        while True:
            if piece:
                body.grow(len(piece))
                if body.size > limit_bytes:
                    raise BodyTooLargeError(limit_bytes)
                peek.feed(piece)
                if not short and (len(piece) >= PART_BYTES or content.at_eof()):
                    parts.append(piece)
                else:
                    short += piece
            if short and (len(short) >= PART_BYTES or content.at_eof()):
                parts.append(bytes(short))
                short.clear()
            if content.at_eof():
                return tuple(parts)
            if request.transport is None:
                raise ConnectionResetError("the client has left")
            if (left_s := ends_at - time.monotonic()) <= 0:
                raise BodyStalledError(body.size, BODY_S)
            with anyio.fail_after(min(stall_s, left_s)):
                piece = await content.readany()
    except TimeoutError:
        raise BodyStalledError(body.size, stall_s) from None
    except (HttpProcessingError, web.RequestPayloadError) as error:
        raise BodyBrokenError(str(error)) from error


def _meet(request: web.BaseRequest, expectation: str) -> None:
    """Tell a client to go on that waits for it; one of HTTP/1.0 does not wait (RFC 9110, 10.1.1)."""
    if request.version < HttpVersion11:
        return
    if expectation.lower() != "100-continue":
        raise ExpectationError
    content = request.content
    if request.transport is not None and not content.total_bytes and not content.at_eof():
        request.transport.write(_CONTINUE)
