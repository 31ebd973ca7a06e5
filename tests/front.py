"""A gateway in this process before a true llama-server, without a daemon around it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from fakes.waiting import PATIENCE_S
from gateway import Gateway as StagedFleet
from llamavisord.config import GatewaySettings
from llamavisord.drain import Drain
from llamavisord.gateway.gateway import Gateway
from llamavisord.gateway.intake import Stock
from llamavisord.gateway.server import make_server
from llamavisord.traffic import Traffic


class Front:
    """A gateway in this process before a true llama-server.

    Args:
        staged: the fleet behind it.
        settings: what the gateway is told to be.
    """

    def __init__(self, staged: StagedFleet, settings: GatewaySettings | None = None) -> None:
        self.fleet = staged.fleet
        self.staged = staged
        self.settings = settings or GatewaySettings()
        self.stock = Stock(64 * 2**20)
        self.traffic = Traffic(Drain(staged.bus), held_bytes=lambda: self.stock.held_bytes, connections=lambda: 0)
        self.port = 0
        self.gateway: Gateway | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Front]:
        """Answer on a port of the kernel's choice."""
        async with anyio.create_task_group() as tasks:
            self.gateway = Gateway(
                self.fleet,
                self.staged.bus,
                self.settings,
                traffic=self.traffic,
                stock=self.stock,
                tasks=tasks,
            )
            server = make_server(self.gateway.handle)
            listener = socket.create_server(("127.0.0.1", 0))
            listener.setblocking(False)
            self.port = listener.getsockname()[1]

            async def accept() -> None:
                loop = asyncio.get_running_loop()
                while True:
                    await anyio.wait_readable(listener)
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    await loop.connect_accepted_socket(server, connection)

            tasks.start_soon(accept)
            try:
                yield self
            finally:
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                    await server.shutdown(1.0)
                    await self.gateway.aclose()
                listener.close()

    def left_behind(self) -> list[str]:
        """What of requests is still there, one line each."""
        assert self.gateway is not None
        slots = self.fleet.memory.scheduler.admission.slots()
        found = [f"lease on {slot.key}" for slot in slots if slot.leases]
        found += [f"waits for {order.model}" for order in self.fleet.memory.scheduler.admission.orders]
        found += [f"{self.stock.held_bytes} bytes held"] * bool(self.stock.held_bytes)
        found += [f"{self.traffic.drain.inside} inside"] * bool(self.traffic.drain.inside)
        found += [f"in flight {self.traffic.in_flight}"] * bool(self.traffic.in_flight)
        found += [f"visit {visit!r}" for visit in self.gateway._visits]
        return found

    async def until_nothing_is_left(self) -> None:
        """Wait for that, and fail with what is left."""
        with anyio.move_on_after(PATIENCE_S):
            while self.left_behind():
                await anyio.sleep(0.005)
        assert self.left_behind() == []
