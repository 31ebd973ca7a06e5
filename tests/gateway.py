"""A fleet in this process that decides over every load of a true llama-server, as a gateway would have it."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from fakes.bare_router import free_port
from llamavisor import procfs
from llamavisor.events import Bus, Event
from llamavisor.fleet import Fleet
from llamavisor.opening import open_fleet
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.process import INSTANCE_VARIABLE, Spawner
from llamavisor.router import Router
from llamavisor.settings import FleetSettings, MemoryBudget, RouterSettings

READY_S = 30.0


class Gateway:
    """The fleet, what it has told, and the processes below it.

    Args:
        folder: for its files.
        models_dir: the models.
        llama_server: the true one.
        memory: bytes of RAM that models may take.
        api_key: what clients must send, None for nothing.
        models_max: how many models may be loaded, 0 = no cap.
    """

    def __init__(
        self,
        folder: Path,
        models_dir: Path,
        llama_server: Path,
        *,
        memory: int,
        api_key: str | None = None,
        models_max: int = 0,
    ) -> None:
        self.bus = Bus()
        self.events: list[Event] = []
        self.bus.listen(lambda published: self.events.append(published.event))
        self._instance = uuid.uuid4().hex
        self.fleet: Fleet = open_fleet(
            spawner=Spawner(self._instance),
            state_dir=folder / "state",
            log_dir=folder / "logs",
            environ={**os.environ, "HF_HUB_OFFLINE": "1"},
            bus=self.bus,
        )
        router = RouterSettings(
            name="main",
            port=free_port(),
            models_dir=models_dir,
            models_max=models_max,
            llama_server=str(llama_server),
            layers=(OptionLayer("[defaults]", ModelOptions(threads=1, ctx_size=8192)),),
            api_key=api_key,
            memory=MemoryBudget(memory),
            autoload=False,
        )
        self._settings = FleetSettings(routers=(router,), serve="gateway")

    def __repr__(self) -> str:
        return f"<Gateway {self.fleet!r}>"

    @property
    def router(self) -> Router:
        """The only one."""
        return self.fleet["main"]

    @property
    def children(self) -> list[int]:
        """The processes of models, whatever becomes of them."""
        process = self.router.process
        return procfs.children(process.pid) if process is not None else []

    @property
    def processes(self) -> list[int]:
        """Everything that it has started and lives."""
        marker = f"{INSTANCE_VARIABLE}={self._instance}"
        return [pid for pid in procfs.all_pids() if procfs.has_environment(pid, marker)]

    @property
    def log(self) -> str:
        """What llama-server has printed."""
        return "\n".join(self.router.output.tail(200))

    @asynccontextmanager
    async def running(self, *models: str) -> AsyncIterator[None]:
        """Have it run, with its router up and these models known to it; at the end nothing of it may be left."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.fleet.run, self._settings)
                with anyio.fail_after(READY_S):
                    while not list(self.fleet):
                        await anyio.sleep(0)
                    await self.router.wait_until(lambda: self.router.is_serving and self._has(models))
                yield
                group.cancel_scope.cancel()
        finally:
            left = self.processes
        assert not left, f"left behind: {left}"

    def _has(self, models: tuple[str, ...]) -> bool:
        return all(self.router.table.get(name) is not None for name in models)
