"""Bodies as they come over real connections: whole, in pieces, too large, too slow, broken, and never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from unittest import mock

import aiohttp
import pytest
from aiohttp import web
from aiohttp.http_exceptions import TransferEncodingError
from aiohttp.test_utils import make_mocked_request

from llamavisord.gateway.intake import (
    PART_BYTES,
    Body,
    BodyBrokenError,
    BodyEncodedError,
    BodyStalledError,
    BodyTooLargeError,
    ExpectationError,
    IntakeError,
    Stock,
    StockFullError,
    take_in,
)
from llamavisord.gateway.peek import JsonPeek, Peeked
from llamavisord.gateway.server import make_server

pytestmark = pytest.mark.anyio

PATIENCE_S = 20.0
LIMIT_BYTES = 1_000_000
CHAT = b'{"model":"alpha","stream":true}'
FOUND = Peeked("alpha", stream=True)


def head(*lines: str, version: str = "HTTP/1.1", method: str = "POST") -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{method} /v1/x {version}", "Host: here", *lines, "", ""]).encode()


def whole(body: bytes, *lines: str) -> bytes:
    """A request with a length."""
    return head(f"Content-Length: {len(body)}", *lines) + body


def chunk(data: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Place:
    """Where requests are taken in.

    Attributes:
        stock: counts their bodies.
        limit_bytes: how large one may be.
        stall_s: how slow one may be.
        ended: what came of them, in order.
        begun: set when a request has come.
        release: set when bodies may be let go.
    """

    stock: Stock = field(default_factory=lambda: Stock(10 * LIMIT_BYTES))
    limit_bytes: int = LIMIT_BYTES
    stall_s: float = PATIENCE_S
    port: int = 0
    ended: asyncio.Queue[tuple[Body, bytes, Peeked] | BaseException] = field(default_factory=asyncio.Queue)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Take one request in, hold its body until that may be let go, and tell what came of it."""
        peek = JsonPeek()
        self.begun.set()
        try:
            body = await take_in(request, peek, self.stock, limit_bytes=self.limit_bytes, stall_s=self.stall_s)
        except BaseException as error:
            self.ended.put_nowait(error)
            if not isinstance(error, IntakeError):
                raise
            response = web.Response(status=error.status)
            response.force_close()
            return response
        with body:
            assert sum(map(len, body.parts)) == body.size
            self.ended.put_nowait((body, b"".join(body.parts), peek.finish()))
            await self.release.wait()
        return web.Response()

    async def next(self) -> tuple[bytes, Peeked]:
        """What was taken in next."""
        async with asyncio.timeout(PATIENCE_S):
            end = await self.ended.get()
        assert isinstance(end, tuple), end
        return end[1:]

    async def failure(self) -> BaseException:
        """Why the next one was not taken in."""
        async with asyncio.timeout(PATIENCE_S):
            end = await self.ended.get()
        assert isinstance(end, BaseException), end
        return end


@dataclass
class Client:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Send bytes; whether they arrive is another matter."""
        self.writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            await self.writer.drain()

    async def line(self) -> bytes:
        """The next line of the answer."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readline()

    async def rest(self) -> bytes:
        """All of the answer until the connection is closed."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()


@asynccontextmanager
async def serving(place: Place) -> AsyncIterator[Place]:
    """A server of the gateway's kind that takes requests in there."""
    server = make_server(place.answer)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    place.port = listener.sockets[0].getsockname()[1]
    try:
        yield place
    finally:
        listener.close()
        await server.shutdown(1.0)
        await listener.wait_closed()


@asynccontextmanager
async def connected(place: Place) -> AsyncIterator[Client]:
    """One client."""
    client = Client(*await asyncio.open_connection("127.0.0.1", place.port))
    try:
        yield client
    finally:
        client.writer.close()
        await asyncio.gather(client.writer.wait_closed(), return_exceptions=True)


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    """Where requests are taken in, and their bodies let go at once."""
    async with serving(Place()) as there:
        there.release.set()
        yield there


async def test_a_body_that_is_there_at_once(place: Place) -> None:
    """A small body is one part, as it was sent, and the peek has seen it."""
    async with connected(place) as client:
        await client.send(whole(CHAT))
        assert await place.next() == (CHAT, FOUND)
        assert (await client.line()).startswith(b"HTTP/1.1 200")


async def test_bodies_one_after_another_on_one_connection(place: Place) -> None:
    """Requests that are sent without waiting for answers keep their own bodies."""
    async with connected(place) as client:
        await client.send(whole(CHAT) + whole(b"{}") + whole(b"") + whole(CHAT))
        assert [await place.next() for _ in range(4)] == [
            (CHAT, FOUND),
            (b"{}", Peeked()),
            (b"", Peeked(is_object=False)),
            (CHAT, FOUND),
        ]


