"""Takes the connections of a web server: never more than there is room for, and on when descriptors run out.

Whoever may connect may connect often and say nothing. Unbounded, that would leave the daemon without a descriptor for
its own work; and asyncio's own way to accept answers EMFILE with a hundred tracebacks a second, until the disk is full.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any

import anyio
from aiohttp import web
from aiohttp.typedefs import Handler

from llamavisor.events import Bus, Warned

CONNECTIONS_MAX = 64
SHARE = 4
"""Of few descriptors that are allowed, connections get one in so many at most."""
RESERVE = 4
"""More than one, because what is let go for a connection may be taken by the daemon's own work."""
PAUSE_S = 0.1
"""Between two tries when there is no descriptor for a connection."""
WARN_EVERY_S = 3600.0

Accept = Callable[[socket.socket], Coroutine[Any, Any, None]]
"""Takes the connections of a listener until it is cancelled."""


class Acceptor:
    """Takes the connections of one web server.

    One more than there is room for ends the oldest that is not being answered. So whoever comes is served, however many
    others say nothing. If all are being answered, the oldest of all is ended, or the one that has come is turned away.

    Args:
        subject: what they connect to, for a person.
        bus: hears once an hour at most that there is no descriptor left.
        connections_max: how many there may be.
        turned_away: what is sent to one more than that if all are being answered; None to end the oldest for it.
    """

    def __init__(
        self, subject: str, bus: Bus, *, connections_max: int = CONNECTIONS_MAX, turned_away: bytes | None = None
    ) -> None:
        self.connections_max = connections_max
        self._subject = subject
        self._bus = bus
        self._turned_away = turned_away
        self._warned_at = -math.inf
        self._answering: set[asyncio.BaseProtocol] = set()
        self._reserve: list[int] = []  # descriptors that are kept for when there is no other

    def __repr__(self) -> str:
        return f"<Acceptor {self._subject} answering {len(self._answering)}>"

    async def serve(self, listener: socket.socket, server: web.Server) -> None:
        """Take connections until cancelled.

        Args:
            listener: a listening socket that does not block; it stays open.
            server: speaks HTTP with them; whoever answers a request says so by `answering`, or the middleware `note`.
        """
        loop = asyncio.get_running_loop()
        self._keep_reserve()
        try:
            while True:
                # A spent reserve is filled when nobody waits: right before an accept it would take what that needs.
                with anyio.move_on_after(PAUSE_S if len(self._reserve) < RESERVE else math.inf) as wait:
                    await anyio.wait_readable(listener)
                if wait.cancelled_caught:
                    self._keep_reserve()
                    continue
                try:
                    connection, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):  # whoever it was has left again
                    continue
                except OSError as error:
                    await self._make_room(server, error)
                    continue
                connection.setblocking(False)
                if len(_open(server)) >= self._most() and not self._end_one(server, for_one=True):
                    self._turn_away(connection)
                    continue
                await loop.connect_accepted_socket(server, connection)
        finally:
            while self._spend_reserve():
                pass

    @web.middleware
    async def note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Remember on which connections somebody is being answered."""
        with self.answering(request):
            return await handler(request)

    def answering(self, request: web.BaseRequest) -> _Answering:
        """Remember for the length of a block that the one who asks is being answered."""
        return _Answering(self._answering, request.protocol)

    def spare(self) -> bool:
        """Let go of a descriptor for what somebody who came in needs; False if there is none."""
        return self._spend_reserve()

    async def _make_room(self, server: web.Server, error: OSError) -> None:
        """See that what could not be accepted can be the next time: by the reserve at once, else by ending another."""
        if anyio.current_time() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = anyio.current_time()
            text = f"cannot take a connection: {error.strerror}; raise the limit of open files (LimitNOFILE)"
            self._bus.publish(Warned(subject=self._subject, text=text))
        if not self._spend_reserve():
            self._end_one(server)
            await anyio.sleep(PAUSE_S)

    def _end_one(self, server: web.Server, *, for_one: bool = False) -> bool:
        """Make room by ending one, `for_one` who has come; False if nobody is to be ended for that."""
        connections = _open(server)
        silent = [connection for connection in connections if connection not in self._answering]
        if for_one and not silent and self._turned_away is not None:
            return False
        for connection in (silent or connections)[:1]:
            connection.force_close()
        return True

    def _turn_away(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.send(self._turned_away or b"")

    def _most(self) -> int:
        """How many connections there is room for, by the limit as it is at this moment."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = self.connections_max
        return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft // SHARE))

    def _keep_reserve(self) -> None:
        with suppress(OSError):
            while len(self._reserve) < RESERVE:
                self._reserve.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _spend_reserve(self) -> bool:
        """Let go of a descriptor; False if there is none."""
        if self._reserve:
            os.close(self._reserve.pop())
            return True
        return False


class _Answering:
    """A context manager; one made of a generator would take twice as long, and there is one for every request."""

    __slots__ = ("_all", "_connection")

    def __init__(self, everybody: set[asyncio.BaseProtocol], connection: asyncio.BaseProtocol) -> None:
        self._all = everybody
        self._connection = connection

    def __repr__(self) -> str:
        return f"<_Answering {self._connection!r}>"

    def __enter__(self) -> None:
        self._all.add(self._connection)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It has its answer."""
        self._all.discard(self._connection)


def _open(server: web.Server) -> list[web.RequestHandler]:
    """The connections that hold a descriptor, the oldest first."""
    return [connection for connection in server.connections if connection.transport is not None]
