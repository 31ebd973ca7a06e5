"""Whom to unload so that a demand fits, or why it cannot: pure decisions over one table of what is resident.

The cap on the count of models and the budgets in bytes are one mechanism: every model takes 1 of a device of its own
called `MODELS`. Of every other device a name is that of one physical device ("RAM", a PCI bus id, a UUID), and all
routers of the machine share it; `MODELS` is each router's own.

Bytes are ints, times are monotonic seconds; policy never looks at the wall clock (FAULTS.md, T1). What is not known is
absent, never 0: a budget that is not known is not enforced, and a model whose bytes on a device are not known frees
none there.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType

from llamavisor.units import format_size

MODELS = "models"
"""The device of which every model takes 1, and of which a router has `models_max`."""
MIN_RESIDENCY_S = 60.0
"""A model loaded less than so long ago leaves only when no older one will do. It never delays a demand."""
_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that takes memory now, or soon: it is loading, loaded, or on its way out.

    Attributes:
        name: the model; one name is resident at most once on one router.
        bytes: what it takes of each device. A device of which that is not known is missing.
        last_used: when it last answered somebody. Who loads a model on request has used it. One that is loaded again
            after a crash of its router keeps the time of its former life, so that the order of use survives.
        loaded_at: when it became loaded.
        reload_cost_s: how long it takes to load it again.
        in_flight: how many requests it is answering.
        leases: how many have been promised that it stays.
        is_pinned: whether a person wants it to stay.
        is_loading: whether it is still being loaded.
        is_leaving: whether it has been chosen before and is on its way out. Its bytes are not free yet.
        router: where it is.
    """

    name: str
    bytes: Mapping[str, int]
    last_used: float
    loaded_at: float
    reload_cost_s: float = 0.0
    in_flight: int = 0
    leases: int = 0
    is_pinned: bool = False
    is_loading: bool = False
    is_leaving: bool = False
    router: str = ""

    @property
    def is_busy(self) -> bool:
        """Whether somebody is being answered, or was promised to be."""
        return self.in_flight > 0 or self.leases > 0

    @property
    def idle_since(self) -> float:
        """Since when nobody has used it; a load counts as use, so that none expires as soon as it has come."""
        return max(self.last_used, self.loaded_at)


@dataclass(frozen=True, slots=True)
class Budget:
    """What the models of one router may take together.

    Attributes:
        bytes: of each device; None, like a missing device, is not known and not enforced.
        models_max: how many models of this router at once, 0 for any number.
    """

    bytes: Mapping[str, int | None]
    models_max: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """A model that is to be loaded on a router, and what it will take of each device."""

    name: str
    bytes: Mapping[str, int]
    router: str = ""

    def within(self, budget: Budget) -> Demand:
        """The same demand, with no more of any device than its whole budget: for `oversize = "fit"`."""

        def least(device: str, size: int) -> int:
            limit = budget.bytes.get(device)
            return size if limit is None else min(size, limit)

        return replace(self, bytes={device: least(device, size) for device, size in self.bytes.items()})


class Reason(Enum):
    """What stands in the way of a demand."""

    TOO_LARGE = "too_large"
    """It is larger than a device's whole budget."""
    ALL_PINNED = "all_pinned"
    """Pinned models leave no room, whoever else goes."""
    NO_ROUTER = "no_router"
    """No router may have it."""
    ALL_BUSY = "all_busy"
    """Models that are answering somebody, or have been promised to, leave no room."""
    LOADING = "loading"
    """Models that are being loaded leave no room."""
    RESERVED = "reserved"
    """The room is promised to demands that came before."""
    NOT_READY = "not_ready"
    """No router that may have it is up."""


_FINAL = frozenset({Reason.TOO_LARGE, Reason.ALL_PINNED, Reason.NO_ROUTER})