async def test_a_body_byte_by_byte(place: Place) -> None:
    """How a body is cut on its way changes nothing, and short pieces are put together."""
    async with connected(place) as client:
        await client.send(head(f"Content-Length: {len(CHAT)}"))
        for byte in CHAT:
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert await place.next() == (CHAT, FOUND)


async def test_parts_are_never_short() -> None:
    """Of a body that comes in pieces all parts but the last have a good size; they are the body."""
    body = CHAT.ljust(300_000)
    async with serving(Place()) as place, connected(place) as client:
        await client.send(head("Transfer-Encoding: chunked"))
        for begin in range(0, len(body), 700):
            await client.send(chunk(body[begin : begin + 700]))
            await asyncio.sleep(0)
        await client.send(b"0\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            end = await place.ended.get()
        assert isinstance(end, tuple), end
        held = end[0]
        assert end[1:] == (body, FOUND)
        assert all(len(part) >= PART_BYTES for part in held.parts[:-1])
        assert place.stock.held_bytes == len(body)
        place.release.set()
        assert (await client.line()).startswith(b"HTTP/1.1 200")
        assert place.stock.held_bytes == 0
        assert held.parts == ()


async def test_a_large_body(place: Place) -> None:
    """A body of the largest size that is allowed is taken in."""
    body = CHAT[:-1] + b',"a":"' + b"A" * (LIMIT_BYTES - len(CHAT) - 7) + b'"}'
    async with connected(place) as client:
        await client.send(whole(body))
        assert await place.next() == (body, FOUND)


async def test_no_body(place: Place) -> None:
    """A request without a body has an empty one."""
    async with connected(place) as client:
        await client.send(head(method="GET"))
        assert await place.next() == (b"", Peeked(is_object=False))


async def test_too_large_a_body_is_refused_before_it_comes(place: Place) -> None:
    """A length that is too large is refused at once, whether or not the client waits to be told to go on."""
    for lines in ((), ("Expect: 100-continue",)):
        async with connected(place) as client:
            await client.send(head(f"Content-Length: {LIMIT_BYTES + 1}", *lines))
            assert (await client.line()).startswith(b"HTTP/1.1 413")
            client.writer.write_eof()
            assert b"Connection: close" in await client.rest()
            assert isinstance(await place.failure(), BodyTooLargeError)


async def test_too_large_a_body_is_refused_when_it_becomes_so(place: Place) -> None:
    """A body without a length is read no further than to the limit."""
    async with connected(place) as client:
        await client.send(head("Transfer-Encoding: chunked"))
        for _ in range(LIMIT_BYTES // 100_000):
            await client.send(chunk(b" " * 100_000))
        await client.send(chunk(b" "))
        assert (await client.line()).startswith(b"HTTP/1.1 413")
        assert isinstance(await place.failure(), BodyTooLargeError)
        assert place.stock.held_bytes == 0


async def test_the_stock_is_shared() -> None:
    """Bodies that do not fit beside those that are held are refused, and fit when those are gone."""
    async with serving(Place(stock=Stock(100))) as place, connected(place) as first, connected(place) as second:
        await first.send(whole(CHAT.ljust(90)))
        await place.next()
        await second.send(whole(CHAT))
        assert (await second.line()).startswith(b"HTTP/1.1 503")
        assert isinstance(await place.failure(), StockFullError)
        assert place.stock.held_bytes == 90
        place.release.set()
        assert (await first.line()).startswith(b"HTTP/1.1 200")
        async with connected(place) as third:
            await third.send(whole(CHAT))
            assert await place.next() == (CHAT, FOUND)


async def test_a_stalled_body_is_given_up() -> None:
    """A body of which nothing more comes is not waited for, and what had come of it is let go."""
    async with serving(Place(stall_s=0.5)) as place, connected(place) as client:
        await client.send(whole(CHAT)[:-1])
        assert (await client.line()).startswith(b"HTTP/1.1 408")
        error = await place.failure()
        assert isinstance(error, BodyStalledError)
        assert f"after {len(CHAT) - 1} bytes" in str(error)
        assert place.stock.held_bytes == 0


async def test_a_client_that_leaves_is_not_waited_for(place: Place) -> None:
    """Nothing stays counted of the body of a client that has left."""
    async with connected(place) as client:
        await client.send(whole(CHAT)[:-1])
        while not place.stock.held_bytes:
            await asyncio.sleep(0.001)
    assert isinstance(await place.failure(), (ConnectionResetError, asyncio.CancelledError))
    assert place.stock.held_bytes == 0


@pytest.mark.parametrize("broken", [b"x\r\n", b"-1\r\nx", b"5\r\nabcdefgh"])
async def test_broken_chunks_are_not_waited_for(broken: bytes) -> None:
    """A body whose chunks are none ends no later than one of which nothing more comes."""
    async with serving(Place(stall_s=0.5)) as place, connected(place) as client:
        await client.send(head("Transfer-Encoding: chunked") + chunk(b"{"))
        while not place.stock.held_bytes:
            await asyncio.sleep(0.001)
        await client.send(broken)
        assert (await client.line())[:12] in {b"HTTP/1.1 400", b"HTTP/1.1 408"}
        assert isinstance(await place.failure(), (BodyBrokenError, BodyStalledError))  # by aiohttp's parser: C, Python
        assert place.stock.held_bytes == 0


async def test_what_aiohttp_finds_wrong_with_a_body_is_told() -> None:
    """An error of aiohttp's parser is one of the client."""
    content = aiohttp.StreamReader(mock.Mock(), 2**16, loop=asyncio.get_running_loop())
    content.feed_data(CHAT)
    content.set_exception(TransferEncodingError("bad chunk"))
    stock = Stock(100)
    with pytest.raises(BodyBrokenError, match="bad chunk"):
        await take_in(
            make_mocked_request("POST", "/", payload=content), JsonPeek(), stock, limit_bytes=100, stall_s=PATIENCE_S
        )
    assert stock.held_bytes == 0


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd"])
async def test_compressed_bodies_are_refused(place: Place, encoding: str) -> None:
    """What llama-server would not decompress is not decompressed here, however large it would become."""
    async with connected(place) as client:
        await client.send(whole(CHAT, f"Content-Encoding: {encoding}"))
        assert (await client.line()).startswith(b"HTTP/1.1 415")
        assert isinstance(await place.failure(), BodyEncodedError)


@pytest.mark.parametrize("encoding", ["identity", "utf-8", "x-gzip"])
async def test_other_encodings_are_none(place: Place, encoding: str) -> None:
    """An encoding that llama-server does not know leaves the body as it is."""
    async with connected(place) as client:
        await client.send(whole(CHAT, f"Content-Encoding: {encoding}"))
        assert await place.next() == (CHAT, FOUND)


async def test_a_client_that_waits_is_told_to_go_on(place: Place) -> None:
    """A client that asks first, as curl does for large bodies, is told to go on before its body comes."""
    async with connected(place) as client:
        await client.send(head(f"Content-Length: {len(CHAT)}", "Expect: 100-Continue"))
        assert await client.line() == b"HTTP/1.1 100 Continue\r\n"
        assert await client.line() == b"\r\n"
        await client.send(CHAT)
        assert await place.next() == (CHAT, FOUND)
        assert (await client.line()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "request_",
    [
        whole(CHAT, "Expect: 100-continue"),
        head("Expect: 100-continue", method="GET"),
    ],
)
async def test_a_client_that_does_not_wait_is_not_told(place: Place, request_: bytes) -> None:
    """A client whose body has come, or has none, is not told to go on."""
    async with connected(place) as client:
        await client.send(request_)
        assert (await client.line()).split(b" ", 1)[1].startswith(b"200")


async def test_a_client_of_http_1_0_is_not_told_to_go_on(place: Place) -> None:
    """A client of HTTP/1.0, which knows no such answer, gets none, even if it asks."""
    async with connected(place) as client:
        await client.send(head("Content-Length: 2", "Expect: 100-continue", version="HTTP/1.0"))
        async with asyncio.timeout(PATIENCE_S):
            await place.begun.wait()
        await client.send(b"{}")
        assert (await client.line()).split(b" ", 1)[1].startswith(b"200")


async def test_other_expectations_are_not_met(place: Place) -> None:
    """A client that expects something else is told that this cannot be."""
    async with connected(place) as client:
        await client.send(whole(CHAT, "Expect: miracles"))
        assert (await client.line()).startswith(b"HTTP/1.1 417")
        assert isinstance(await place.failure(), ExpectationError)


class Late(Place):
    """Reads nothing of a body before its client was made to wait."""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Likewise."""
        async with asyncio.timeout(PATIENCE_S):
            while request.transport is not None and request.transport.is_reading():
                await asyncio.sleep(0.01)
        return await super().answer(request)


async def test_a_client_that_was_made_to_wait_goes_on_when_its_body_is_read() -> None:
    """A body that came faster than it was read is taken in whole, and so is the request behind it."""
    body = b'{"model":"alpha","stream":true,"x":"%b"}' % (b"a" * 4_000_000)
    late = Late(limit_bytes=len(body))
    late.release.set()
    async with serving(late), connected(late) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(client.send(whole(body)))
        assert await late.next() == (body, FOUND)
        tasks.create_task(client.send(whole(body)))
        assert await late.next() == (body, FOUND)


def test_release_is_idempotent() -> None:
    """A body that is let go twice is counted once."""
    stock = Stock(100)
    other = Body(stock)
    other.grow(40)
    with Body(stock) as body:
        body.grow(60)
        with pytest.raises(StockFullError):
            body.grow(1)
        assert (body.size, stock.held_bytes) == (60, 100)
        body.release()
        body.release()
    assert stock.held_bytes == 40
