"""The relay between raw clients and scripted children, over real sockets: what comes, what breaks, who leaves."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from llamavisord.gateway.answer import HELD_BYTES, TAIL_BYTES, Answer
from llamavisord.gateway.relay import NotAStreamError, Relay, UpstreamError, UpstreamFailure

pytestmark = pytest.mark.anyio

PATIENCE_S = 20.0
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
ASK = b"POST /v1/x HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n{}"


def chunk(payload: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(text: str) -> bytes:
    """One event in a chunk of its own, as llama-server sends them."""
    return chunk(f"data: {text}\n\n".encode())


def whole(body: bytes, head: bytes = JSON) -> bytes:
    """An answer with a length."""
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclass
class Call:
    """One connection that a child has accepted."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def asked(self) -> tuple[bytes, bytes]:
        """The next request: its head, and its body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
        return head, await self.reader.readexactly(length)

    async def say(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """End it with an RST, as the kernel does for a process that was killed."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the other side has closed it."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


@dataclass
class Client:
    """A raw client."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def say(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> bytes:
        """The next head, with its blank line."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> tuple[bytes, bytes]:
        """The next answer whole: its head, and its body in the framing that it has."""
        head = await self.head()
        if b"Transfer-Encoding: chunked" in head:
            return head, await self.reader.readuntil(END)
        length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
        return head, await (self.reader.readexactly(int(length)) if length else self.reader.read())

    def reset(self) -> None:
        """Leave at once."""
        self.writer.transport.abort()


Script = Callable[[Call], Awaitable[None]]


@dataclass
class Scene:
    """A child that follows a script, and a server that relays to it."""

    relay: Relay
    port: int = 0
    host: str = "127.0.0.1"
    front: web.Server = field(init=False)
    front_port: int = 0
    calls: list[Call] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    failures: list[UpstreamError] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    attempts: int = 1
    prepare: Callable[[Answer], None] = lambda answer: None
    clients: list[Client] = field(default_factory=list)

    async def client(self, *, receive_buffer: int = 0) -> Client:
        """A new client of the front."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.front_port))
        self.clients.append(Client(*await asyncio.open_connection(sock=sock, limit=65536)))
        return self.clients[-1]

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """What a gateway does, without any policy."""
        body = await request.read()
        answer = Answer(request)
        self.answers.append(answer)
        self.prepare(answer)
        lines = [f"{request.method} {request.rel_url} HTTP/1.1", "Host: child", f"Content-Length: {len(body)}", "", ""]
        head = "\r\n".join(lines).encode()
        for attempt in range(self.attempts):
            try:
                await self.relay.exchange(self, head, (body,), answer, fresh=attempt > 0)
            except UpstreamError as exc:
                self.failures.append(exc)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            else:
                return answer
            if answer.has_data:
                break
        if answer.is_stream:
            answer.end_with_event(b"data: broken\n\n")
            return answer
        if answer.has_head:
            answer.cut_off()
            return answer
        return web.Response(status=502, text=self.failures[-1].kind.name)


@asynccontextmanager
async def scene(script: Script, **options: float) -> AsyncIterator[Scene]:
    """A scene with this child; the script runs once per connection, and the connection ends with it."""
    it = Scene(Relay(**options))  # type: ignore[arg-type]

    async def follow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        it.calls.append(Call(len(it.calls), reader, writer))
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await script(it.calls[-1])
        finally:
            writer.close()

    child = await asyncio.start_server(follow, "127.0.0.1", 0)
    it.port = child.sockets[0].getsockname()[1]
    it.front = web.Server(lambda request: it.handle(request), handler_cancellation=True, access_log=None)  # noqa: PLW0108 (a test may replace it)
    listening = await asyncio.get_running_loop().create_server(it.front, "127.0.0.1", 0)
    it.front_port = listening.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield it
    finally:
        listening.close()
        child.close()
        for client in it.clients:
            client.reset()
        await it.front.shutdown(1)
        await it.relay.aclose()
        for call in it.calls:
            call.writer.transport.abort()
            with suppress(ConnectionError):
                await call.writer.wait_closed()
        for client in it.clients:
            with suppress(ConnectionError):
                await client.writer.wait_closed()
        await asyncio.sleep(0)


def always(answer: bytes) -> Script:
    """A child that says the same to every request."""

    async def script(call: Call) -> None:
        while True:
            await call.asked()
            await call.say(answer)

    return script


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event announces."""
    while not condition():
        await asyncio.sleep(0.005)


