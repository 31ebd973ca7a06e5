"""Memory as the control API shows it: who takes how much of which device, who waits, and who would make room."""

from __future__ import annotations

from typing import Any

import anyio

from llamavisor.occupancy import DeviceUse, Forecast, Occupancy, Occupant, Quarantined, Queue
from llamavisord.view import unix_time


def memory_view(occupancy: Occupancy) -> dict[str, Any]:
    """The devices with their budgets, and how it stands about them; sizes are bytes, what is unknown is None."""
    return {
        "devices": [_device(each, occupancy) for each in occupancy.devices],
        "enforced": occupancy.is_enforced,
        "strain": occupancy.strain or None,
        "pinned": list(occupancy.pinned),
    }


def ps_view(occupancy: Occupancy) -> dict[str, Any]:
    """Who takes memory and who waits for it; times are Unix seconds, durations seconds, sizes bytes by device."""
    return {
        "models": [_occupant(each) for each in occupancy.occupants],
        **memory_view(occupancy),
        "queues": [_queue(each) for each in occupancy.queues],
        "quarantined": [_quarantined(each) for each in occupancy.quarantined],
    }


def forecast_view(forecast: Forecast, occupancy: Occupancy) -> dict[str, Any]:
    """What would happen if a model were asked for, with what is known of those who would leave for it."""
    known = {(each.router, each.model): each for each in occupancy.occupants}

    def show(router: str, model: str) -> dict[str, Any]:
        # It may have gone while the forecast was made.
        return _occupant(known.get((router, model)) or Occupant(router=router, model=model, state="unloaded"))

    return {
        "model": forecast.model,
        "router": forecast.router,
        "resident": forecast.is_resident,
        "victims": [show(*each) for each in forecast.victims],
        "waits_for": [show(*each) for each in forecast.waits_for],
        "needed_bytes": dict(forecast.needed),
        "refusal": forecast.refusal or None,
        "hint": forecast.hint or None,
        **memory_view(occupancy),
    }


def memory_warnings(occupancy: Occupancy) -> list[str]:
    """What a person should know of memory although models answer, one line for each."""
    strain = [f"no model is loaded for now: {occupancy.strain}"] if occupancy.strain else []
    return strain + [
        f"model {each.model} has {each.n_ctx} tokens of context on {each.router} and was to have {each.n_ctx_asked}:"
        " llama.cpp shortens it when memory is short"
        for each in occupancy.occupants
        if each.n_ctx is not None and each.n_ctx_asked is not None and each.n_ctx < each.n_ctx_asked
    ]


def models_bytes(device: DeviceUse, occupancy: Occupancy) -> int | None:
    """What models take of a device: as measured, else as expected, else nothing if none can be on it."""
    if device.measured_bytes is not None:
        return device.measured_bytes
    if device.expected_bytes:
        return device.expected_bytes
    taken = [{*each.expected, *each.measured} for each in occupancy.occupants]
    return 0 if all(ids and device.id not in ids for ids in taken) else None


def others_bytes(device: DeviceUse, of_models: int | None) -> int | None:
    """What is taken of a device besides; models that are not measured yet may not be in what is taken."""
    is_measured = device.measured_bytes is not None or of_models == 0
    if device.used_bytes is None or of_models is None or not is_measured:
        return None
    return max(0, device.used_bytes - of_models)


def _occupant(occupant: Occupant) -> dict[str, Any]:
    return {
        "model": occupant.model,
        "router": occupant.router,
        "state": occupant.state,
        "expected_bytes": dict(occupant.expected),
        "expected_from": occupant.source or None,
        "growth_bytes": occupant.growth_bytes,
        "measured_bytes": dict(occupant.measured),
        "in_flight": occupant.in_flight,
        "leases": occupant.leases,
        "used_unix": _unix(occupant.used_at),
        "loaded_unix": _unix(occupant.loaded_at),
        "idle_s": _idle_s(occupant),
        "ttl_s": occupant.ttl_s,
        "ttl_left_s": _left_s(occupant.expires_at),
        "expires_unix": _unix(occupant.expires_at),
        "pinned": occupant.is_pinned,
        "n_ctx": occupant.n_ctx,
        "n_ctx_asked": occupant.n_ctx_asked,
        "n_ctx_ours": occupant.is_ctx_ours,
    }


def _quarantined(quarantined: Quarantined) -> dict[str, Any]:
    return {
        "model": quarantined.model,
        "router": quarantined.router,
        "failures": quarantined.failures,
        "reason": quarantined.reason,
        "left_s": max(0.0, quarantined.until - anyio.current_time()),
        "until_unix": unix_time(quarantined.until),
    }


def _device(device: DeviceUse, occupancy: Occupancy) -> dict[str, Any]:
    of_models = models_bytes(device, occupancy)
    return {
        "id": device.id,
        "name": device.name,
        "total_bytes": device.total_bytes,
        "used_bytes": device.used_bytes,
        "free_bytes": device.free_bytes,
        "budget_bytes": device.budget_bytes,
        "budget_auto": device.is_auto,
        "expected_bytes": device.expected_bytes,
        "measured_bytes": device.measured_bytes,
        "models_bytes": of_models,
        "others_bytes": others_bytes(device, of_models),
        "reason": device.reason or None,
    }


def _queue(queue: Queue) -> dict[str, Any]:
    return {
        "model": queue.model,
        "demands": queue.demands,
        "since_unix": unix_time(queue.since),
        "waiting_s": max(0.0, anyio.current_time() - queue.since),
        "obstacle": queue.obstacle,
    }


def _idle_s(occupant: Occupant) -> float | None:
    """For how long nobody has used it; a load counts as use. None while it is not loaded."""
    if occupant.loaded_at is None:
        return None
    if occupant.in_flight:
        return 0.0
    return max(0.0, anyio.current_time() - max(occupant.loaded_at, occupant.used_at or occupant.loaded_at))


def _left_s(then: float | None) -> float | None:
    return None if then is None else max(0.0, then - anyio.current_time())


def _unix(then: float | None) -> float | None:
    return None if then is None else unix_time(then)