@dataclass(frozen=True, slots=True)
class Plan:
    """How a demand comes to fit.

    Attributes:
        victims: whom to unload, in order; none if there is room, or will be.
        waits_for: who is on its way out already and holds what the demand needs. More may be listed than is needed in
            the end: whether there is room now is seen by deciding again when one of them has gone.
    """

    victims: tuple[Resident, ...] = ()
    waits_for: tuple[Resident, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the victims."""
        return tuple(each.name for each in self.victims)

    @property
    def is_free(self) -> bool:
        """Whether there is room at once."""
        return not self.victims and not self.waits_for


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a demand cannot be made to fit now, by the hardest obstacle: what is final comes before what ends.

    Attributes:
        reason: what stands in the way.
        demand: what was asked for.
        device: the device that is short of room, the one with the largest lack of several; "" if that is not why.
        lacking: how many bytes (of `MODELS`: models) it lacks after everybody has gone who may.
        limit: its whole budget.
        blockers: who holds it and may not go, the most recently used last.
    """

    reason: Reason
    demand: Demand
    device: str = ""
    lacking: int = 0
    limit: int = 0
    blockers: tuple[Resident, ...] = ()

    @property
    def is_final(self) -> bool:
        """Whether waiting is pointless: only a person, or a new configuration, removes the obstacle."""
        return self.reason in _FINAL

    @property
    def text(self) -> str:
        """What stands in the way, in one line."""
        held = ", ".join(each.name for each in self.blockers)
        count = "1 model" if self.limit == 1 else f"{self.limit} models"
        room = f"room for {count}" if self.device == MODELS else f"{format_size(self.limit)} of {self.device}"
        match self.reason:
            case Reason.TOO_LARGE:
                need = format_size(self.demand.bytes.get(self.device, 0))
                why = f"needs {need} of {self.device}, and the whole budget is {format_size(self.limit)}"
            case Reason.ALL_PINNED:
                why = f"there is {room}, and what is pinned leaves too little: {held}"
            case Reason.ALL_BUSY:
                why = f"there is {room}, and who holds it is busy: {held}"
            case Reason.LOADING:
                why = f"there is {room}, and who holds it is being loaded: {held}"
            case Reason.RESERVED:
                why = f"there is {room}, and it is promised to demands that came before"
            case Reason.NO_ROUTER:
                why = "no router may have it"
            case Reason.NOT_READY:
                why = "no router that may have it is up"
        return f"model {self.demand.name}: {why}"

    @property
    def retry_when(self) -> str:
        """What has to happen before the same demand can fit."""
        names = " or ".join(each.name for each in self.blockers)
        match self.reason:
            case Reason.TOO_LARGE:
                return "raise the budget, or make the model smaller: a shorter ctx_size, fewer layers on this device"
            case Reason.ALL_PINNED:
                return f"unpin {names}"
            case Reason.ALL_BUSY:
                return f"when {names} is idle"
            case Reason.LOADING:
                return f"when {names} is loaded and idle"
            case Reason.RESERVED:
                return "when the demands before it have been met"
            case Reason.NO_ROUTER:
                return "look at `router` and `devices` of the model"
            case Reason.NOT_READY:
                return "when a router is up"


def choose(
    residents: Iterable[Resident],
    budget: Budget,
    demand: Demand,
    *,
    now: float,
    reserved: Mapping[str, int] = _NOTHING,
    min_residency_s: float = MIN_RESIDENCY_S,
    may_drain: bool = False,
) -> Plan | Refusal:
    """Whom to unload, in order, so that `demand` fits into `budget`; or why that cannot be.

    Who leaves is the least recently used first, those that are younger than `min_residency_s` after all others; at the
    same time who is loaded again sooner, then by name. Only who holds something of a device that is short is taken,
    and in the end everyone is let stay, the most valuable first, without whom the demand fits too: of the victims none
    can be left out. Never chosen: who is in flight, leased, pinned, loading, or leaving already.

    There is no weighing of size against recency. A load costs about as many seconds as the model has bytes, so what a
    byte of memory saves is the same for a large and a small model used as often, and recency alone decides. Weighing
    seconds per byte was tried (tests/bench/residency_simulation.py): 0 to 2.4 % more requests find their model loaded,
    and those for large models wait the longer for it.

    Args:
        residents: everybody on the devices, of all routers that share them; in any order.
        budget: of the router of `demand`. Only devices that the demand takes something of are looked at: what is over
            its budget elsewhere is none of its business.
        demand: what is to be loaded. If it is resident and not leaving, nothing is to be done.
        now: monotonic time in seconds.
        reserved: what has been promised of each device, and of `MODELS` of this router, to demands before this one.
        min_residency_s: how long a model counts as young.
        may_drain: also choose who is busy, after all who are idle. They are to be given no new leases and unloaded
            when they are done: so that a demand cannot be kept out for ever by models that are never idle together.
    """
    leaving: list[Resident] = []
    staying: list[Resident] = []
    former: Resident | None = None  # the same model on its way out: it must have gone, even where there is room
    for each in residents:
        if each.name == demand.name and each.router == demand.router:
            if not each.is_leaving:
                return Plan()
            former = each
        (leaving if each.is_leaving else staying).append(each)
    limits, needs = _asked(budget, demand)
    for device, limit in limits.items():
        if needs[device] > limit:
            return Refusal(Reason.TOO_LARGE, demand, device, needs[device] - limit, limit)
    going = _held(leaving, limits, demand)
    held = _held(staying, limits, demand)
    over = {device: held[device] + need + reserved.get(device, 0) - limits[device] for device, need in needs.items()}
    lacking = _above_zero(over)
    short = _above_zero({device: more + going[device] for device, more in over.items()})
    waiting = (each for each in leaving if each is former or _holds(each, short, demand))
    waits_for = tuple(sorted(waiting, key=_by_recency))
    if not lacking:
        return Plan((), waits_for)
    victims = _pick(staying, lacking, demand, young_since=now - min_residency_s, may_drain=may_drain, is_all=True)
    if victims is None:
        return _refusal(staying, lacking, limits, demand, reserved, may_drain=may_drain)
    return Plan(victims, waits_for)


def relieve(
    residents: Iterable[Resident], lacking: Mapping[str, int], *, now: float, min_residency_s: float = MIN_RESIDENCY_S
) -> tuple[Resident, ...]:
    """Whom to unload, in order, so that so much of each device comes free; all who may leave if that is not enough.

    For when memory is short although nobody demands any: under pressure, or after a budget was lowered. Who is leaving
    is the caller's to subtract from `lacking`. The order, and who is never chosen, are those of `choose`.
    """
    nobody = Demand("", _NOTHING)
    wanted = {device: lack for device, lack in lacking.items() if lack > 0}
    staying = [each for each in residents if not each.is_leaving]
    return _pick(staying, wanted, nobody, young_since=now - min_residency_s, may_drain=False, is_all=False) or ()


def expired(
    residents: Iterable[Resident], *, now: float, ttl_of: Callable[[Resident], float | None]
) -> tuple[Resident, ...]:
    """Who has been idle for longer than its ttl, the longest idle first.

    Never who is pinned, busy, loading or leaving. A load counts as use here.

    Args:
        residents: everybody, in any order.
        now: monotonic time in seconds.
        ttl_of: the ttl of a model in seconds, None for never.
    """
    late = [
        each
        for each in residents
        if _may_leave(each, may_drain=False) and (ttl_s := ttl_of(each)) is not None and now - each.idle_since > ttl_s
    ]
    return tuple(sorted(late, key=lambda each: (each.idle_since, each.name, each.router)))


def _asked(budget: Budget, demand: Demand) -> tuple[dict[str, int], dict[str, int]]:
    """Of each device that counts: its budget, and what the demand takes."""
    limits: dict[str, int] = {}
    needs: dict[str, int] = {}
    if budget.models_max > 0:
        limits[MODELS], needs[MODELS] = budget.models_max, 1
    for device, size in demand.bytes.items():
        limit = budget.bytes.get(device)
        if limit is not None and size > 0:
            limits[device], needs[device] = limit, size
    return limits, needs


def _size(each: Resident, device: str, demand: Demand) -> int:
    """What it holds of a device, as the router of the demand counts it."""
    if device == MODELS:
        return 1 if each.router == demand.router else 0
    return each.bytes.get(device, 0)


def _holds(each: Resident, devices: Iterable[str], demand: Demand) -> bool:
    """Whether it holds anything of one of the devices."""
    return any(_size(each, device, demand) > 0 for device in devices)


def _held(residents: Iterable[Resident], devices: Iterable[str], demand: Demand) -> dict[str, int]:
    """What they hold together of each of the devices."""
    held = dict.fromkeys(devices, 0)
    for each in residents:
        if MODELS in held:
            held[MODELS] += _size(each, MODELS, demand)
        for device, size in each.bytes.items():
            if device in held:
                held[device] += size
    return held


def _above_zero(sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of the sizes that are."""
    return {device: size for device, size in sizes.items() if size > 0}


def _may_leave(each: Resident, *, may_drain: bool) -> bool:
    """Whether it may be chosen."""
    if each.is_pinned or each.is_loading or each.is_leaving:
        return False
    return may_drain or not each.is_busy


def _pick(
    staying: list[Resident],
    lacking: Mapping[str, int],
    demand: Demand,
    *,
    young_since: float,
    may_drain: bool,
    is_all: bool,
) -> tuple[Resident, ...] | None:
    """Who leaves so that what is lacking comes free; if `is_all` of it cannot, None."""
    # A heap, because of a thousand only the first few are taken. The index decides last: residents have no order.
    heap = [
        (each.is_busy, each.loaded_at > young_since, each.last_used, each.reload_cost_s, each.name, each.router, at)
        for at, each in enumerate(staying)
        if _may_leave(each, may_drain=may_drain)
    ]
    heapq.heapify(heap)
    taken: list[Resident] = []
    short = dict(lacking)
    while short and heap:
        each = staying[heapq.heappop(heap)[-1]]
        if _holds(each, short, demand):
            taken.append(each)
            short = {device: rest for device, lack in short.items() if (rest := lack - _size(each, device, demand)) > 0}
    if short and is_all:
        return None
    # How much more than is lacking would come free; less than nothing where there is still a lack.
    spare = {device: size - lacking[device] for device, size in _held(taken, lacking, demand).items()}
    kept: list[Resident] = []
    for each in reversed(taken):
        freed = _above_zero({device: _size(each, device, demand) for device in spare})
        if all(size <= spare[device] for device, size in freed.items()):
            for device, size in freed.items():
                spare[device] -= size
        else:
            kept.append(each)
    return tuple(reversed(kept))


def _refusal(
    staying: list[Resident],
    lacking: Mapping[str, int],
    limits: Mapping[str, int],
    demand: Demand,
    reserved: Mapping[str, int],
    *,
    may_drain: bool,
) -> Refusal:
    """What stands in the way, given that all who may leave are not enough."""

    def without(short: Mapping[str, int], gone: Iterable[Resident]) -> dict[str, int]:
        held = _held(gone, short, demand)
        return _above_zero({device: lack - held[device] for device, lack in short.items()})

    def refusal(reason: Reason, lack: Mapping[str, int], blockers: Iterable[Resident]) -> Refusal:
        worst = max(lack, key=lambda device: (lack[device] / max(limits[device], 1), device))
        holders = sorted((each for each in blockers if _holds(each, lack, demand)), key=_by_recency)
        return Refusal(reason, demand, worst, lack[worst], limits[worst], tuple(holders))

    short = without(lacking, (each for each in staying if _may_leave(each, may_drain=may_drain)))
    stuck = [each for each in staying if not _may_leave(each, may_drain=may_drain)]
    pinned = [each for each in stuck if each.is_pinned]
    loading = [each for each in stuck if each.is_loading and not each.is_pinned]
    busy = [each for each in stuck if not each.is_pinned and not each.is_loading]
    rest = without(short, (*busy, *loading))
    # 1. Pinned models leave too little, whoever else goes and whatever becomes of what is promised to others.
    if forever := _above_zero({device: lack - reserved.get(device, 0) for device, lack in rest.items()}):
        return refusal(Reason.ALL_PINNED, forever, pinned)
    # 2. Neither the end of requests nor that of loads is enough: what is promised to others is too much.
    if rest:
        return refusal(Reason.RESERVED, rest, ())
    # 3. The end of requests is enough. 4. The end of loads is. 5. It takes both.
    if not without(short, busy):
        return refusal(Reason.ALL_BUSY, short, busy)
    if not without(short, loading):
        return refusal(Reason.LOADING, short, loading)
    return refusal(Reason.ALL_BUSY, short, (*busy, *loading))


def _by_recency(each: Resident) -> tuple[float, str, str]:
    return (each.last_used, each.name, each.router)
