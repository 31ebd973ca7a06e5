"""On which router a model is loaded: where it is already, else where least is lost.

Pure, like `eviction`, which is asked about every router; here only the answers are compared. Devices are physical, and
one table holds the residents of all routers: two routers on one card see each other's bytes, and room for a model on
the one may be made by unloading another from its neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llamavisor.eviction import (
    MIN_RESIDENCY_S,
    MODELS,
    Budget,
    Demand,
    Plan,
    Reason,
    Refusal,
    Resident,
    choose,
)
from llamavisor.gauge.device import RAM_ID as RAM

SOFTEN_S = 60.0
"""Added to the time a model has been idle: one that was used this instant is dear, but not priceless."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A router that might take the model.

    Attributes:
        router: its name.
        budget: of its models.
        bytes: what the model would take there of each physical device. Routers differ: each has cards of its own.
        devices: on which the model may be there; None for all. `RAM` is always allowed.
        is_ready: whether the router is up, and lists the model.
        is_open: whether it may load anything: one that waits for its restart may only be used.
    """

    router: str
    budget: Budget
    bytes: Mapping[str, int]
    devices: frozenset[str] | None = None
    is_ready: bool = True
    is_open: bool = True

    @property
    def is_allowed(self) -> bool:
        """Whether all that the model would take there is of devices that it may have."""
        taken = {device for device, size in self.bytes.items() if size > 0}
        return self.devices is None or taken <= self.devices | {RAM}


@dataclass(slots=True)
class Reserved:
    """What is promised to demands that came before, added up: it is looked at with every candidate.

    Attributes:
        bytes: of each device, by whatever router.
        models: how many, by router.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)

    def for_router(self, router: str) -> dict[str, int]:
        """As eviction wants it for a demand on that router."""
        return {**self.bytes, MODELS: self.models.get(router, 0)}


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the model is, or is to be loaded.

    Attributes:
        router: the router.
        plan: how there comes to be room; empty where the model is loaded, or being loaded, already.
    """

    router: str
    plan: Plan


def place(
    name: str,
    candidates: Sequence[Candidate],
    residents: Sequence[Resident],
    *,
    now: float,
    router: str | None = None,
    reserved: Reserved | None = None,
    min_residency_s: float = MIN_RESIDENCY_S,
    may_drain: bool = False,
) -> Choice | Refusal:
    """Where a model is used, and who has to leave for it; or why it can be nowhere.

    1. Where it is loaded; if it is not, where it is being loaded.
    2. Else where there is room at once. Then where there will be without anybody's being chosen. Then where the
       eviction costs least (`loss`). Of equals the first candidate: routers are filled in their order, which leaves
       large holes for large models on the later ones.
    3. If all refuse, the refusal that ends soonest by itself: to wait for one router is better than to be refused by
       another. A router that is not up is waited for only if none that is up will ever have room.

    Args:
        name: the model.
        candidates: the routers, in the order of preference.
        residents: of all routers that share devices with the candidates, each naming its own; in any order.
        now: monotonic time in seconds.
        router: the only router on which the model may be, if its `router` says so.
        reserved: what is promised to demands that came before.
        min_residency_s: as for `eviction.choose`.
        may_drain: likewise.
    """
    allowed = [each for each in candidates if each.router == (router or each.router) and each.is_allowed]
    if not allowed:
        return Refusal(Reason.NO_ROUTER, Demand(name, {}, router or ""))
    ready = [each for each in allowed if each.is_ready]
    there = {each.router: each for each in residents if each.name == name and not each.is_leaving}
    if found := [each for each in ready if each.router in there]:
        return Choice(min(found, key=lambda each: there[each.router].is_loading).router, Plan())
    choices: list[Choice] = []
    opened = [each for each in ready if each.is_open]
    refusals = [_closed(name, each) for each in allowed if each not in opened]
    for each in opened:
        outcome = choose(
            residents,
            each.budget,
            Demand(name, each.bytes, each.router),
            now=now,
            reserved=reserved.for_router(each.router) if reserved is not None else {},
            min_residency_s=min_residency_s,
            may_drain=may_drain,
        )
        if isinstance(outcome, Plan):
            choices.append(Choice(each.router, outcome))
        else:
            refusals.append(outcome)
    if choices:  # min and max keep the first of equals
        return min(choices, key=lambda choice: (loss(choice.plan, now=now), not choice.plan.is_free))
    return max(refusals, key=lambda refusal: _HOPE.index(refusal.reason))


def _closed(name: str, candidate: Candidate) -> Refusal:
    """Why a router that is not up, or may load nothing, is no choice: it is waited for only if it could have room."""
    demand = Demand(name, candidate.bytes, candidate.router)
    outcome = choose((), candidate.budget, demand, now=0.0)
    return outcome if isinstance(outcome, Refusal) else Refusal(Reason.NOT_READY, demand)


def loss(plan: Plan, *, now: float) -> float:
    """What a plan is expected to cost, in seconds of loading per second: the sum of reload_cost_s / (idle_s + 60 s).

    A victim costs its reload once it is asked for again. How often that will be nobody knows; all that is known of a
    model that has been idle for t seconds is that it was used once in so long, so 1/t is the guess at its rate, the
    same that makes LRU sensible. Rate times cost is the loss to be expected. The 60 s (`SOFTEN_S`) keep the guess
    finite for who was used just now. Who waits for others to go loses nothing of worth.
    """
    return sum(each.reload_cost_s / (max(now - each.last_used, 0.0) + SOFTEN_S) for each in plan.victims)


_HOPE = (
    Reason.NO_ROUTER,
    Reason.TOO_LARGE,
    Reason.ALL_PINNED,
    Reason.NOT_READY,
    Reason.RESERVED,
    Reason.LOADING,
    Reason.ALL_BUSY,
)
"""Refusals, the most hopeless first."""
