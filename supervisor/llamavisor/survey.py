"""Looks at all that is known of memory and says it as a snapshot; and what would happen if a model were asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from llamavisor.admission import Admission
from llamavisor.appraisals import Appraisals
from llamavisor.capacity import Capacity
from llamavisor.demands import Order, Rejection
from llamavisor.eviction import Refusal, Resident
from llamavisor.gauge import RAM_ID
from llamavisor.occupancy import DeviceUse, Forecast, Occupancy, Occupant, Quarantined, Queue
from llamavisor.placement import Candidate
from llamavisor.router import Router
from llamavisor.slots import Slot, Stage
from llamavisor.states import ModelState

_STATES = {
    Stage.LOADING: "loading",
    Stage.LOADED: "loaded",
    Stage.DRAINING: "draining",
    Stage.LEAVING: "unloading",
}


def survey(
    routers: Mapping[str, Router],
    admission: Admission,
    appraisals: Appraisals,
    capacity: Capacity,
    *,
    is_enforced: bool,
    strain: str,
    now: float,
) -> Occupancy:
    """All of it at this moment."""
    slots = admission.slots()
    occupants = [
        _occupant(slot, routers.get(slot.resident.router), appraisals, is_enforced=is_enforced) for slot in slots
    ]
    quarantined = [
        Quarantined(router=each.router, model=each.model, until=each.until, failures=each.failures, reason=each.reason)
        for each in (admission.quarantined(now) if is_enforced else ())
    ]
    return Occupancy(
        occupants=tuple(sorted(occupants, key=lambda each: (each.router, each.model))),
        devices=tuple(_devices(routers.values(), slots, appraisals, capacity)),
        queues=tuple(_queues(admission.orders)),
        is_enforced=is_enforced,
        strain=strain,
        pinned=tuple(sorted(admission.pinned)),
        quarantined=tuple(sorted(quarantined, key=lambda each: (each.model, each.router))),
    )


def ttl_of(router: Router | None, model: str) -> float | None:
    """After how many idle seconds a model is unloaded, None for never."""
    spec = router.shelf.spec(model) if router is not None else None
    return spec.ttl_s if spec is not None else None


def forecast(model: str, admission: Admission, candidates: Sequence[Candidate], now: float) -> Forecast:
    """What would happen if the model were asked for now, before all who wait."""
    usable, outcome = admission.what_if(model, candidates, now)
    if isinstance(outcome, Rejection):
        needed = dict(outcome.refusal.demand.bytes) if outcome.refusal is not None else {}
        hint = outcome.refusal.retry_when if outcome.refusal is not None else ""
        if outcome.retry_after_s is not None:
            hint = f"it may be tried again in {outcome.retry_after_s:.0f} s"
        return Forecast(model=model, router=None, needed=needed, refusal=outcome.detail, hint=hint)
    if isinstance(outcome, Refusal):
        text = outcome.text.removeprefix(f"model {model}: ")
        needed = dict(outcome.demand.bytes)
        router = outcome.demand.router or None
        return Forecast(model=model, router=router, needed=needed, refusal=text, hint=outcome.retry_when)
    here = {slot.key for slot in admission.slots() if not slot.resident.is_leaving}
    chosen = next(each for each in usable if each.router == outcome.router)
    return Forecast(
        model=model,
        router=outcome.router,
        is_resident=(outcome.router, model) in here,
        victims=_keys(outcome.plan.victims),
        waits_for=_keys(outcome.plan.waits_for),
        needed=dict(chosen.bytes),
    )


def _queues(orders: Sequence[Order]) -> list[Queue]:
    """Who waits for each model, on whichever router; what is told of an obstacle is that of the first."""
    queues: dict[str, Queue] = {}
    for each in orders:
        before = queues.get(each.model)
        queues[each.model] = (
            Queue(model=each.model, demands=len(each.tickets), since=each.since, obstacle=each.obstacle)
            if before is None
            else replace(before, demands=before.demands + len(each.tickets))
        )
    return list(queues.values())


def _keys(residents: Sequence[Resident]) -> tuple[tuple[str, str], ...]:
    return tuple((each.router, each.name) for each in residents)


def _occupant(slot: Slot, router: Router | None, appraisals: Appraisals, *, is_enforced: bool) -> Occupant:
    resident, key = slot.resident, slot.key
    model = router.table.get(resident.name) if router is not None else None
    appraisal = appraisals.get(key)
    ttl_s = ttl_of(router, resident.name)
    is_loaded = not resident.is_loading
    is_idle = slot.stage is Stage.LOADED and not resident.is_busy and not resident.is_pinned
    is_asleep = model is not None and model.state is ModelState.SLEEPING
    used_at = resident.last_used if is_loaded and resident.last_used > resident.loaded_at else None
    return Occupant(
        router=resident.router,
        model=resident.name,
        state="sleeping" if is_asleep else _STATES[slot.stage],
        expected=dict(resident.bytes),
        source=appraisal.footprint.source.value if appraisal is not None else "",
        growth_bytes=appraisal.footprint.growth_bytes if appraisal is not None else 0,
        measured=appraisals.measured(key),
        # Leases are exact; what a model says of itself is some seconds old, and counts those who have none.
        in_flight=len(slot.leases) if is_enforced else model.in_flight if model is not None else None,
        leases=len(slot.leases),
        used_at=used_at,
        loaded_at=resident.loaded_at if is_loaded else None,
        ttl_s=ttl_s,
        expires_at=resident.idle_since + ttl_s if ttl_s is not None and is_idle else None,
        is_pinned=resident.is_pinned,
        n_ctx=model.n_ctx if model is not None else None,
        n_ctx_asked=appraisal.n_ctx if appraisal is not None else None,
        is_ctx_ours=appraisal.is_ctx_ours if appraisal is not None else False,
    )


def _devices(
    routers: Collection[Router], slots: Sequence[Slot], appraisals: Appraisals, capacity: Capacity
) -> list[DeviceUse]:
    """RAM, then every GPU that a router sees or that there is."""
    names: dict[str, list[str]] = {}
    budgets: dict[str, tuple[int | None, bool]] = {}
    for router in routers:
        for device in capacity.devices_of(router.name):
            if device.name not in names.setdefault(device.id, []):
                names[device.id].append(device.name)
        for device_id, limit in capacity.limits(router.settings).items():
            known = budgets.get(device_id)
            # Routers that share a device may have budgets of their own: the smallest is met first.
            if known is None or (limit.bytes is not None and (known[0] is None or limit.bytes < known[0])):
                budgets[device_id] = limit.bytes, limit.is_auto
    readings = capacity.meter.readings
    found = []
    for device_id in dict.fromkeys([RAM_ID, *readings, *budgets]):
        reading = readings.get(device_id)
        budget, is_auto = budgets.get(device_id, (None, True))
        measured = [size for slot in slots if (size := appraisals.measured(slot.key).get(device_id)) is not None]
        found.append(
            DeviceUse(
                id=device_id,
                name=_name(device_id, names.get(device_id, []), reading.device.name if reading else ""),
                total_bytes=reading.total_bytes if reading else None,
                used_bytes=reading.used_bytes if reading else None,
                free_bytes=reading.free_bytes if reading else None,
                budget_bytes=budget,
                is_auto=is_auto,
                expected_bytes=sum(slot.resident.bytes.get(device_id, 0) for slot in slots),
                measured_bytes=sum(measured) if measured else None,
                reason=reading.reason if reading else "it has not been read yet",
            )
        )
    return found


def _name(device_id: str, names: Sequence[str], product: str) -> str:
    if device_id == RAM_ID:
        return RAM_ID
    short = "/".join(names) or device_id
    return f"{short} ({product})" if product and product != short else short