# Whole answers.


async def test_an_answer_goes_to_the_client_and_both_connections_go_on() -> None:
    """Requests of one client, one after another, go over one connection to the child."""

    async def script(call: Call) -> None:
        while True:
            _, body = await call.asked()
            await call.say(whole(b"[" + body + b"]"))

    async with scene(script) as it:
        client = await it.client()
        for number in range(5):
            body = b"%d" % number
            await client.say(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            head, answered = await client.answer()
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answered == b"[" + body + b"]"
        assert len(it.calls) == 1
        assert it.failures == []
        assert [answer.has_data for answer in it.answers] == [True] * 5


async def test_what_is_for_one_hop_is_not_passed_on() -> None:
    """The child's connection, and whom it lets read, are its own; the rest goes on, and ours is added."""
    head = (
        b"HTTP/1.1 418 Teapot\r\nServer: llama.cpp\r\nKeep-Alive: timeout=5, max=100\r\n"
        b"Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nAccess-Control-Allow-Origin: *\r\n"
        b"X-Own: \xe4\r\ncontent-type: text/plain\r\nTrailer: x\r\n"
    )
    async with scene(always(whole(b"short and stout", head))) as it:
        it.prepare = lambda answer: answer.extra_headers.append(("X-Llamavisor-Router", "main"))
        client = await it.client()
        await client.say(ASK)
        expected = (
            b"HTTP/1.1 418 Teapot\r\nServer: llama.cpp\r\nX-Own: \xe4\r\ncontent-type: text/plain\r\n"
            b"X-Llamavisor-Router: main\r\nContent-Length: 15\r\n\r\n"
        )
        assert await client.answer() == (expected, b"short and stout")
        assert it.answers[0].status == 418
        assert it.answers[0].tail == b"short and stout"


async def test_a_header_of_ours_cannot_smuggle_another() -> None:
    """A line end in an added header is an error of ours, and the client gets no head of it."""
    async with scene(always(whole(b"{}"))) as it:
        seen: list[Exception] = []

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            answer = Answer(request)
            answer.extra_headers.append(("X-A", "b\r\nX-C: d"))
            try:
                answer.begin_stream()
            except ValueError as exc:
                seen.append(exc)
            return web.Response(text="ours")

        it.handle = handle  # type: ignore[method-assign]
        client = await it.client()
        await client.say(ASK)
        head, _ = await client.answer()
        assert b"X-C" not in head


async def test_pipelined_requests_are_answered_in_order() -> None:
    """A client that does not wait gets its answers one after another, streams and not."""

    async def script(call: Call) -> None:
        while True:
            head, _ = await call.asked()
            path = head.split(b" ")[1]
            await call.say(STREAM + event("s") + END if path == b"/s" else whole(path))

    async with scene(script) as it:
        client = await it.client()
        paths = [b"/1", b"/s", b"/2", b"/s", b"/3"]
        await client.say(b"".join(b"GET %b HTTP/1.1\r\nHost: here\r\n\r\n" % path for path in paths))
        got = [(await client.answer())[1] for _ in paths]
        assert got == [b"/1", event("s") + END, b"/2", event("s") + END, b"/3"]


async def test_head_requests_have_no_body() -> None:
    """The answer to a HEAD has the child's length and no body, and the connection goes on."""
    async with scene(always(JSON + b"Content-Length: 1234\r\n\r\n")) as it:
        client = await it.client()
        for _ in range(2):
            await client.say(b"HEAD / HTTP/1.1\r\nHost: here\r\n\r\n")
            head = await client.head()
            assert b"Content-Length: 1234\r\n" in head
        assert len(it.calls) == 1


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_without_a_body(status: bytes) -> None:
    """204 and 304 end with their heads."""
    async with scene(always(b"HTTP/1.1 " + status + b"\r\nETag: x\r\n\r\n")) as it:
        client = await it.client()
        for _ in range(2):
            await client.say(ASK)
            assert await client.head() == b"HTTP/1.1 " + status + b"\r\nETag: x\r\n\r\n"


async def test_an_empty_body_keeps_its_length() -> None:
    """An answer with a length of 0 says so."""
    async with scene(always(whole(b""))) as it:
        client = await it.client()
        await client.say(ASK)
        head, body = await client.answer()
        assert b"Content-Length: 0\r\n" in head
        assert body == b""


async def test_a_client_may_ask_for_the_end_of_its_connection() -> None:
    """`Connection: close` is answered with the same, and then the connection ends."""
    async with scene(always(whole(b"{}"))) as it:
        client = await it.client()
        await client.say(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        head, body = await client.answer()
        assert b"Connection: close\r\n" in head
        assert body + await client.reader.read() == b"{}"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (whole(b"whole"), b"Content-Length: 5\r\nConnection: keep-alive\r\n"),
        (JSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"wh") + chunk(b"ole") + END, b"Content-Length: 5\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\nwhole", b"Content-Length: 5\r\n"),
    ],
    ids=["length", "chunked", "close"],
)
async def test_http_1_0_clients_are_answered_without_chunks(sent: bytes, expected: bytes) -> None:
    """A client of HTTP/1.0 gets a length, and may keep its connection if it asked for that."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(sent)

    async with scene(script) as it:
        client = await it.client()
        for _ in range(2):
            await client.say(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            head, body = await client.answer()
            assert head.startswith(b"HTTP/1.0 200 OK\r\n")
            assert expected in head
            assert body == b"whole"


async def test_http_1_0_clients_get_streams_until_the_end_of_the_connection() -> None:
    """A stream has no length, so its end is the end of the connection."""
    async with scene(always(STREAM + event("1") + event("2") + END)) as it:
        client = await it.client()
        await client.say(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        head, body = await client.answer()
        assert b"keep-alive" not in head
        assert b"chunked" not in head
        assert body == b"data: 1\n\ndata: 2\n\n"
        assert it.answers[0].tail == body


async def test_a_long_answer_flows_and_its_tail_is_remembered() -> None:
    """Beyond what is held back an answer flows before it is whole."""
    body = bytes(range(256)) * (HELD_BYTES // 128)
    flows = asyncio.Event()

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(whole(body)[:-100])
        await flows.wait()
        await call.say(body[-100:])

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        await client.head()
        assert await client.reader.readexactly(len(body) - 100) == body[:-100]
        flows.set()
        assert await client.reader.readexactly(100) == body[-100:]
        await until(lambda: it.answers[0]._eof_sent)
        assert it.answers[0].tail == body[-TAIL_BYTES:]


async def test_a_body_that_only_the_connection_ends_goes_on_as_chunks_when_it_is_long() -> None:
    """Without a length and too long to be held, it is sent as chunks, and the client's connection goes on."""
    body = b"x" * (HELD_BYTES + 5000)

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(b"HTTP/1.1 200 OK\r\n\r\n" + body)

    async with scene(script) as it:
        client = await it.client()
        for _ in range(2):
            await client.say(ASK)
            head = await client.head()
            assert b"Transfer-Encoding: chunked\r\n" in head
            got = b""
            while size := int((await client.reader.readline()).strip(), 16):
                got += await client.reader.readexactly(size)
                await client.reader.readline()
            await client.reader.readline()
            assert got == body


