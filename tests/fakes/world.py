"""A fleet of two routers on one machine with a card, and all who want something of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from fakes.fleet import GIB, Client, GatewayStage
from fakes.gauge import FakeGauge
from fakes.host import FakeHost
from fakes.machine import ANSWER_S, FakeChild, FakeMachine, FakeModel, FakeProcess
from llamavisor import footprint
from llamavisor.errors import LlamavisorError
from llamavisor.gauge import RAM_ID as RAM
from llamavisor.gauge import Device, Reading
from llamavisor.launch import ModelSource
from llamavisor.router import Router
from llamavisor.settings import MemoryBudget, RouterSettings
from llamavisor.slots import Key, Stage
from llamavisor.states import RouterState

CARD = "0000:01:00.0"
TAKES: Mapping[str, Mapping[str, int]] = {
    "alpha": {RAM: 4 * GIB},
    "beta": {RAM: 4 * GIB},
    "gamma": {RAM: 2 * GIB},
    "delta": {RAM: GIB, CARD: 6 * GIB},
    "omega": {RAM: GIB, CARD: 3 * GIB},
    "huge": {RAM: 20 * GIB},
}
"""What each model takes. A router has about 10 GiB of RAM and 8 GiB of the card to give; both share what there is."""
_DULL = ("RouterProbed", "FolderLooked", "ModelProgress", "ModelAdded")


class WorldGauge(FakeGauge):
    """Reads what models take of a machine; what they held comes back a while after they have ended.

    Attributes:
        others: bytes that others hold, by device.
        lag_s: how long a driver takes to give back what a process held.
    """

    def __init__(self) -> None:
        super().__init__(64 * GIB, gpus=[Device(CARD, "nvidia", "a card")])
        self.others = {RAM: 4 * GIB, CARD: 0}
        self.lag_s = 0.0
        self.machine = FakeMachine()
        self._ended_at: dict[FakeChild, float] = {}

    async def read(self) -> Sequence[Reading]:
        """Every device, each once."""
        now = anyio.current_time()
        self.used = dict(self.others)
        for process in self.machine.processes:
            for name, child in process.children.items():
                if child.ended.is_set() and now - self._ended_at.setdefault(child, now) >= self.lag_s:
                    continue
                for device, size in TAKES[name].items():
                    self.used[device] = (self.used[device] or 0) + size
        self.used = {device: min(used or 0, self.total[device]) for device, used in self.used.items()}
        return await super().read()


class World(GatewayStage):
    """The fleet, its machine, and all who want something of it.

    Args:
        folder: for the routers' output.

    Attributes:
        clients: all who ever asked.
        persons: what people have asked routers for that is not done yet: the key of the model and when it was done.
        on_decision: called with every load that is decided.
        memory: what others take.
        appraise_s: how long it takes to find out what a model takes.
    """

    def __init__(self, folder: Path) -> None:
        gauge = WorldGauge()
        super().__init__(folder, {name: FakeModel(takes=dict(takes)) for name, takes in TAKES.items()}, gauge=gauge)
        gauge.machine = self.machine
        self.memory = gauge
        self.appraise_s = ANSWER_S
        for name in ("one", "two"):
            self.devices[name] = (footprint.Device("CUDA0", CARD, 24 * GIB),)
        self.clients: list[Client] = []
        self.persons: list[Person] = []
        self.on_decision: Callable[[Key], None] = lambda _: None
        moves = self.fleet.memory.scheduler._moves
        load = moves.load

        def tell_and_load(key: Key) -> None:
            self.on_decision(key)
            load(key)

        moves.load = tell_and_load  # type: ignore[method-assign]

    def _make_host(self, settings: RouterSettings, source: ModelSource) -> FakeHost:
        before = self.hosts.get(settings.name)
        host = super()._make_host(settings, source)
        host.appraise_s = self.appraise_s
        if before is not None:  # the same router with other settings
            host.usual, host.build = before.usual, before.build
        return host

    def settings(self, name: str, *, ram: int, card: int, models_max: int = 0) -> RouterSettings:
        """A router with these budgets, in GiB."""
        return RouterSettings(
            name=name,
            port=8001 if name == "one" else 8002,
            models_dir=self._folder,
            models_max=models_max,
            memory=MemoryBudget(None, ((RAM, ram * GIB), ("CUDA0", card * GIB))),
            autoload=False,
        )

    @property
    def waiting(self) -> list[Client]:
        """Who waits for an answer."""
        return [client for client in self.clients if not client.is_answered and not client.is_over]

    @property
    def holding(self) -> list[Client]:
        """Who has a model."""
        return [client for client in self.clients if client.has_it]

    async def ask(self, model: str, router: str | None) -> None:
        """Somebody asks for a model."""
        self.clients.append(self.client(model, router=router))

    async def person(self, verb: str, router: Router, model: str) -> None:
        """Somebody asks a router for something, past admission, and waits for it."""
        person = Person(verb, (router.name, model))
        self.persons.append(person)

        async def work() -> None:
            try:
                if verb == "load":
                    await router.load(model)
                elif verb == "unload":
                    await router.unload(model)
                else:
                    await router.rescan()
            except LlamavisorError:
                pass
            finally:
                person.done_at = anyio.current_time()

        assert self._group is not None
        self._group.start_soon(work)

    def process(self, router: str) -> FakeProcess | None:
        """The router's process, None without one that answers."""
        process = self.machine.at(self.hosts[router].settings.port)
        return process if process is not None and process.is_listening else None

    def children(self) -> dict[Key, tuple[FakeProcess, FakeChild]]:
        """The processes of models that there are."""
        return {
            (process.host.settings.name, name): (process, child)
            for process in self.machine.processes
            if not process.is_cleared
            for name, child in process.children.items()
            if not child.ended.is_set()
        }

    def told(self, *what: str) -> str:
        """That, and all that has happened."""
        told = [line for line in f"{self.story!r}".splitlines() if not any(word in line for word in _DULL)]
        return "\n".join([*what, f"{self.fleet.memory.scheduler!r}", *told])

    @property
    def unrest(self) -> str:
        """What is under way, "" when everything has come to rest."""
        scheduler = self.fleet.memory.scheduler
        admission, moves = scheduler.admission, scheduler._moves
        for what, there in (
            ("people wait", [person for person in self.persons if person.done_at is None]),
            ("clients wait or have not left", [client for client in self.clients if not client.is_over]),
            ("orders", list(admission.orders)),
            ("slots on their way", [slot for slot in admission.slots() if slot.stage is not Stage.LOADED]),
            ("moves", [*moves._loading, *moves._seeing_off]),
            ("routers on their way", [each for each in self.fleet if each.state is not RouterState.READY]),
            ("operations", [each for each in self.fleet if each._residency._operations.current is not None]),
            ("short memory", self.fleet.memory._upkeep.strain),
            ("stale models", [each for each in self.fleet if any(each.shelf.stale(each.table))]),
        ):
            if there:
                return f"{what}: {there}"
        return ""


@dataclass(eq=False, slots=True)
class Person:
    """What somebody asks a router for."""

    verb: str
    key: Key
    done_at: float | None = None


def limits_of(settings: RouterSettings) -> dict[str, int]:
    """The budgets of a router of this world, by device."""
    budgets = dict(settings.memory.devices)
    return {RAM: budgets[RAM], CARD: budgets["CUDA0"]}
