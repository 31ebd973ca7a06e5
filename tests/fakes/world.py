"""A fleet of two routers on one machine with a card, and a witness who sees whether what was promised is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import trio

from fakes.fleet import GIB, Client, GatewayStage
from fakes.gauge import FakeGauge
from fakes.host import FakeHost
from fakes.machine import ANSWER_S, FakeChild, FakeMachine, FakeModel, FakeProcess
from llamavisor import footprint
from llamavisor.claims import Lane
from llamavisor.errors import LlamavisorError
from llamavisor.gauge import RAM_ID as RAM
from llamavisor.gauge import Device, Reading
from llamavisor.launch import ModelSource
from llamavisor.placement import Candidate
from llamavisor.router import Router
from llamavisor.settings import MemoryBudget, RouterSettings
from llamavisor.slots import Key, Stage
from llamavisor.states import ModelState, RouterState

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
LATE_S = 0.02
"""How long news may be under way: what has happened less than so long ago nobody can know."""
_DULL = ("RouterProbed", "FolderLooked", "ModelProgress", "ModelAdded")
STALE_S = 1.1
"""A budget that was lowered is heeded when who waits is looked at again, which is every second."""


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
        witness: sees everything.
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
        self.persons: list[_Person] = []
        self.witness = Witness(self)

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
        person = _Person(verb, (router.name, model))
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
class _Person:
    """What somebody asks a router for."""

    verb: str
    key: Key
    done_at: float | None = None


@dataclass(eq=False, slots=True)
class _Seen:
    """The process of a model, as the witness has seen it."""

    process: FakeProcess
    child: FakeChild
    since: float
    is_ours: bool
    bytes: Mapping[str, int]


class Witness(trio.abc.Instrument):
    """Looks after every step of every task whether what must never happen has happened.

    Attributes:
        complaints: what has, in words.
        limits: the budgets of each router, with the times until which they were in force.
        fated: the processes that bad luck has ended.
    """

    def __init__(self, world: World) -> None:
        self.complaints: list[str] = []
        self.limits: dict[str, list[tuple[float, RouterSettings]]] = {}
        self.fated: set[FakeChild] = set()
        self._world = world
        self._seen: dict[Key, _Seen] = {}
        self._ended_at: dict[FakeChild, float] = {}
        self._told: set[Client] = set()
        self._has_of: dict[Client, FakeChild] = {}

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Look."""
        try:
            self._look()
        except Exception as error:  # noqa: BLE001 (an instrument that raises is no longer used)
            self.complaints.append(f"the witness: {error!r}")

    def _look(self) -> None:
        children = self._world.children()
        now = trio.current_time()
        for key, seen in list(self._seen.items()):
            if key not in children or children[key][1] is not seen.child:
                del self._seen[key]
                self._ended_at[seen.child] = now
                self._has_ended(key, seen, now)
        for key, (process, child) in children.items():
            if key not in self._seen:
                self._has_begun(key, process, child, now)
        for client in self._world.clients:
            if client.endpoint is not None and client not in self._told:
                self._told.add(client)
                self._was_granted(client, now)

    def _complain(self, text: str) -> None:
        self.complaints.append(f"at {trio.current_time():.3f}: {text}")

    # --- leases ---------------------------------------------------------------------------------------------------

    def _was_granted(self, client: Client, now: float) -> None:
        """A lease leads to a process that is there, or was a moment ago."""
        assert client.endpoint is not None
        if client._router not in (None, client.endpoint):
            self._complain(f"{client} wanted it on {client._router}")
        seen = self._seen.get((client.endpoint, client.model))
        if seen is not None and seen.child.port == client.port:
            self._has_of[client] = seen.child
            return
        if not any(child.port == client.port and now - at <= LATE_S for child, at in self._ended_at.items()):
            self._complain(f"{client} was sent to port {client.port}, where nobody is")

    def _has_ended(self, key: Key, seen: _Seen, now: float) -> None:
        """Who has a lease keeps the model, unless it is bad luck or a person that ends it."""
        process = seen.process
        if seen.child in self.fated or process.status is not None or process.terminated_at is not None:
            return
        persons = self._world.persons
        if any(each.verb == "unload" and each.key == key and _is_recent(each, now) for each in persons):
            return
        robbed = [client for client in self._world.clients if client.has_it and self._has_of.get(client) is seen.child]
        if robbed:
            self._complain(f"{key} was unloaded while somebody had it: {robbed}")

    # --- loads ----------------------------------------------------------------------------------------------------

    def _has_begun(self, key: Key, process: FakeProcess, child: FakeChild, now: float) -> None:
        slots = [slot.key for slot in self._world.fleet.memory.scheduler.admission.slots()]
        slot = self._world.fleet.memory.scheduler.admission.slot(*key)
        is_ours = slot is not None and slot.is_ours
        later = (
            slots[slots.index(key) + 1 :] if slot is not None else []
        )  # what was decided after it may begin before it
        others = {other: each for other, each in self._seen.items() if other not in later}
        decided_at = slot.since if slot is not None else now
        recent = [settings for until, settings in self.limits[key[0]] if decided_at - until <= STALE_S]
        fits = {settings: _within(TAKES[key[1]], settings) for settings in recent}
        self._seen[key] = _Seen(process, child, now, is_ours, fits[recent[-1]])
        persons = [each for each in self._world.persons if each.verb == "load" and _is_recent(each, now)]
        if not is_ours:
            if not any(each.key == key for each in persons):
                self._complain(f"{key} is loaded, and nobody has decided that")
            return
        fresh = {other for other, each in others.items() if not each.is_ours and now - each.since <= LATE_S}
        if fresh:  # a person was faster
            return
        held = {device: sum(each.bytes.get(device, 0) for each in others.values()) for device in (RAM, CARD)}
        count = sum(other[0] == key[0] for other in others)
        if not any(_has_room(settings, held, size, count) for settings, size in fits.items()):
            self._complain(f"{key} is loaded beside {sorted(others)}, for which there is no room")
        lane = Lane.of(key[0], TAKES[key[1]], key)
        for other, each in others.items():
            is_loading = each.process.state(other[1]) is ModelState.LOADING
            if is_loading and Lane.of(other[0], TAKES[other[1]], other).is_shared_with(lane):
                self._complain(f"{key} is loaded while {other} is being loaded on the same device")
        if slot is not None and slot.stage is Stage.LOADING:  # else it is cancelled already
            self._check_place(key, others)

    def _check_place(self, key: Key, others: Mapping[Key, _Seen]) -> None:
        """Nothing is loaded a second time where everybody could have used what is there."""
        scheduler = self._world.fleet.memory.scheduler
        for other, each in others.items():
            if other[1] != key[1] or not each.is_ours or each.process.status or each.process.terminated_at is not None:
                continue
            slot = scheduler.admission.slot(*other)
            if slot is None or slot.stage not in {Stage.LOADING, Stage.LOADED}:
                continue
            wanted = [client for client in self._world.clients if client.model == key[1] and client._router is not None]
            if not wanted and _is_usable(scheduler.where.candidates(key[1]), other[0]):
                self._complain(f"{key} is loaded while {other} is there")


def _is_usable(candidates: Sequence[Candidate], router: str) -> bool:
    return any(each.router == router and each.is_ready for each in candidates)


def _is_recent(person: _Person, now: float) -> bool:
    """Whether what somebody asks for is under way, or was a moment ago."""
    return person.done_at is None or now - person.done_at <= LATE_S


def _within(takes: Mapping[str, int], settings: RouterSettings) -> dict[str, int]:
    """What a model takes there: what is larger than the budget is fitted into it."""
    most = _limits(settings)
    return {device: min(size, most[device]) for device, size in takes.items()}


def _has_room(settings: RouterSettings, held: Mapping[str, int], size: Mapping[str, int], count: int) -> bool:
    """Whether so much more is within the budgets of a router that has so many models."""
    most = _limits(settings)
    return all(held[device] + more <= most[device] for device, more in size.items() if more) and (
        not settings.models_max or count < settings.models_max
    )


def _limits(settings: RouterSettings) -> dict[str, int]:
    budgets = dict(settings.memory.devices)
    return {RAM: budgets[RAM], CARD: budgets["CUDA0"]}