# Streams.


async def test_a_stream_passes_chunk_by_chunk_untouched() -> None:
    """Each chunk is with the client before the next one is sent, exactly as the child framed it."""
    sent: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM)
        while data := await sent.get():
            await call.say(data)

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        await until(lambda: bool(it.answers) and it.answers[0]._head is not None)
        assert not it.answers[0].has_head  # a child says 200 before it has looked at the prompt
        for number in range(4):
            await sent.put(event(str(number)))
            if not number:
                head = await client.head()
                assert head == (
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
            assert await client.reader.readexactly(len(event("0"))) == event(str(number))
        await sent.put(END)
        assert await client.reader.readexactly(5) == END
        await until(lambda: it.answers[0]._eof_sent)
        assert it.answers[0].tail == b"".join(b"data: %d\n\n" % number for number in range(4))
        assert it.answers[0].bytes_sent == len(head) + 4 * len(event("0")) + 5
        assert it.answers[0].first_data_at is not None
        await sent.put(b"")


async def test_a_stream_may_be_cut_anywhere() -> None:
    """A child's chunks that arrive byte by byte reach the client as chunks."""

    async def script(call: Call) -> None:
        await call.asked()
        for byte in STREAM + event("1") + event("2") + END:
            await call.say(bytes([byte]))
            await asyncio.sleep(0)

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        _, body = await client.answer()
        assert body == event("1") + event("2") + END


async def test_a_ping_of_the_child_is_no_data() -> None:
    """Comments go on with the head, and leave the answer one that can be asked for again."""
    ping = chunk(b": ping\n\n")

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM + ping)
        if call.number == 0:
            await until(lambda: it.answers[0].has_head)
            call.reset()
        else:
            await call.say(ping + event("again") + END)

    async with scene(script) as it:
        it.attempts = 2
        client = await it.client()
        await client.say(ASK)
        _, body = await client.answer()
        assert body == ping + ping + ping + event("again") + END
        assert [failure.has_data for failure in it.failures] == [False]
        await client.say(ASK)  # the connection goes on
        await client.answer()


