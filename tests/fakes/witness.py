"""Somebody who sees all that happens to a fleet in a test, and complains when a promise is broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import trio

from fakes.fleet import Client
from fakes.machine import FakeChild, FakeProcess
from fakes.world import TAKES, Person, World, limits_of
from llamavisor.claims import Lane
from llamavisor.settings import RouterSettings
from llamavisor.slots import Key, Stage
from llamavisor.states import ModelState

LATE_S = 0.02
"""How long news may be under way: what has happened less than so long ago nobody can know."""
STALE_S = 1.1
"""A budget that was lowered is heeded when who waits is looked at again, which is every second."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """A load that was decided, and what was known then: the models of which it was known what they take."""

    number: int
    at: float
    sized: frozenset[Key]


@dataclass(eq=False, slots=True)
class _Seen:
    """The process of a model. `decision` is None for one that a person has had loaded."""

    process: FakeProcess
    child: FakeChild
    decision: _Decision | None
    bytes: Mapping[str, int]


class Witness(trio.abc.Instrument):
    """Looks after every step of every task whether what must never happen has happened.

    Args:
        world: what it looks at.

    Attributes:
        complaints: what has, in words.
        limits: the settings of each router, with the times until which they were in force.
        fated: the processes that bad luck has ended.
    """

    def __init__(self, world: World) -> None:
        self.complaints: list[str] = []
        self.limits: dict[str, list[tuple[float, RouterSettings]]] = {}
        self.fated: set[FakeChild] = set()
        self._world = world
        self._decided: dict[Key, _Decision] = {}
        self._numbers = 0
        self._seen: dict[Key, _Seen] = {}
        self._ended_at: dict[FakeChild, float] = {}
        self._told: set[Client] = set()
        self._has_of: dict[Client, FakeChild] = {}
        world.on_decision = self._note_decision

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
        if client._router not in {None, client.endpoint}:
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

    def _note_decision(self, key: Key) -> None:
        self._numbers += 1
        slots = self._world.fleet.memory.scheduler.admission.slots()
        sized = frozenset(slot.key for slot in slots if slot.resident.bytes)
        self._decided[key] = _Decision(self._numbers, trio.current_time(), sized)

    def _has_begun(self, key: Key, process: FakeProcess, child: FakeChild, now: float) -> None:
        slot = self._world.fleet.memory.scheduler.admission.slot(*key)
        decision = self._decided.pop(key, None) if slot is not None and slot.is_ours else None
        decided_at = now if decision is None else decision.at
        recent = [settings for until, settings in self.limits[key[0]] if decided_at - until <= STALE_S]
        fits = {settings: _within(TAKES[key[1]], settings) for settings in recent}
        others = dict(self._seen)
        self._seen[key] = _Seen(process, child, decision, fits[recent[-1]])
        if decision is None:
            persons = [each for each in self._world.persons if each.verb == "load" and _is_recent(each, now)]
            if not any(each.key == key for each in persons):
                self._complain(f"{key} is loaded, and nobody has decided that")
            return
        others = {other: each for other, each in others.items() if _could_be_known(other, each, decision)}
        held: dict[str, int] = {}
        for each in others.values():
            for device, size in each.bytes.items():
                held[device] = held.get(device, 0) + size
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
        model = key[1]
        scheduler = self._world.fleet.memory.scheduler
        if any(client.model == model and client._router is not None for client in self._world.clients):
            return  # somebody would have it nowhere else
        ready = {each.router for each in scheduler.where.candidates(model) if each.is_ready}
        for other, each in others.items():
            slot = scheduler.admission.slot(*other)
            is_kept = slot is not None and slot.stage in {Stage.LOADING, Stage.LOADED}
            if other[1] == model and is_kept and other[0] in ready and each.process.terminated_at is None:
                self._complain(f"{key} is loaded while {other} is there")


def _could_be_known(key: Key, seen: _Seen, decision: _Decision) -> bool:
    """Whether what one model takes could be reckoned with when the load of another was decided."""
    return key in decision.sized if seen.decision is None else seen.decision.number < decision.number


def _is_recent(person: Person, now: float) -> bool:
    """Whether what somebody asks for is under way, or was a moment ago."""
    return person.done_at is None or now - person.done_at <= LATE_S


def _within(takes: Mapping[str, int], settings: RouterSettings) -> dict[str, int]:
    """What a model takes there: what is larger than the budget is fitted into it."""
    most = limits_of(settings)
    return {device: min(size, most[device]) for device, size in takes.items()}


def _has_room(settings: RouterSettings, held: Mapping[str, int], size: Mapping[str, int], count: int) -> bool:
    """Whether so much more is within the budgets of a router that has so many models."""
    most = limits_of(settings)
    is_within = all(held.get(device, 0) + more <= most[device] for device, more in size.items() if more)
    return is_within and (not settings.models_max or count < settings.models_max)
