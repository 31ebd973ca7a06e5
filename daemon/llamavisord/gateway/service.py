"""The gateway as the daemon runs it: opened, reconfigured by a reload, drained and ended."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import anyio
import anyio.abc
from aiohttp import web

from llamavisor.events import Bus, ConfigReloaded, Published
from llamavisord.acceptor import Acceptor
from llamavisord.config import GatewaySettings
from llamavisord.daemon import Daemon
from llamavisord.drain import Drain
from llamavisord.gateway.gateway import Gateway
from llamavisord.gateway.intake import Stock
from llamavisord.gateway.replies import RETRY_S, Trouble
from llamavisord.gateway.routes import Api
from llamavisord.gateway.server import Door, Server, make_server
from llamavisord.traffic import Traffic

LAST_WORDS_S = 1.0
"""How long clients may take to read that their requests have been ended."""

_ENDING = Trouble(503, "the server ends", retry_after_s=RETRY_S, closes=True)
_FULL = Trouble(503, "too many connections (max_connections in [gateway])", retry_after_s=RETRY_S)


class Service:
    """One gateway, from its first connection to its last.

    Args:
        daemon: whose gateway it is; told of the traffic.
        settings: what it is told to be at first.
        doors: sockets that listen for it already; without any it listens as the settings say.
    """

    def __init__(self, daemon: Daemon, settings: GatewaySettings, doors: Sequence[socket.socket] = ()) -> None:
        self._daemon = daemon
        self._doors = doors
        self._settings = settings
        self._bus: Bus = daemon.bus
        self._stock = Stock(settings.max_held_bytes)
        self._drain = Drain(daemon.bus)
        self._acceptor = Acceptor(
            "gateway", daemon.bus, connections_max=settings.max_connections, turned_away=_whole(_FULL)
        )
        self._accepting = anyio.CancelScope()
        self._gateway: Gateway | None = None
        self._server: Server | None = None
        self._traffic = daemon.traffic = Traffic(
            self._drain, held_bytes=lambda: self._stock.held_bytes, connections=self._count_connections
        )
        self._traffic.keys = len(settings.keys.keys)
        daemon.bus.listen(self._hear, hears_frequent=False)

    def __repr__(self) -> str:
        return f"<Service {self._traffic!r}>"

    async def run(self) -> None:
        """Answer clients until cancelled; then whoever is left is cut off."""
        async with anyio.create_task_group() as tasks:
            self._gateway = Gateway(
                self._daemon.fleet,
                self._bus,
                self._settings,
                traffic=self._traffic,
                stock=self._stock,
                tasks=tasks,
                spare=self._acceptor.spare,
            )
            self._server = make_server(self._handle)
            door = Door(self._server, self._acceptor, self._traffic, self._bus)
            try:
                with self._accepting:
                    # Who comes earlier waits: to be told that there is no such model would be wrong.
                    await self._daemon.fleet.wait_for_models()
                    await door.serve(self._settings.host, self._settings.port, self._doors)
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(2 * LAST_WORDS_S):
                    await self._server.shutdown(LAST_WORDS_S)
                    await self._gateway.aclose()

    async def end(self) -> None:
        """Take no more requests, and wait until those that are in it have ended, or end them at the deadline."""
        if self._gateway is None:
            return
        self._drain.begin("the daemon ends", deadline_s=self._settings.drain_s)
        self._accepting.cancel()
        with anyio.move_on_after(self._settings.drain_s):
            await self._drain.wait_empty()
        self._gateway.end_all(_ENDING)
        with anyio.move_on_after(LAST_WORDS_S):
            await self._drain.wait_empty()

    def hurry(self) -> None:
        """End what is in it now."""
        if self._gateway is not None:
            self._gateway.end_all(_ENDING)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert self._gateway is not None  # noqa: S101 (it runs)
        with self._acceptor.answering(request):
            return await self._gateway.handle(request)

    def _count_connections(self) -> int:
        return len(self._server.connections) if self._server is not None else 0

    def _hear(self, published: Published) -> None:
        settings = self._daemon.config.gateway
        if isinstance(published.event, ConfigReloaded) and settings is not None and self._gateway is not None:
            self._settings = settings
            self._traffic.keys = len(settings.keys.keys)
            self._acceptor.connections_max = settings.max_connections
            self._gateway.follow(settings)


def _whole(trouble: Trouble) -> bytes:
    """An answer to somebody who has not asked yet."""
    reply = trouble.reply(Api.NATIVE)
    lines = [f"HTTP/1.1 {reply.status} Service Unavailable", f"Content-Type: {reply.content_type}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    lines += [f"Content-Length: {len(reply.body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + reply.body
