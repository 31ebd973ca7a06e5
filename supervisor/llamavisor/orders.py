"""The queue of those who wait for a model to be loaded, and the one step that takes all of them further.

Written by `admission` alone, which changes the table of slots and then has the step made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from llamavisor.claims import Claims, Lane
from llamavisor.demands import (
    CANCEL_BELOW,
    Action,
    CancelLoad,
    Grant,
    Lease,
    Limits,
    Load,
    Order,
    Refuse,
    Rejection,
    Unload,
    Why,
)
from llamavisor.eviction import Demand, Plan, Reason, Refusal, Resident
from llamavisor.placement import Candidate, Choice, Reserved, place
from llamavisor.quarantine import Quarantine, Quarantines
from llamavisor.slots import Key, Slot, Slots, Stage

MIN_RETRY_S = 5.0
MAX_RETRY_S = 300.0
LOAD_STALL_S = 1800.0
"""For how long a load of its own without any progress is waited for: slow is not dead, and builds differ in what they
tell. Its router ends a load sooner, by the size of the files (`residency.LOAD_DEADLINE_S`), which ends the wait."""
TYPICAL_LOAD_S = 10.0
"""The first guess of how long a load takes, for who asks when to come again."""


class Orders:
    """Who waits, in the order of arrival: one order for each model, and for each router on which alone it is wanted.

    Args:
        slots: the table.
        quarantines: what is not to be loaded for now.
        limits: how long demands may wait.

    Attributes:
        limits: likewise.
        pinned: the models that are not to be chosen.
        is_up: which routers can be used, as far as told; a candidate has to say so too.
        strain: why nothing may be loaded for now, "" if it may.
        strain_retry_s: after so many seconds it may be over.
        typical_load_s: how long loads have taken of late.
    """

    def __init__(self, slots: Slots, quarantines: Quarantines, limits: Limits) -> None:
        self.pinned: AbstractSet[str] = frozenset()
        self.is_up: dict[str, bool] = {}
        self.strain, self.strain_retry_s = "", 0.0
        self.typical_load_s = TYPICAL_LOAD_S
        self._slots = slots
        self._quarantines = quarantines
        self.limits = limits
        self._orders: dict[tuple[str, str | None], Order] = {}  # Invariant: in the order of arrival
        self._numbers = 0

    def __repr__(self) -> str:
        return f"<Orders waiting={ {each.model: len(each.tickets) for each in self} }>"

    def __iter__(self) -> Iterator[Order]:
        return iter(self._orders.values())

    def __len__(self) -> int:
        return len(self._orders)

    def get(self, model: str, only: str | None) -> Order | None:
        """Who waits for the model, on that router only or, of None, on any; None if nobody does."""
        return self._orders.get((model, only))

    def of(self, model: str, router: str) -> list[Order]:
        """All who wait for the model and may have it on that router."""
        return [each for each in self if each.model == model and each.only in (None, router)]

    def add(self, order: Order) -> None:
        """Somebody is the first to wait for a model."""
        self._orders[order.model, order.only] = order

    def _remove(self, order: Order) -> None:
        del self._orders[order.model, order.only]

    def settle(self, now: float) -> list[Action]:
        """The step: who waits is granted, refused, or has what it needs loaded, unloaded and reserved."""
        actions = self._expire(now)
        for _ in range(2):  # once more if something was closed in vain: somebody may wait for it
            actions += self._tell(now)
            actions += self._grant_all(now)
            needed = self._advance(now, actions)
            draining = [slot for slot in self._slots if slot.stage is Stage.DRAINING and not slot.is_dismissed]
            unneeded = [slot for slot in draining if slot.key not in needed]
            for slot in unneeded:
                self.reopen(slot)
            if not unneeded:
                break
        return actions

    def _grant_all(self, now: float) -> list[Action]:
        """Who waits for a model that can be used has it, before anybody can choose it as a victim."""
        granted: list[Action] = []
        for order in list(self._orders.values()):
            if slot := self.find(order.model, order.candidates, Stage.LOADED):
                self._remove(order)
                granted += [self.grant(number, slot, now) for number in order.tickets]
                granted += self._cancel_loads(order.model)  # it was begun elsewhere while this one was closed
        return granted

    def _advance(self, now: float, actions: list[Action]) -> set[Key]:
        """Take every order one step further, the first first; returns the slots that have to go."""
        claims = Claims(self._slots)
        needed: set[Key] = set()
        for order in list(self._orders.values()):
            order.refusal = None
            # There are four cases:
            # 1. Its model is being loaded.
            # 2. It will never fit, or is not to be loaded for now.
            # 3. There is no room: what comes free is kept for it.
            # 4. There is room, or there will be.
            if slot := self.find(order.model, order.candidates, Stage.LOADING):
                order.waits = frozenset({slot.key})
                continue
            usable, outcome = self._place(order, claims.reserved, now)
            if isinstance(outcome, Rejection):
                self._remove(order)
                actions += [Refuse(number, outcome) for number in order.tickets]
            elif isinstance(outcome, Refusal):
                order.refusal = outcome
                claims.wait(order, {(each.router, each.name) for each in outcome.blockers})
                if outcome.reason is not Reason.NOT_READY:
                    claims.reserve_all(order.model, usable)
            else:
                self._close(order, outcome.plan)
                actions += self._tell(now)
                going = {(each.router, each.name) for each in (*outcome.plan.victims, *outcome.plan.waits_for)}
                needed |= {key for key in going if key[1] != order.model}
                candidate = next(each for each in usable if each.router == outcome.router)
                actions += self._begin(order, candidate, going, claims, now)
        return needed

    def _place(
        self, order: Order, reserved: Reserved, now: float
    ) -> tuple[Sequence[Candidate], Choice | Refusal | Rejection]:
        """Where the order is loaded and who leaves for it; or what it waits for; or why it is refused.

        Returns the candidates that came into question with it.
        """
        if self.strain:
            return (), Rejection(Why.STRAINED, order.model, self.strain, max(self.strain_retry_s, MIN_RETRY_S))
        usable: list[Candidate] = []
        failed: list[Quarantine] = []
        for each in order.candidates:
            if quarantine := self._quarantines.get(each.router, order.model, now):
                failed += [quarantine] if each.is_allowed else []
            elif each.is_allowed:
                usable.append(replace(each, is_ready=self._is_ready(each)))
        outcome = self._choose(order, usable, reserved, now)
        if self.limits.oversize == "fit" and isinstance(outcome, Refusal) and outcome.is_final:
            usable = [replace(each, bytes=_demand(order, each).within(each.budget).bytes) for each in usable]
            outcome = self._choose(order, usable, reserved, now)
        if isinstance(outcome, Choice) or not outcome.is_final:
            return usable, outcome
        if failed:
            first = min(failed, key=lambda each: each.until)
            detail = f"it is not loaded for now: {first.reason}"
            return usable, Rejection(Why.QUARANTINED, order.model, detail, first.until - now)
        detail = outcome.text.removeprefix(f"model {order.model}: ")
        return usable, Rejection(Why.IMPOSSIBLE, order.model, detail, None, outcome)

    def what_if(
        self, model: str, candidates: Sequence[Candidate], now: float
    ) -> tuple[Sequence[Candidate], Choice | Refusal | Rejection]:
        """What would become of a demand if it were the first in the queue; nothing is changed."""
        order = Order(model, None, tuple(candidates), since=now, progressed_at=now)
        return self._place(order, Reserved(), now)

    def _choose(self, order: Order, usable: Sequence[Candidate], reserved: Reserved, now: float) -> Choice | Refusal:
        """Where there is room, or will be. Who is idle by now leaves, rather than who was closed and is busy still."""
        residents = self._slots.residents(now)
        closed = {slot.key for slot in self._slots if slot.stage is Stage.DRAINING and not slot.is_dismissed}
        closed = {key for key in closed if key[1] != order.model}  # else a new demand for it would open it again
        least_s = self.limits.min_residency_s
        if closed:
            opened = [
                replace(each, is_leaving=False) if (each.router, each.name) in closed else each for each in residents
            ]
            outcome = place(order.model, usable, opened, now=now, reserved=reserved, min_residency_s=least_s)
            if isinstance(outcome, Choice):
                return outcome
        may_drain = now - order.since >= self.limits.drain_after_s
        return place(
            order.model,
            usable,
            residents,
            now=now,
            reserved=reserved,
            min_residency_s=least_s,
            may_drain=may_drain,
        )

    def _begin(self, order: Order, candidate: Candidate, going: set[Key], claims: Claims, now: float) -> list[Action]:
        """Load the order's model if everything is ready for it; else keep its room and its turn."""
        key = candidate.router, order.model
        order.after = {each for each in order.after if (slot := self._slots.get(each)) and slot.resident.is_leaving}
        lane = Lane.of(candidate.router, candidate.bytes, key)
        before = claims.in_lane(lane)
        if key in self._slots or order.after or before or not claims.has_room(candidate):
            blocking = going | order.after
            claims.wait(order, blocking | {each.key for each in before})
            if not claims.is_answering(blocking):  # who waits for that has no right to keep others from loading
                claims.keep_lane(lane)
            claims.reserve(_demand(order, candidate))
            return []
        self.add_slot(*key, candidate.bytes, now).is_ours = True
        order.waits = frozenset({key})
        order.progressed_at = now
        claims.keep_lane(lane)
        asked = next(each.bytes for each in order.candidates if each.router == candidate.router)
        return [Load(*key, is_oversize=candidate.bytes != asked)]

    def _close(self, order: Order, plan: Plan) -> None:
        """The victims of a plan get no new leases from now on."""
        for each in plan.victims:
            key = (each.router, each.name)
            if slot := self._slots.get(key):
                slot.become(Stage.DRAINING)
                order.victims.add(key)

    def reopen(self, slot: Slot) -> None:
        """It was to leave, and may stay."""
        slot.become(Stage.LOADED)
        for order in self._orders.values():
            order.victims.discard(slot.key)

    def _tell(self, now: float) -> list[Action]:
        """Have those unloaded that were closed and are idle now."""
        told: list[Action] = []
        for slot in self._slots:
            if slot.stage is Stage.DRAINING and slot.may_go(now):
                slot.become(Stage.LEAVING)
                told.append(Unload(*slot.key))
        return told

    def _expire(self, now: float) -> list[Action]:
        """Refuse who has waited in vain for too long."""
        actions: list[Action] = []
        for order in list(self._orders.values()):
            is_loading = self.find(order.model, order.candidates, Stage.LOADING) is not None
            limit_s = max(self.limits.stall_s, LOAD_STALL_S) if is_loading else self.limits.stall_s
            late = [at for at, since in order.tickets.items() if now - max(since, order.progressed_at) >= limit_s]
            if late:
                detail = f"nothing has moved for {limit_s:.0f} s: {order.obstacle}"
                why = Rejection(Why.STALLED, order.model, detail, self.retry_after_s(), order.refusal)
                actions += [Refuse(number, why) for number in late if order.tickets.pop(number, None) is not None]
                if not order.tickets:
                    actions += self.abandon(order)
        return actions

    def abandon(self, order: Order) -> list[Action]:
        """Nobody of that order waits any more."""
        self._remove(order)
        return self._cancel_loads(order.model)

    def _cancel_loads(self, model: str) -> list[Action]:
        """End the loads of a model that nobody waits for any more and that have only begun."""
        cancelled: list[Action] = []
        for slot in self._slots:
            is_its_load = slot.resident.name == model and slot.stage is Stage.LOADING and slot.is_ours
            is_wanted = is_its_load and self.of(model, slot.resident.router)
            if is_its_load and not is_wanted and slot.progress < CANCEL_BELOW:
                slot.become(Stage.LEAVING)
                cancelled.append(CancelLoad(*slot.key))
        return cancelled

    def remove(self, key: Key, now: float) -> None:
        """Its process has ended."""
        if self._slots.remove(key) is not None:
            self.note_progress(key, now)
            for order in self._orders.values():
                order.victims.discard(key)

    def find(self, model: str, candidates: Iterable[Candidate], stage: Stage) -> Slot | None:
        """Where the model is in that stage, of all places where it may be."""
        for each in candidates:
            slot = self._slots.get((each.router, model))
            if slot is not None and slot.stage is stage and each.is_allowed and self._is_ready(each):
                return slot
        return None

    def _is_ready(self, candidate: Candidate) -> bool:
        return candidate.is_ready and self.is_up.get(candidate.router, True)

    def grant(self, number: int, slot: Slot, now: float) -> Grant:
        """Give a lease on a loaded model to whose demand has that number."""
        return Grant(number, self.promise(slot, now))

    def promise(self, slot: Slot, now: float) -> Lease:
        """Give a lease on a loaded model."""
        lease = Lease(self.next_number(), *slot.key)
        slot.add_lease(lease.number, now)
        return lease

    def note_progress(self, key: Key, now: float) -> None:
        """A slot has moved: who waits for it is not late."""
        for order in self._orders.values():
            if key in order.waits:
                order.progressed_at = now

    def retry_after_s(self) -> float:
        """When to come again: when those who wait now may have been served, one load after the other."""
        return min(MAX_RETRY_S, max(MIN_RETRY_S, self.typical_load_s * len(self._orders)))

    def next_number(self) -> int:
        """A number that nothing else has."""
        self._numbers += 1
        return self._numbers

    def add_slot(self, router: str, model: str, size: Mapping[str, int], now: float) -> Slot:
        """A model is being loaded."""
        is_pinned = model in self.pinned
        resident = Resident(model, size, now, now, is_pinned=is_pinned, is_loading=True, router=router)
        slot = Slot(resident, Stage.LOADING, now)
        self._slots.add(slot)
        return slot


def _demand(order: Order, candidate: Candidate) -> Demand:
    return Demand(order.model, candidate.bytes, candidate.router)