async def test_an_event_of_several_lines_is_held_until_its_data() -> None:
    """`event:` alone is not data yet, and does not go on alone."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM + chunk(b"event: message_start\n"))
        await until(lambda: it.answers[0]._held_bytes > 0)
        assert not it.answers[0].has_head
        await call.say(chunk(b"data: {}\n\n") + END)

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        _, body = await client.answer()
        assert body == chunk(b"event: message_start\n") + chunk(b"data: {}\n\n") + END


async def test_a_stream_with_another_framing_goes_on_as_chunks() -> None:
    """A client may wait for events, so a stream is always one that an error event can end."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(whole(b"data: 1\n\n", STREAM.replace(b"Transfer-Encoding: chunked\r\n\r\n", b"")))

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        _, body = await client.answer()
        assert body == event("1") + END


async def test_a_stream_without_any_data_is_passed_on() -> None:
    """A child that ends its stream at once has answered."""
    async with scene(always(STREAM + END)) as it:
        client = await it.client()
        for _ in range(2):
            await client.say(ASK)
            assert (await client.answer())[1] == END
        assert it.failures == []


# What breaks.


@pytest.mark.parametrize("sent", [b"", STREAM[:20], STREAM, STREAM + b"5\r\nda"], ids=["none", "head", "200", "chunk"])
async def test_a_child_that_dies_before_data_is_asked_again_unseen(sent: bytes) -> None:
    """Until the first data the client has seen nothing, and what was held of the dead child is dropped."""

    async def script(call: Call) -> None:
        await call.asked()
        if call.number == 0:
            await call.say(sent)
            await until(lambda: not sent or it.answers[0]._head is not None or sent == STREAM[:20])
            call.reset()
        else:
            await call.say(STREAM + event("again") + END)

    async with scene(script) as it:
        it.attempts = 2
        client = await it.client()
        await client.say(ASK)
        _, body = await client.answer()
        assert body == event("again") + END
        assert [(failure.kind, failure.was_reused, failure.has_data) for failure in it.failures] == [
            (UpstreamFailure.RESET, False, False)
        ]
        assert it.answers[0].tail == b"data: again\n\n"


