"""Requests to children and their answers, byte by byte, over connections that are kept.

This is the one place where asyncio protocols are spoken instead of anyio's streams: a chunk of an answer goes from the
child's socket to the client's in one callback, and no task is switched for it.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Protocol, cast

from llamavisord.gateway.answer import Answer, OtherAnswerError
from llamavisord.gateway.framing import GarbageError, Response

IDLE_S = 3.5
"""How long an unused connection is kept: children (cpp-httplib) close one after 5 s."""

USES = 95
"""How often a connection is used: children close one after 100 requests."""

CONNECT_S = 5.0
"""How long a child may take to accept a connection. Its kernel does it, so one that does not is stopped or overrun."""

IDLE_CONNECTIONS = 32
"""How many unused connections to one child are kept."""

CLOSE_S = 5.0
"""How long `Relay.aclose` waits for its sockets to be closed."""

_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE})

_PIECE_BYTES = 256 * 1024
"""A request's body is written in such pieces, each when the child has taken most of those before it."""


class UpstreamFailure(Enum):
    """What went wrong between us and a child."""

    REFUSED = auto()
    """Nobody listens there."""
    RESET = auto()
    """The connection ended before the answer did."""
    TIMEOUT = auto()
    """The connection was not accepted in time."""
    GARBAGE = auto()
    """What came was not HTTP, or not what had to come."""


class UpstreamError(Exception):
    """Raised when a child did not answer, or not in full.

    Attributes:
        kind: what went wrong.
        was_reused: it went wrong on a connection that had been used before, and not a byte of an answer came. That is
            no crash: the child had just closed it. Ask again with `fresh=True`.
        has_data: the client was sent data of the answer, so it cannot be asked for again.
    """

    def __init__(self, kind: UpstreamFailure, why: str, *, was_reused: bool = False, has_data: bool = False) -> None:
        super().__init__(f"{kind.name.lower()}: {why}")
        self.kind = kind
        self.was_reused = was_reused
        self.has_data = has_data


class NotAStreamError(UpstreamError):
    """Raised when the client was promised a stream, and the child answered something else, most likely an error.

    Attributes:
        status: the status of what it answered.
        content: its body, `answer.HELD_BYTES` at most.
    """

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(UpstreamFailure.GARBAGE, f"status {status} instead of a stream")
        self.status = status
        self.content = content


class Address(Protocol):
    """Where a child listens; an `Endpoint` is one."""

    @property
    def host(self) -> str:
        """Its address."""

    @property
    def port(self) -> int:
        """Its port."""


