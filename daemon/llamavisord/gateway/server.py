"""The gateway's door: it listens where clients know it, takes connections, and speaks HTTP/1.1 with them."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from aiohttp import web

from llamavisor.events import Bus, GatewayListening, Warned
from llamavisor.ports import holder_of
from llamavisor.threads import run_in_thread
from llamavisord.acceptor import Acceptor
from llamavisord.addresses import LOOPBACK, listened_on
from llamavisord.gateway.replies import SERVER, Trouble
from llamavisord.gateway.routes import Api
from llamavisord.traffic import Traffic

RETRY_S = 1.0
"""Between two tries to listen on a port that somebody else holds."""
HEAD_S = 60.0
"""How long a connection may take to send the head of a request, or to say nothing between two."""
HEAD_LINE_BYTES = 8190
HEADERS_MAX = 90
"""llama-server takes 100 headers of 8 KiB; a few are added on the way."""
BACKLOG = 1024
_NO_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, socket.EAI_ADDRFAMILY, socket.EAI_NONAME})


class _Connection(web.RequestHandler):
    """One connection. What is no HTTP is answered as everything else is: in JSON, and closed."""

    __slots__ = ("_is_held",)

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._is_held = False

    def pause_reading(self) -> None:
        """A body comes faster than it is taken in."""
        self._is_held = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """It is taken in. aiohttp says so with every read, and looks for more to parse: nothing, unless it was held."""
        if self._is_held:
            self._is_held = not resume_parser
            super().resume_reading(resume_parser)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 (aiohttp's)
    ) -> web.StreamResponse:
        """The answer to what could not be understood, or not be handled."""
        if request.writer.output_size:
            raise ConnectionResetError("its answer had begun")
        text = "not a request of HTTP/1.1" if status == 400 else "a bug in llamavisor; see its log"
        if status == 400 and exc is not None:
            text = f"{text}: {getattr(exc, 'message', exc)}".splitlines()[0][:200].rstrip(": ")
        reply = Trouble(status, text).reply(Api.NATIVE)
        response = web.Response(
            status=status, body=reply.body, headers={"Server": SERVER, "Content-Type": reply.content_type}
        )
        response.force_close()
        return response


class Server(web.Server):
    """Speaks HTTP/1.1 with all clients of the gateway."""

    def __call__(self) -> web.RequestHandler:
        """What speaks with one of them."""
        return _Connection(self, loop=self._loop, **self._kwargs)


def make_server(handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> Server:
    """A server that hands every request to `handle`, and cancels it when the client leaves."""
    return Server(
        handle,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=HEAD_S,
        max_line_size=HEAD_LINE_BYTES,
        max_field_size=HEAD_LINE_BYTES,
        max_headers=HEADERS_MAX,
    )


class Door:
    """Listens where the configuration says; a port that somebody holds is tried again until it is free.

    Args:
        server: speaks with whoever comes in.
        acceptor: takes the connections.
        traffic: is told where clients come in, or why they cannot.
        bus: likewise.
    """

    def __init__(self, server: Server, acceptor: Acceptor, traffic: Traffic, bus: Bus) -> None:
        self._server = server
        self._acceptor = acceptor
        self._traffic = traffic
        self._bus = bus

    def __repr__(self) -> str:
        return f"<Door {self._traffic.urls}>"

    async def serve(self, host: str, port: int, handed: Sequence[socket.socket] = ()) -> None:
        """Take connections there, or of sockets that listen already, until cancelled; those that are open stay."""
        async with self._listening(host, port, handed) as listeners, anyio.create_task_group() as accepting:
            for listener in listeners:
                accepting.start_soon(self._acceptor.serve, listener, self._server)

    @asynccontextmanager
    async def _listening(
        self, host: str, port: int, handed: Sequence[socket.socket]
    ) -> AsyncIterator[Sequence[socket.socket]]:
        traffic, listeners = self._traffic, handed
        while not listeners:
            try:
                listeners = await run_in_thread(listen, host, port)
                break
            except (OSError, UnicodeError) as error:
                text = await run_in_thread(_explain, host, port, error)
                if traffic.problem != text:
                    traffic.problem = text
                    traffic.has_tried.set()
                    self._bus.publish(Warned(subject="gateway", text=text))
            await anyio.sleep(RETRY_S)
        try:
            traffic.problem = None
            traffic.urls = tuple(_url(*listener.getsockname()[:2]) for listener in listeners)
            traffic.has_tried.set()
            self._bus.publish(GatewayListening(urls=traffic.urls))
            yield listeners
        finally:
            traffic.urls = ()
            for listener in listeners:
                listener.close()


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on a host and port: of a loopback address on both, 127.0.0.1 and ::1.

    Raises:
        OSError: the port is taken, or the address is none of this machine's.
        UnicodeError: a name that IDNA cannot write.
    """
    addresses = listened_on(host)
    listeners: list[socket.socket] = []
    try:
        for each in addresses:
            try:
                found = socket.getaddrinfo(each, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
                for family, _, _, _, address in dict.fromkeys(found):
                    listeners.append(_listen(family, address))
            except OSError as error:
                # A machine may have no IPv6; then one loopback address is enough.
                if not (addresses == LOOPBACK and listeners and error.errno in _NO_ADDRESS):
                    raise
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _url(host: str, port: int) -> str:
    """Where it listens, as it is: a wildcard is no loopback address to a person who asks who reaches it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # 0.0.0.0 has a socket of its own
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _explain(host: str, port: int, error: OSError | UnicodeError) -> str:
    """Why nobody can listen there, and what to do."""
    text = f"cannot listen on {host}:{port}"
    if not isinstance(error, OSError):
        return f"{text}: not a name of a host; correct `host`"
    if error.errno == errno.EADDRINUSE:
        holder = holder_of(port)
        by = f" by {holder}" if holder else ""
        return f"{text}: the port is taken{by}; choose another with `port`, or end what holds it. It is tried again"
    return f"{text}: {error.strerror}; correct `host` or `port`. A port below 1024 needs the right to bind it"