@pytest.mark.parametrize("broken", [b"", b"1", b"9\r", b"9\r\ndata: ", b"9\r\ndata: 9\n\n"])
async def test_a_stream_that_breaks_ends_with_an_event(broken: bytes) -> None:
    """Wherever a stream breaks, the event behind it and the end are well-formed, and the connection goes on."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM + event("1") + broken)
        await until(lambda: it.answers[-1].has_data)
        call.writer.close()

    async with scene(script) as it:
        client = await it.client()
        for _ in range(2):
            await client.say(ASK)
            _, body = await client.answer()
            assert body == event("1") + event("broken") + END
        assert [(failure.kind, failure.has_data) for failure in it.failures] == [(UpstreamFailure.RESET, True)] * 2


async def test_an_event_that_broke_in_its_middle_is_ended_first() -> None:
    """The last event stands alone, even if what was sent before it is no whole event."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM + chunk(b"data: {"))
        await until(lambda: it.answers[0].has_data)

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        _, body = await client.answer()
        assert body == chunk(b"data: {") + chunk(b"\n\ndata: broken\n\n") + END


async def test_a_whole_answer_that_breaks_is_not_passed_on() -> None:
    """A part of a JSON document is of no use: the client gets an error instead."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(whole(b"{" + b" " * 1000 + b"}")[:-1])

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        head, body = await client.answer()
        assert head.startswith(b"HTTP/1.1 502 ")
        assert body == b"RESET"


async def test_a_long_answer_that_breaks_is_cut_off() -> None:
    """What began to flow and broke ends so that the client cannot take it for whole."""
    body = b"x" * (2 * HELD_BYTES)

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(whole(body)[:-1])

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        await client.head()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await client.reader.readexactly(len(body))


async def test_a_reset_on_a_used_connection_is_told_apart() -> None:
    """A child that closes a connection just when it is used again has not crashed."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(whole(b"%d" % call.number))
        if call.number == 0:
            await call.asked()
            call.reset()

    async with scene(script) as it:
        it.attempts = 2
        client = await it.client()
        for expected in (b"0", b"1"):
            await client.say(ASK)
            assert (await client.answer())[1] == expected
        assert [(failure.kind, failure.was_reused) for failure in it.failures] == [(UpstreamFailure.RESET, True)]


async def test_a_reset_within_an_answer_is_a_failure_on_any_connection() -> None:
    """Once a byte has come, it does not matter that the connection was used before."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(whole(b"1"))
        await call.asked()
        await call.say(b"H")
        call.writer.close()

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        await client.answer()
        await client.say(ASK)
        assert (await client.answer())[1] == b"RESET"
        assert [failure.was_reused for failure in it.failures] == [False]


async def test_a_closed_port_is_refused() -> None:
    """Nobody listening is known for what it is."""
    async with scene(always(b"")) as it:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            it.port = reserved.getsockname()[1]
            client = await it.client()
            await client.say(ASK)
            assert (await client.answer())[1] == b"REFUSED"


async def test_a_child_that_accepts_nothing_times_out() -> None:
    """A stopped process with a full backlog is not waited for without end."""
    async with scene(always(b""), connect_s=0.2) as it:
        with socket.socket() as full, socket.socket() as first, socket.socket() as second:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for sock in (first, second):
                sock.setblocking(False)
                sock.connect_ex(full.getsockname())
            it.port = full.getsockname()[1]
            client = await it.client()
            await client.say(ASK)
            assert (await client.answer())[1] == b"TIMEOUT"


@pytest.mark.parametrize(
    "sent",
    [b"SSH-2.0-x\r\n\r\n", JSON + b"X: " + b"x" * 70000, STREAM + b"zz\r\n", b"HTTP/1.1 101 Up\r\n\r\n"],
    ids=["no http", "long head", "no chunk", "upgrade"],
)
async def test_garbage_is_known_as_such(sent: bytes) -> None:
    """What is no HTTP is an error, and its connection is closed."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(sent)
        await call.gone()

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        assert (await client.answer())[1] == b"GARBAGE"


async def test_bytes_that_nobody_asked_for_close_the_connection() -> None:
    """An answer is passed on, but what comes behind it must not become the answer of the next request."""

    async def script(call: Call) -> None:
        while True:
            await call.asked()
            await call.say(whole(b"asked") + whole(b"smuggled"))

    async with scene(script) as it:
        client = await it.client()
        for _ in range(3):
            await client.say(ASK)
            assert (await client.answer())[1] == b"asked"
        assert len(it.calls) == 3


# The connections.


async def test_connections_are_used_in_turn_and_not_too_often() -> None:
    """A connection is given up before the child would do it."""
    async with scene(always(whole(b"{}")), uses=3) as it:
        client = await it.client()
        for _ in range(7):
            await client.say(ASK)
            await client.answer()
        assert len(it.calls) == 3


async def test_an_old_connection_is_not_used_again() -> None:
    """One that was idle for too long is closed, not used."""
    async with scene(always(whole(b"{}")), idle_s=-1) as it:
        client = await it.client()
        for _ in range(3):
            await client.say(ASK)
            await client.answer()
        assert len(it.calls) == 3
        await it.calls[0].gone()
        await it.calls[1].gone()


async def test_a_child_that_closes_is_asked_on_a_new_connection() -> None:
    """`Connection: close` is believed, and an end while idle is noticed."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(whole(b"{}", JSON + b"Connection: close\r\n" if call.number == 0 else JSON))

    async with scene(script) as it:
        client = await it.client()
        for _ in range(4):
            await client.say(ASK)
            assert (await client.answer())[1] == b"{}"
            await until(lambda: not it.relay._open)
        assert it.failures == []
        assert it.relay._idle == {}


async def test_many_at_once_have_connections_of_their_own() -> None:
    """Clients do not wait for one another."""
    together = asyncio.Barrier(5)

    async def script(call: Call) -> None:
        while True:
            await call.asked()
            await together.wait()
            await call.say(whole(b"%d" % call.number))

    async with scene(script) as it:
        clients = [await it.client() for _ in range(5)]
        for client in clients:
            await client.say(ASK)
        assert {(await client.answer())[1] for client in clients} == {b"0", b"1", b"2", b"3", b"4"}
        assert repr(it.relay) == "<Relay 5 connections, 5 of them idle>"


async def test_closing_the_relay_ends_what_runs() -> None:
    """After it no connection is open, exchanges have failed, and there are no new ones."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM + event("1"))
        await call.gone()

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        await client.head()
        await it.relay.aclose()
        assert await client.reader.readuntil(END) == event("1") + event("broken") + END
        await client.say(ASK)
        assert (await client.answer())[1] == b"RESET"


# Who leaves.


@pytest.mark.parametrize("sent", [b"", STREAM, STREAM + event("1")], ids=["before the head", "held", "flowing"])
async def test_a_client_that_leaves_ends_the_connection_to_the_child(sent: bytes) -> None:
    """The child sees it at once, at any moment of the exchange: it has nothing else to stop by."""
    told, left = asyncio.Event(), asyncio.Event()

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(sent)
        told.set()
        await call.gone()
        left.set()

    async with scene(script) as it:
        client = await it.client()
        await client.say(ASK)
        await told.wait()
        client.reset()
        await left.wait()
        await it.cancelled.wait()
        await until(lambda: not it.relay._open)


async def test_an_exchange_may_outlive_its_client() -> None:
    """Then it goes on to its end, and what the client would have got is dropped."""
    left = asyncio.Event()
    done = asyncio.Event()

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM + event("1"))
        await left.wait()
        for _ in range(200):
            await call.say(event("x" * 5000))
        await call.say(END)
        await call.gone()

    async with scene(script) as it:

        async def outlive(request: web.BaseRequest) -> web.StreamResponse:
            answer = Answer(request)
            answer.outlives_client = True
            exchange = asyncio.ensure_future(
                it.relay.exchange(it, b"GET / HTTP/1.1\r\nHost: child\r\n\r\n", (), answer)
            )
            exchange.add_done_callback(lambda _: done.set())
            it.answers.append(answer)
            await asyncio.shield(exchange)
            return answer

        it.handle = outlive  # type: ignore[method-assign]
        client = await it.client()
        await client.say(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        await client.head()
        client.reset()
        await until(lambda: not it.front.connections)
        left.set()
        await done.wait()
        assert it.answers[0].tail.endswith(b"x\n\n")
        assert it.answers[0].bytes_sent < 100_000
        assert repr(it.relay) == "<Relay 1 connections, 1 of them idle>"


async def test_a_client_that_does_not_read_stops_the_child() -> None:
    """What is not read stays with the child: nothing is piled up here, and nothing is lost once it is read."""
    total, size = 32 * 1024 * 1024, 16 * 1024
    sent = 0

    async def script(call: Call) -> None:
        nonlocal sent
        await call.asked()
        await call.say(STREAM)
        for number in range(total // size):
            await call.say(event(f"{number:08}".ljust(size, ".")))
            sent += size
        await call.say(END)

    async with scene(script) as it:
        client = await it.client(receive_buffer=65536)
        await client.say(ASK)
        await client.head()
        seen = -1
        while seen != sent:  # until the child has not been able to send for a while
            seen = sent
            await asyncio.sleep(0.2)
        assert sent < total / 2
        numbers = []
        while size_line := int((await client.reader.readline()).strip(), 16):
            payload = await client.reader.readexactly(size_line)
            await client.reader.readexactly(2)
            numbers.append(int(payload[6:14]))
        assert numbers == list(range(total // size))


async def test_a_client_that_does_not_read_and_leaves() -> None:
    """A client may leave while its answer waits for it."""
    gone = asyncio.Event()

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(STREAM)
        try:
            while True:
                await call.say(event("x" * 20000))
        finally:
            gone.set()

    async with scene(script) as it:
        client = await it.client(receive_buffer=65536)
        await client.say(ASK)
        await until(lambda: bool(it.answers) and it.answers[0].is_congested)
        client.reset()
        await gone.wait()
        await it.cancelled.wait()


# Uploads.


UPLOAD = (b"a" * 5_000_000, b"", b"b" * 100, b"c" * 3_000_000)
UPLOAD_HEAD = b"POST / HTTP/1.1\r\nHost: child\r\nContent-Length: 8000100\r\n\r\n"


async def upload(it: Scene) -> tuple[bytes, bytes]:
    """What a client gets to whose request a long body is sent."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        answer = Answer(request)
        it.answers.append(answer)
        try:
            await it.relay.exchange(it, UPLOAD_HEAD, UPLOAD, answer)
        except UpstreamError as exc:
            return web.Response(status=502, text=exc.kind.name)
        return answer

    it.handle = handle  # type: ignore[method-assign]
    client = await it.client()
    await client.say(ASK)
    return await client.answer()


async def test_a_long_body_is_sent_as_the_child_takes_it() -> None:
    """Megabytes reach a child that reads slowly, in order, and its connection can be used again."""

    async def script(call: Call) -> None:
        await call.reader.readuntil(b"\r\n\r\n")
        got = bytearray()
        while len(got) < 8_000_100:
            got += await call.reader.read(50_000)
            await asyncio.sleep(0)
        await call.say(whole(b"yes" if bytes(got) == b"".join(UPLOAD) else b"no"))
        await call.gone()

    async with scene(script) as it:
        assert (await upload(it))[1] == b"yes"
        assert repr(it.relay) == "<Relay 1 connections, 1 of them idle>"


async def test_an_answer_may_come_before_the_request_was_sent() -> None:
    """A child that refuses a body unread is heard, and its connection is not used again."""

    async def script(call: Call) -> None:
        await call.reader.readuntil(b"\r\n\r\n")
        await call.say(whole(b"too much", b"HTTP/1.1 413 Payload Too Large\r\n"))
        await until(lambda: bool(it.answers) and it.answers[0].has_head)

    async with scene(script) as it:
        head, body = await upload(it)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert body == b"too much"
        await until(lambda: not it.relay._open)


async def test_an_answer_is_heard_although_the_child_hangs_up_on_the_body() -> None:
    """A child that refuses a body and closes at once sends a reset behind its answer: the answer counts."""

    async def script(call: Call) -> None:
        await call.reader.readuntil(b"\r\n\r\n")
        await call.say(whole(b"too much", b"HTTP/1.1 413 Payload Too Large\r\nConnection: close\r\n"))

    async with scene(script) as it:
        for _ in range(20):
            assert (await upload(it))[1] == b"too much"


async def test_a_child_that_dies_within_an_upload() -> None:
    """A reset while the body is sent is a failure like any other."""

    async def script(call: Call) -> None:
        await call.reader.readuntil(b"\r\n\r\n")
        call.reset()

    async with scene(script) as it:
        assert (await upload(it))[1] == b"RESET"


# What the client is sent while it waits.


async def test_a_client_may_be_kept_awake_before_any_child_answers() -> None:
    """A head and comments of ours come first, then the child's events without its head."""

    def begin(answer: Answer) -> None:
        answer.begin_stream()
        answer.comment("waiting")

    async with scene(always(STREAM + event("1") + END)) as it:
        it.prepare = begin
        client = await it.client()
        for _ in range(2):
            await client.say(ASK)
            head, body = await client.answer()
            assert b"Content-Type: text/event-stream\r\n" in head
            assert body == chunk(b": waiting\n\n") + event("1") + END


async def test_an_error_of_the_child_behind_a_promised_stream_is_handed_over() -> None:
    """The client waits for events, so a JSON document must not be put there; who relays gets it to make one of it."""
    sent = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with scene(always(sent + chunk(b'{"error"') + chunk(b":{}}") + END)) as it:
        it.prepare = Answer.begin_stream
        client = await it.client()
        await client.say(ASK)
        assert (await client.answer())[1] == event("broken") + END
        (failure,) = it.failures
        assert isinstance(failure, NotAStreamError)
        assert (failure.kind, failure.status, failure.content) == (UpstreamFailure.GARBAGE, 400, b'{"error":{}}')


async def test_an_endless_error_behind_a_promised_stream_is_bounded() -> None:
    """Of what is not the stream that was promised, no more is kept than of any other answer."""

    async def script(call: Call) -> None:
        await call.asked()
        await call.say(JSON + b"\r\n")
        while True:
            await call.say(b"x" * 100_000)

    async with scene(script) as it:
        it.prepare = Answer.begin_stream
        client = await it.client()
        await client.say(ASK)
        assert (await client.answer())[1] == event("broken") + END
        (failure,) = it.failures
        assert isinstance(failure, NotAStreamError)
        assert HELD_BYTES < len(failure.content) < 2 * HELD_BYTES
