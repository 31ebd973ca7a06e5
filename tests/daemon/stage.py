"""A daemon's fleet on a stage: fake routers over fake folders, on virtual time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio

from fakes.gauge import fake_meter
from fakes.host import FakeHost
from fakes.machine import FakeMachine
from fakes.supervised import PATIENCE_S
from fakes.watch import FakeWatch
from llamavisor import footprint
from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.downloads import Downloads
from llamavisor.events import Bus
from llamavisor.fleet import Fleet
from llamavisor.hub import Hub
from llamavisor.launch import ModelSource
from llamavisor.settings import FleetSettings, MemoryBudget, RouterSettings
from llamavisord.config import Config
from llamavisord.daemon import Daemon
from llamavisord.inventory import Inventory, to_json


def entry(name: str, state: EntryState = EntryState.READY, *, content: int = 1, **more: Any) -> Entry:
    """A model of one file."""
    file = ModelFile(f"/models/{name}.gguf", FileId(1, hash(name), 1000, content))
    return Entry(name=name, state=state, files=(file,), **more)


class Stage:
    """A daemon's fleet of fake routers over fake folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = FakeMachine()
        self.watches: dict[Path, FakeWatch] = {}
        self.hosts: dict[str, FakeHost] = {}
        self.withholds: dict[str, dict[str, str]] = {}
        self.sights: dict[str, tuple[footprint.Device, ...] | None] = {}
        self.bus = Bus()
        self.fleet = Fleet(
            make_host=self._make_host,
            make_watch=self._make_watch,
            meter=fake_meter(self.bus, folder),
            downloads=Downloads(Hub({}), self.bus),
            bus=self.bus,
            jitter=lambda: 0.0,
        )

    def __repr__(self) -> str:
        return f"<Stage {self.fleet!r}>"

    def _make_watch(self, path: Path, _: Sequence[Path] = ()) -> FakeWatch:
        return self.watches.setdefault(path, FakeWatch(path))

    def _make_host(self, settings: RouterSettings, source: ModelSource) -> FakeHost:
        host = FakeHost(settings, folder=self.folder, machine=self.machine)
        host.source = source
        host.withholds = self.withholds.get(settings.name, {})
        host.devices = self.sights.get(settings.name, ())
        self.hosts[settings.name] = host
        return host

    def put(self, *entries: Entry, folder: str = "a") -> FakeWatch:
        """Put models into a folder, before the fleet runs or while it does."""
        watch = self._make_watch(self.folder / folder)
        if watch._tell is None:
            watch.entries |= {each.name: each for each in entries}
        else:
            watch.put(*entries)
        return watch

    def config(self, *routers: tuple[str, str], memory: MemoryBudget | None = None, **more: Any) -> Config:
        """A configuration of routers as (name, folder)."""
        budget = memory or MemoryBudget()
        settings = tuple(
            RouterSettings(name=name, port=9000 + number, models_dir=self.folder / folder, models_max=0, memory=budget)
            for number, (name, folder) in enumerate(routers)
        )
        return cast("Config", _Config(FleetSettings(routers=settings, **more)))

    @asynccontextmanager
    async def running(self, config: Config) -> AsyncIterator[Daemon]:
        """Have the fleet run, with every router up."""
        daemon = Daemon(config, load_config=lambda: config, fleet=self.fleet, bus=self.bus)
        async with anyio.create_task_group() as group:
            group.start_soon(self.fleet.run, config.fleet_settings())
            await self.until(lambda: list(self.fleet) and all(router.is_serving for router in self.fleet))
            yield daemon
            group.cancel_scope.cancel()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until it holds."""
        with anyio.fail_after(PATIENCE_S):
            while not condition():
                await anyio.sleep(0.01)

    async def items(self, **how: Any) -> list[dict[str, Any]]:
        """All models as the API lists them."""
        inventory = Inventory(self.fleet, **how)
        return list(json.loads(await to_json(inventory, inventory.known())))


class _Config:
    """As much of a configuration as a daemon looks at here."""

    warnings = ()

    def __init__(self, settings: FleetSettings) -> None:
        self._settings = settings
        self.on_overwrite = settings.on_overwrite
        self.rules = settings.rules
        self.routers = settings.routers

    def __getattr__(self, name: str) -> object:
        return None

    def fleet_settings(self) -> FleetSettings:
        """What the fleet is told."""
        return self._settings


class Asked:
    """As much of a request as the handlers look at here."""

    def __init__(self, name: str = "", /, **query: str) -> None:
        self.query = query
        self.match_info = {"name": name}