class Relay:
    """Connections to children, and the exchanges over them.

    Args:
        idle_s: how long an unused connection is kept, in seconds.
        uses: how often a connection is used.
        connect_s: how long a child may take to accept one, in seconds.
        spare: lets go of a descriptor when there is none for a connection; False if it has none either.
    """

    def __init__(
        self,
        *,
        idle_s: float = IDLE_S,
        uses: int = USES,
        connect_s: float = CONNECT_S,
        spare: Callable[[], bool] = lambda: False,
    ) -> None:
        self._idle_s = idle_s
        self._uses = uses
        self._connect_s = connect_s
        self._spare = spare
        self._idle: dict[tuple[str, int], list[_Connection]] = {}
        self._open: set[_Connection] = set()
        self._is_closed = False
        self._none_open = asyncio.Event()
        # Asked for once: Python asks the kernel for our pid each time.
        self.loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        idle = sum(map(len, self._idle.values()))
        return f"<Relay {len(self._open)} connections, {idle} of them idle>"

    async def exchange(
        self, endpoint: Address, request_head: bytes, body: Sequence[bytes], answer: Answer, *, fresh: bool = False
    ) -> None:
        """Send a request, and move the answer to the client until it is whole.

        If it is cancelled, the connection is closed at once, which makes the child stop what it does. Silence is no
        failure: a long prompt takes minutes before the first byte.

        Args:
            endpoint: where to.
            request_head: the head of the request, with its blank line; it says the length of the body.
            body: the parts of its body.
            answer: where the answer goes. It may have been fed by an exchange that failed before it had data.
            fresh: on a new connection; the unused ones to this endpoint are closed.

        Raises:
            UpstreamError: the child did not answer, or not in full.
            ConnectionError: the client has left.
        """
        connection = None if fresh else self._take_idle(endpoint)
        if connection is None:
            if fresh:
                self._drop_idle(endpoint)
            connection = await self._connect(endpoint)
        try:
            await connection.exchange(request_head, body, answer)
        except BaseException:
            connection.abort()
            raise
        self._keep(endpoint, connection)

    async def aclose(self) -> None:
        """Close all connections, and wait until they are."""
        self._is_closed = True
        self._idle.clear()
        for connection in tuple(self._open):
            connection.abort()
        if self._open:
            self._none_open.clear()
            async with asyncio.timeout(CLOSE_S):
                await self._none_open.wait()

    # Connections tell it of themselves.

    def opened(self, connection: _Connection) -> None:
        """A connection has been made."""
        self._open.add(connection)

    def closed(self, connection: _Connection) -> None:
        """A connection has ended."""
        self._open.discard(connection)
        idle = self._idle.get(connection.key)
        if idle is not None and connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.key]
        if not self._open:
            self._none_open.set()

    def _take_idle(self, endpoint: Address) -> _Connection | None:
        # The youngest first: the others may then grow old together and be closed.
        key = (endpoint.host, endpoint.port)
        idle = self._idle.get(key)
        if not idle:
            return None
        connection = idle.pop()
        if connection.idle_since + self._idle_s < self.loop.time():
            connection.abort()
            self._drop_idle(endpoint)  # they are older still
            return None
        return connection

    def _drop_idle(self, endpoint: Address) -> None:
        for connection in self._idle.pop((endpoint.host, endpoint.port), ()):
            connection.abort()

    def _keep(self, endpoint: Address, connection: _Connection) -> None:
        idle = self._idle.setdefault((endpoint.host, endpoint.port), [])
        if (
            self._is_closed
            or not connection.is_reusable
            or connection.uses >= self._uses
            or len(idle) >= IDLE_CONNECTIONS
        ):
            connection.abort()
        else:
            connection.idle_since = self.loop.time()
            idle.append(connection)

    async def _connect(self, endpoint: Address) -> _Connection:
        if self._is_closed:
            raise UpstreamError(UpstreamFailure.RESET, "the gateway is closing")
        key = (endpoint.host, endpoint.port)
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await self.loop.create_connection(lambda: _Connection(self, key), *key)
        except TimeoutError as exc:
            raise UpstreamError(UpstreamFailure.TIMEOUT, f"no connection within {self._connect_s:g} s") from exc
        except ConnectionRefusedError as exc:
            raise UpstreamError(UpstreamFailure.REFUSED, "nobody listens there") from exc
        except OSError as exc:
            if exc.errno in _SHORTAGES and self._spare():
                return await self._connect(endpoint)
            raise UpstreamError(UpstreamFailure.RESET, f"no connection: {exc}") from exc
        return connection


