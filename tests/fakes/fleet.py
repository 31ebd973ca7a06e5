"""A whole fleet on fakes and virtual time, with a gateway's rights: admission decides every load."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc

from fakes.gauge import FakeGauge, fake_meter
from fakes.host import FakeHost
from fakes.machine import FakeMachine, FakeModel
from fakes.supervised import PATIENCE_S, Story
from fakes.watch import FakeWatch
from llamavisor import footprint
from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.downloads import Downloads
from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus
from llamavisor.fleet import Fleet
from llamavisor.hub import Hub
from llamavisor.launch import ModelSource
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.router import Router
from llamavisor.settings import FleetSettings, MemoryBudget, RouterSettings
from llamavisor.states import ModelState

GIB = 2**30


class Client:
    """Somebody who wants a model, and what came of it."""

    def __init__(self, stage: GatewayStage, model: str, router: str | None) -> None:
        self.model = model
        self.endpoint: str | None = None  # the router that has it
        self.port: int | None = None
        self.error: LlamavisorError | None = None
        self.asked_at = anyio.current_time()
        self.had_at: float | None = None
        self.is_over = False
        self._stage = stage
        self._router = router
        self._leaves = anyio.Event()
        self._scope = anyio.CancelScope()

    def __repr__(self) -> str:
        return f"<Client of {self.model}: {self.endpoint or self.error or 'waits'}>"

    async def run(self) -> None:
        """Ask, keep what was given until `leave`, or go away with `give_up`."""
        with self._scope:
            try:
                async with self._stage.fleet.lease(self.model, router=self._router) as endpoint:
                    self.endpoint, self.port = endpoint.router, endpoint.port
                    self.had_at = anyio.current_time()
                    await self._leaves.wait()
            except LlamavisorError as error:
                self.error = error
        self.is_over = True

    @property
    def has_it(self) -> bool:
        """Whether it has the model, and has not left."""
        return self.endpoint is not None and not self.is_over

    @property
    def is_answered(self) -> bool:
        """Whether it has, or had, the model, or was refused."""
        return self.endpoint is not None or self.error is not None

    @property
    def waited_s(self) -> float:
        """How long it waited for what it got."""
        assert self.had_at is not None, self
        return self.had_at - self.asked_at

    def leave(self) -> None:
        """It has its answer."""
        self._leaves.set()

    def give_up(self) -> None:
        """It does not wait any longer, or breaks off."""
        self._scope.cancel()


class GatewayStage:
    """A fleet of fake routers that load only what they are told to.

    Args:
        folder: for the routers' output.
        models: what there is on every router, by name.
        ram: bytes of RAM that there are.
        gauge: reads memory, one of RAM alone unless said otherwise.
        records: what of quarantines outlives it.

    Attributes:
        watches: what looks at each folder of models.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, FakeModel],
        *,
        ram: int = 64 * GIB,
        gauge: FakeGauge | None = None,
        records: QuarantineRecords | None = None,
    ) -> None:
        self.machine = FakeMachine()
        self.hosts: dict[str, FakeHost] = {}
        self.models = dict(models)
        self.devices: dict[str, tuple[footprint.Device, ...]] = {}
        self.bus = Bus()
        self.story = Story(self.bus)
        self.gauge = gauge or FakeGauge(ram)
        self.watches: list[FakeWatch] = []
        self.meter = fake_meter(self.bus, folder, self.gauge)
        self.fleet = Fleet(
            make_host=self._make_host,
            make_watch=self._make_watch,
            meter=self.meter,
            downloads=Downloads(Hub({}), self.bus),  # takes nothing: it does not run
            records=records,
            bus=self.bus,
            jitter=lambda: 0.0,
        )
        self._folder = folder
        self._group: anyio.abc.TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<GatewayStage {self.fleet!r}>"

    def router(self, name: str = "main", *, memory: int | None = 10 * GIB, models_max: int = 0) -> RouterSettings:
        """Settings of one router with that budget of RAM."""
        return RouterSettings(
            name=name,
            port=8000 + sum(name.encode()),
            models_dir=self._folder,
            models_max=models_max,
            memory=MemoryBudget(memory),
            autoload=False,
        )

    def _make_host(self, settings: RouterSettings, source: ModelSource) -> FakeHost:
        host = FakeHost(settings, folder=self._folder, machine=self.machine)
        host.models = dict(self.models)
        host.devices = self.devices.get(settings.name, ())
        host.source = source
        self.hosts[settings.name] = host
        return host

    def _make_watch(self, path: Path, link_dirs: Sequence[Path]) -> FakeWatch:
        watch = FakeWatch(path, link_dirs=link_dirs)
        watch.entries = {name: _entry(name) for name in self.models}
        self.watches.append(watch)
        return watch

    def put(self, name: str) -> None:
        """A model more is in the folders."""
        for watch in self.watches:
            watch.put(_entry(name))

    def replace(self, name: str) -> None:
        """Another file has the name of a model."""
        for watch in self.watches:
            old = watch.entries[name]
            file = ModelFile(old.path, FileId(1, hash(name), 1000, old.files[0].id.mtime_ns + 1))
            watch.put(Entry(name=name, state=EntryState.READY, files=(file,)))

    def __getitem__(self, name: str) -> Router:
        """The router of that name."""
        return self.fleet[name]

    def client(self, model: str, *, router: str | None = None) -> Client:
        """Somebody asks for a model."""
        assert self._group is not None
        client = Client(self, model, router)
        self._group.start_soon(client.run)
        return client

    async def served(self, *models: str) -> None:
        """Have clients come and go, one after the other."""
        for model in models:
            client = self.client(model)
            await self.until(lambda client=client: client.is_answered)
            assert client.error is None, client.error
            client.leave()
            await self.until(lambda client=client: client.is_over)
            await anyio.sleep(1.0)

    def loaded(self, router: str = "main") -> set[str]:
        """The models that the router has."""
        return {model.name for model in self[router].table if model.state is ModelState.LOADED}

    async def until(self, condition: Callable[[], object], *, within_s: float = PATIENCE_S) -> None:
        """Wait until it holds."""
        with anyio.fail_after(within_s):
            while not condition():
                await anyio.sleep(0.001 if within_s <= 1.0 else 0.01)

    @asynccontextmanager
    async def running(self, *routers: RouterSettings, wait: bool = True, **more: object) -> AsyncIterator[None]:
        """Have the fleet run, with every router up; at the end nothing may be left."""
        settings = FleetSettings(routers=routers or (self.router(),), serve="gateway", **more)  # type: ignore[arg-type]
        async with anyio.create_task_group() as self._group:
            self._group.start_soon(self.fleet.run, settings)
            if wait:
                await self.until(lambda: list(self.fleet) and all(router.is_serving for router in self.fleet))
            yield
            self._group.cancel_scope.cancel()
        assert self.machine.left == []


def _entry(name: str) -> Entry:
    file = ModelFile(f"/models/{name}.gguf", FileId(1, hash(name), 1000, 1))
    return Entry(name=name, state=EntryState.READY, files=(file,))


def models(names: Sequence[str], *, gib: float = 4, **how: object) -> dict[str, FakeModel]:
    """Models of that size in RAM, by name."""
    return {name: FakeModel(takes={"RAM": int(gib * GIB)}, **how) for name in names}  # type: ignore[arg-type]
