"""Who may load, who waits, who is refused: one synchronous step over one table of all routers.

Every method takes what has happened and the time, and returns what is to be done about it, in order. Nothing here
waits: `fleet` carries the actions out and tells what came of them. Choosing victims and granting leases is one step, so
no model can be chosen between its load and its first request, and no two demands can choose the same one.

How a demand is met. (1) Its model is loaded: at once. (2) It is being loaded: with everybody else who waits for it.
(3) Else it waits in the order of arrival. With every step all who wait are planned anew, the first first; what one
needs is reserved before the next is looked at, even while there is no room for it. Who is in the way is closed to new
leases and unloaded when idle; once the process has gone and there is room, and nobody loads on the same device, the
model is loaded.

Times are monotonic seconds (FAULTS.md, T1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from llamavisor.cause import Consequence
from llamavisor.demands import Action, Lease, Limits, Order, Refuse, Rejection, Why
from llamavisor.eviction import Refusal, Resident, relieve
from llamavisor.orders import Orders
from llamavisor.placement import Candidate, Choice
from llamavisor.quarantine import Quarantine, Quarantines
from llamavisor.slots import Key, Slot, Slots, Stage

STUCK_S = 60.0
"""A model that its router would not unload is left alone for so long: the next best is chosen."""


class Admission:
    """The table and the queue.

    Args:
        limits: how long, and how many, demands may wait.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._slots = Slots()
        self._quarantines = Quarantines()
        self._orders = Orders(self._slots, self._quarantines, limits or Limits())

    def __repr__(self) -> str:
        return f"<Admission {list(self._slots)} {self._orders}>"

    @property
    def limits(self) -> Limits:
        """How long, and how many, demands may wait."""
        return self._orders.limits

    @property
    def pinned(self) -> AbstractSet[str]:
        """The models that are not to be chosen, be they in memory or not."""
        return self._orders.pinned

    @property
    def orders(self) -> tuple[Order, ...]:
        """All who wait, in the order of arrival; to be read only."""
        return tuple(self._orders)

    @property
    def waiting(self) -> int:
        """How many demands wait."""
        return sum(len(order.tickets) for order in self._orders)

    def residents(self, now: float) -> list[Resident]:
        """Everybody in the table."""
        return self._slots.residents(now)

    def slot(self, router: str, model: str) -> Slot | None:
        """What the table says of one model on one router, None if it takes nothing there; to be read only."""
        return self._slots.get((router, model))

    def slots(self) -> list[Slot]:
        """All of the table; to be read only."""
        return list(self._slots)

    # What clients want

    def ask(
        self, model: str, candidates: Sequence[Candidate], now: float, *, only: str | None = None
    ) -> tuple[int, list[Action]]:
        """Somebody wants the model; returns the number of the demand, of which every one is granted or refused once.

        Args:
            model: its name.
            candidates: where it may be, in the order of preference.
            now: monotonic time in seconds.
            only: the only router that comes into question, and so the only candidate; None for any.
        """
        number = self._orders.next_number()
        candidates = tuple(candidates)
        order = self._orders.get(model, only)
        if order is None:
            if slot := self._orders.find(model, candidates, Stage.LOADED):  # never behind a load
                return number, [self._orders.grant(number, slot, now)]
            count = 0
        else:
            count = len(order.tickets)
        if self.waiting >= self.limits.max_waiting or count >= self.limits.max_waiting_per_model:
            limits = self.limits
            detail = (
                f"{count} others wait for it (at most {limits.max_waiting_per_model}),"
                f" and {self.waiting} altogether (at most {limits.max_waiting})"
            )
            return number, [Refuse(number, Rejection(Why.QUEUE_FULL, model, detail, self._orders.retry_after_s()))]
        if order is None:
            order = Order(model, only, candidates, since=now, progressed_at=now)
            self._orders.add(order)
        elif order.candidates == candidates:  # it changes nothing that one more waits
            order.tickets[number] = now
            return number, []
        order.candidates = candidates
        order.tickets[number] = now
        return number, self._orders.settle(now)

    def grant_loaded(self, model: str, now: float, *, only: str | None = None) -> Lease | None:
        """A lease on a model that is loaded, on the router with the fewest; None if it has to be asked for."""
        least = None  # a loop, because every request of a client comes here
        for slot in self._slots:
            router, name = slot.key
            if name != model or slot.stage is not Stage.LOADED or (only is not None and only != router):
                continue
            if (least is None or len(slot.leases) < len(least.leases)) and self._orders.is_up.get(router, True):
                least = slot
        return self._orders.promise(least, now) if least is not None else None

    def what_if(
        self, model: str, candidates: Sequence[Candidate], now: float
    ) -> tuple[Sequence[Candidate], Choice | Refusal | Rejection]:
        """What would become of a demand for the model if it were the first in the queue; nothing is changed.

        Returns:
            The candidates as they came into question (an oversize one with no more than its budget), and the outcome.
        """
        return self._orders.what_if(model, candidates, now)

    def quarantined(self, now: float) -> list[Quarantine]:
        """All models that are left alone for now, and why."""
        return self._quarantines.all(now)

    def recall(self, quarantine: Quarantine) -> None:
        """An earlier daemon has left this model alone."""
        self._quarantines.recall(quarantine)

    def give_up(self, number: int, now: float) -> list[Action]:
        """Who made the demand has left. One that was granted meanwhile is unknown here: its lease is to be released."""
        for order in self._orders:
            if order.tickets.pop(number, None) is not None:
                if order.tickets:
                    return []
                return [*self._orders.abandon(order), *self._orders.settle(now)]
        return []

    def time_out(self, number: int, now: float) -> list[Action]:
        """Who made the demand waits no longer, and is to be told what for."""
        order = next((each for each in self._orders if number in each.tickets), None)
        if order is None:
            return []
        obstacle = f"not to be had in time: {order.obstacle}"
        rejection = Rejection(Why.TIMED_OUT, order.model, obstacle, self._orders.retry_after_s(), order.refusal)
        return [Refuse(number, rejection), *self.give_up(number, now)]

    def release(
        self, lease: Lease, now: float, *, has_answered: bool = False, has_failed: bool = False
    ) -> list[Action]:
        """A lease has ended. A second time, or after the model's process has ended, it means nothing.

        Args:
            lease: which.
            now: monotonic time in seconds.
            has_answered: whether the model has done what it was had for.
            has_failed: whether it has answered that it could not, for a reason of its own.
        """
        slot = self._slots.get((lease.router, lease.model))
        if slot is None or not slot.end_lease(lease.number, now):
            return []
        if has_failed:
            slot.failures += 1
        elif has_answered and slot.stage is not Stage.LEAVING:
            slot.has_answered, slot.failures = True, 0
        if slot.stage is Stage.DRAINING:
            self._orders.note_progress(slot.key, now)
        matters = self._orders or slot.stage is Stage.DRAINING  # looked at first: nearly always nobody waits
        return self._orders.settle(now) if matters and slot.may_go(now) else []

    def is_kept(self, lease: Lease) -> bool:
        """Whether what was promised with a lease still holds: the process that it was given for has not ended."""
        slot = self._slots.get((lease.router, lease.model))
        return slot is not None and slot.stage in {Stage.LOADED, Stage.DRAINING} and lease.number in slot.leases

    # What routers say

    def loading(self, router: str, model: str, size: Mapping[str, int], now: float) -> list[Action]:
        """Somebody else is having the model loaded: a person, a client of the router, the daemon at its start.

        One that was on its way out has gone then: this is another process of it.
        """
        slot = self._slots.get((router, model))
        if slot is not None and slot.stage is Stage.LEAVING:
            self._orders.remove(slot.key, now)
        if (router, model) not in self._slots:
            self._orders.add_slot(router, model, size, now)
        return self._orders.settle(now)

    def progressed(self, router: str, model: str, fraction: float, now: float) -> None:
        """A load has got further, to that fraction of it (0 to 1)."""
        slot = self._slots.get((router, model))
        if slot is not None and slot.stage is Stage.LOADING:
            slot.progress = max(fraction, slot.progress)  # a further stage begins at 0 again
            self._orders.note_progress(slot.key, now)

    def loaded(
        self, router: str, model: str, size: Mapping[str, int] | None, now: float, *, last_used: float | None = None
    ) -> list[Action]:
        """A model can be used.

        Args:
            router: where.
            model: which. One that is on its way out stays so.
            size: what it takes of each device; None to go on with what was expected.
            now: monotonic time in seconds.
            last_used: of a model that was loaded again, with its router: when it was last used before.
        """
        key = (router, model)
        slot = self._slots.get(key) or self._orders.add_slot(router, model, size or {}, now)
        if size is not None:
            slot.resident = replace(slot.resident, bytes=size)
        if slot.stage is Stage.LOADING:
            used = now if last_used is None else last_used
            slot.resident = replace(slot.resident, reload_cost_s=now - slot.since, loaded_at=now, last_used=used)
            slot.become(Stage.LOADED)
            if slot.is_ours:
                self._orders.typical_load_s += (now - slot.since - self._orders.typical_load_s) / 4
            self._quarantines.loaded(key, now)
            self._orders.note_progress(key, now)
        return self._orders.settle(now)

    def sized(self, router: str, model: str, size: Mapping[str, int], now: float) -> list[Action]:
        """What a model takes of each device is known, or known better."""
        slot = self._slots.get((router, model))
        if slot is None or slot.resident.bytes == size:
            return []
        slot.resident = replace(slot.resident, bytes=size)
        return self._orders.settle(now)

    def load_failed(
        self,
        router: str,
        model: str,
        reason: str,
        *,
        then: Consequence = Consequence.QUARANTINE,
        now: float,
    ) -> list[Action]:
        """A load did not succeed. Its slot is kept until `gone`: what it had taken may not be back yet.

        Args:
            router: where.
            model: which.
            reason: why, for a person.
            then: EVICT: the first time, who is idle leaves, and it is tried once more. RETRY: the first time, it is
                tried once more. Else, and the next time, the model is not loaded on that router for a while; who waits
                for it is served by another router, or refused.
            now: monotonic time in seconds.
        """
        slot = self._slots.get((router, model))
        if slot is None or slot.stage is not Stage.LOADING:  # a load that was cancelled fails, of course
            return []
        slot.become(Stage.LEAVING)
        order = next(iter(self._orders.of(model, router)), None)
        if then is Consequence.RETRY and order is not None:
            suspected = self._quarantines.suspect(slot.key, reason, now)
            order.after = {slot.key}
            return [*([suspected] if suspected is not None else []), *self._orders.settle(now)]
        if order is None or then is not Consequence.EVICT or order.has_failed_for_memory:
            return [self._quarantines.failed(slot.key, reason, now), *self._orders.settle(now)]
        order.has_failed_for_memory = True
        order.progressed_at = now
        victims = self._relieve(slot.resident.bytes, now)
        order.victims.update(victims)
        order.after = {slot.key, *victims}
        return self._orders.settle(now)

    def gone(self, router: str, model: str, now: float) -> list[Action]:
        """A model's process has ended, asked or not, and its memory has come back or was waited for long enough."""
        key = (router, model)
        actions: list[Action] = []
        slot = self._slots.get(key)
        if slot is not None and slot.stage is Stage.LOADING:
            actions += self.load_failed(router, model, "its process ended while it was loading", now=now)
        self._orders.remove(key, now)
        return [*actions, *self._orders.settle(now)]

    def crashed(self, router: str, model: str, reason: str, now: float) -> list[Action]:
        """A model that could be loaded is not to be loaded again at once: it ends too often (P6), or for memory (P7).

        To be called before `gone`. One end of a serving process is no reason to call this (DESIGN.md 11).
        """
        if (slot := self._slots.get((router, model))) is not None:
            slot.become(Stage.LEAVING)
        return [self._quarantines.failed((router, model), reason, now), *self._orders.settle(now)]

    def leaving(self, router: str, model: str, now: float) -> list[Action]:
        """Somebody else is having the model unloaded."""
        slot = self._slots.get((router, model))
        if slot is not None and slot.stage is not Stage.LEAVING:
            slot.become(Stage.LEAVING)
        return self._orders.settle(now)

    def stayed(self, router: str, model: str, now: float) -> list[Action]:
        """The router would not unload a loaded model: it can be used again, and another is chosen (FAULTS.md, R4).

        Nor would it end a load that was cancelled: that goes on, and whoever wants the model has it.
        """
        slot = self._slots.get((router, model))
        if slot is None or slot.stage is not Stage.LEAVING:
            return []
        slot.stuck_until = now + STUCK_S
        slot.is_dismissed = False  # it may be used and pinned by now: whoever wanted it gone looks again
        if slot.resident.is_loading:
            slot.become(Stage.LOADING)
        else:
            self._orders.reopen(slot)
        return self._orders.settle(now)

    def observed(
        self, router: str, model: str, in_flight: int, now: float, *, used_at: float | None = None
    ) -> list[Action]:
        """A model was seen to answer so many requests, whether or not they have leases.

        Args:
            router: where.
            model: which.
            in_flight: how many.
            now: monotonic time in seconds.
            used_at: when it was last seen to have done something; None if that is not known.
        """
        slot = self._slots.get((router, model))
        if slot is None or slot.stage not in {Stage.LOADED, Stage.DRAINING}:
            return []
        if used_at is not None and used_at > slot.resident.last_used:
            slot.resident = replace(slot.resident, last_used=used_at)
        if in_flight:
            slot.resident = replace(slot.resident, in_flight=in_flight, last_used=now)
        elif slot.resident.in_flight:
            slot.resident = replace(slot.resident, in_flight=0)
            if slot.may_go(now):
                return self._orders.settle(now)
        return []

    def router_up(self, router: str, now: float) -> list[Action]:
        """A router can be used."""
        self._orders.is_up[router] = True
        for order in self._orders:
            if any(each.router == router for each in order.candidates):
                order.progressed_at = now
        return self._orders.settle(now)

    def router_ended(self, router: str, *, has_crashed: bool, now: float) -> list[Action]:
        """A router's process has ended, or is being ended: nothing on it can be used, or loaded, any more.

        Its models hold what they hold until `router_gone`.

        Args:
            router: which.
            has_crashed: whether nobody had asked for it. What was loading then may have been the poison.
            now: monotonic time in seconds.
        """
        self._orders.is_up[router] = False
        actions: list[Action] = []
        for slot in self._of(router):
            if has_crashed and slot.stage is Stage.LOADING:
                suspected = self._quarantines.suspect(slot.key, "its router ended while it was loading", now)
                actions += [suspected] if suspected is not None else []
            slot.become(Stage.LEAVING)
        return [*actions, *self._orders.settle(now)]

    def router_gone(self, router: str, now: float) -> list[Action]:
        """Nothing is left of a router that has ended."""
        for slot in self._of(router):
            self._orders.remove(slot.key, now)
        return self._orders.settle(now)

    def forget(self, routers: Collection[str]) -> None:
        """Keep nothing of routers but these; of the others nothing is left."""
        self._orders.is_up = {name: is_up for name, is_up in self._orders.is_up.items() if name in routers}
        self._quarantines.forget(routers)

    # What people and the configuration want

    def pin(self, models: AbstractSet[str], now: float) -> list[Action]:
        """These models, and no others, are not to be chosen. One that has been told to leave already does."""
        self._orders.pinned = frozenset(models)
        for slot in self._slots:
            is_pinned = slot.resident.name in models
            if is_pinned is slot.resident.is_pinned:
                continue
            slot.resident = replace(slot.resident, is_pinned=is_pinned)
            if is_pinned and slot.stage is Stage.DRAINING and not slot.is_dismissed:
                self._orders.reopen(slot)
        return self._orders.settle(now)

    def restrict(self, limits: Limits, now: float) -> list[Action]:
        """Demands may wait for as long, and as many, as these limits say from now on."""
        self._orders.limits = limits
        return self._orders.settle(now)

    def strain(self, why: str, now: float, *, retry_after_s: float = 0.0) -> list[Action]:
        """Memory is so short that nothing may be loaded, and why; "" when that is over. What is loaded can be used.

        Args:
            why: in one line.
            now: monotonic time in seconds.
            retry_after_s: when that may be over.
        """
        self._orders.strain, self._orders.strain_retry_s = why, retry_after_s
        return self._orders.settle(now)

    def dismiss(self, router: str, model: str, now: float) -> list[Action]:
        """The model is to leave as soon as it is idle, though nobody needs its room: its ttl, or a new file of it."""
        slot = self._slots.get((router, model))
        if slot is None or slot.stage not in {Stage.LOADED, Stage.DRAINING} or now < slot.stuck_until:
            return []
        slot.is_dismissed = True
        slot.become(Stage.DRAINING)
        return self._orders.settle(now)

    def relieve(self, lacking: Mapping[str, int], now: float) -> list[Action]:
        """Memory is short: who is idle leaves until so much of each device comes free, beside what comes already."""
        self._relieve(lacking, now)
        return self._orders.settle(now)

    def candidates_changed(
        self, candidates: Mapping[tuple[str, str | None], Sequence[Candidate]], now: float
    ) -> list[Action]:
        """The configuration, a budget or an estimate has changed for those who wait.

        Args:
            candidates: where a model may be now, by its name and the only router that comes into question, None for
                any.
            now: monotonic time in seconds.
        """
        has_changed = False
        for (model, only), those in candidates.items():
            order = self._orders.get(model, only)
            if order is not None and order.candidates != tuple(those):
                order.candidates = tuple(those)
                has_changed = True
        return self._orders.settle(now) if has_changed else []

    def forgive(self, model: str, now: float) -> list[Action]:
        """The model's file or options have changed, or a person says so: its failures are forgotten."""
        self._quarantines.forgive(model)
        return self._orders.settle(now)

    def was_away(self, gap_s: float) -> None:
        """We did not run for so long: nobody who waits is late by that, and nobody was idle (FAULTS.md, T2)."""
        for slot in self._slots:
            used, loaded = slot.resident.last_used + gap_s, slot.resident.loaded_at + gap_s
            slot.resident = replace(slot.resident, last_used=used, loaded_at=loaded)
        for order in self._orders:
            order.since += gap_s
            order.progressed_at += gap_s
            order.tickets = {number: since + gap_s for number, since in order.tickets.items()}

    def tick(self, now: float) -> list[Action]:
        """Time has passed. To be called about every second."""
        return self._orders.settle(now)

    def _relieve(self, lacking: Mapping[str, int], now: float) -> list[Key]:
        """Close who is idle until so much comes free beside what those bring who leave already; returns whom."""
        residents = self._slots.residents(now)
        coming = [each for each in residents if each.is_leaving and not each.is_loading]  # what failed frees nothing
        short = {device: lack - sum(each.bytes.get(device, 0) for each in coming) for device, lack in lacking.items()}
        victims = relieve(residents, short, now=now, min_residency_s=self.limits.min_residency_s)
        keys = [(each.router, each.name) for each in victims]
        for key in keys:
            if slot := self._slots.get(key):
                slot.is_dismissed = True
                slot.become(Stage.DRAINING)
        return keys

    def _of(self, router: str) -> list[Slot]:
        return [slot for slot in self._slots if slot.resident.router == router]