class _Connection(asyncio.Protocol):
    """One connection to a child, with one exchange at a time."""

    def __init__(self, relay: Relay, key: tuple[str, int]) -> None:
        self.key = key
        self.idle_since = 0.0
        self.uses = 0
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._response = Response()
        self._is_sent = True
        self._is_over = False  # the exchange: whole, or failed
        self._failure: Exception | None = None
        self._is_writing_paused = False
        self._is_reading_paused = False
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        doing = "idle" if self._answer is None else repr(self._response)
        return f"<_Connection to {self.key[0]}:{self.key[1]}, used {self.uses} times, {doing}>"

    @property
    def is_reusable(self) -> bool:
        """Another request can be sent over it."""
        response = self._response
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._is_sent
            and response.is_whole
            and not response.has_excess
            and response.head is not None
            and response.head.keeps_alive
        )

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, request_head: bytes, body: Sequence[bytes], answer: Answer) -> None:
        """Send a request, and feed the answer until it is whole."""
        self.uses += 1
        self._response = Response(is_bodiless=request_head.startswith(b"HEAD "))
        self._is_over = False
        self._failure = None
        self._answer = answer
        try:
            if not self._send_at_once(request_head, body):
                await self._send(request_head, body)
            while not self._is_over:
                await self._turn()
        finally:
            self._answer = None
        if self._failure is not None:
            raise self._as_upstream_error(self._failure, answer) from self._failure

    def _send_at_once(self, request_head: bytes, body: Sequence[bytes]) -> bool:
        """Send a request that is not large, as nearly all are: one write, one packet. False if it is large."""
        transport = self._transport
        if transport is None or transport.is_closing():
            self._fail(ConnectionResetError("closed while it was idle"))
        elif sum(map(len, body)) <= _PIECE_BYTES:
            transport.write(b"".join((request_head, *body)))
        else:
            return False
        return True

    async def _send(self, request_head: bytes, body: Sequence[bytes]) -> None:
        transport = cast("asyncio.Transport", self._transport)
        self._is_sent = False
        transport.write(request_head)
        for part in body:
            for at in range(0, len(part), _PIECE_BYTES):
                while self._is_writing_paused and not self._is_over:
                    await self._turn()
                if self._is_over:  # it is answered already (413), or gone
                    return
                transport.write(part[at : at + _PIECE_BYTES])
        self._is_sent = True

    async def _turn(self) -> None:
        """Wait until something has changed that this task must act on."""
        if self._is_reading_paused and self._answer is not None:
            await self._answer.drain()
            self._is_reading_paused = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()
            return
        self._waiter = self._relay.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, answer: Answer) -> None:
        try:
            answer.finish()
        except OtherAnswerError as exc:
            self._fail(exc)
        self._is_over = True
        self._wake()

    def _fail(self, failure: Exception) -> None:
        if not self._is_over:
            self._is_over = True
            self._failure = failure
            self._wake()

    def _as_upstream_error(self, failure: Exception, answer: Answer) -> UpstreamError:
        if isinstance(failure, OtherAnswerError):
            return NotAStreamError(failure.status, failure.content)
        is_garbage = isinstance(failure, GarbageError)
        return UpstreamError(
            UpstreamFailure.GARBAGE if is_garbage else UpstreamFailure.RESET,
            str(failure),
            was_reused=self.uses > 1 and not self._response.has_begun,
            has_data=answer.has_data,
        )

    # What the event loop says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._relay.opened(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer: straight to the client."""
        answer = self._answer
        if answer is None or self._is_over:  # nobody has asked
            self._response.has_excess = True
            self.abort()
            return
        response = self._response
        try:
            if response.head is None:
                data = response.feed(data)
                if response.head is None:
                    return
                answer.start(response.head)
            else:
                data = response.feed(data)
            if data:
                answer.add(data)
        except (GarbageError, OtherAnswerError) as exc:
            self._fail(exc)
            return
        if response.is_whole:
            self._end(answer)
        elif answer.is_congested and self._transport is not None:
            self._transport.pause_reading()
            self._is_reading_paused = True
            self._wake()

    def eof_received(self) -> None:
        """The child has closed it. Returns None, so that it is closed from here as well."""
        if self._answer is None or self._is_over:
            return
        if self._response.feed_eof():
            self._end(self._answer)
        else:
            self._fail(ConnectionResetError("the connection ended before the answer"))

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._transport = None
        self._fail(exc or ConnectionResetError("the connection was closed"))
        self._relay.closed(self)

    def pause_writing(self) -> None:
        """The child takes the request more slowly than it is written."""
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        """It has taken most of it."""
        self._is_writing_paused = False
        self._wake()
