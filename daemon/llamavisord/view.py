"""Routers as the control API shows them."""

from __future__ import annotations

import time
from typing import Any

import anyio

from llamavisor.capacity import Capacity
from llamavisor.gauge import RAM_ID
from llamavisor.router import Router
from llamavisor.states import RouterState
from llamavisord.inventory import counts

LOG_LINES = 20
"""How many of the last lines a router that does not serve shows."""


def router_view(router: Router, capacity: Capacity) -> dict[str, Any]:
    """One router; times are Unix seconds, durations seconds, sizes bytes."""
    now = anyio.current_time()
    # What llama-server printed last explains its own end, not an obstacle that we saw before it was started.
    is_down = router.state in {RouterState.FAILED, RouterState.BACKOFF}
    explains = is_down and router.comeback.verdict is not None and not router.comeback.verdict.is_obstacle
    found = router.launch.found if router.launch is not None else None
    return {
        "name": router.name,
        "state": router.state.value,
        "since_unix": unix_time(router.since),
        "url": router.url,
        "pid": router.process.pid if router.process is not None else None,
        "reason": router.reason,
        "hint": router.hint,
        "failures": router.comeback.history.failures,
        "crash_loop": router.comeback.history.is_crash_loop,
        "restarts": router.restarts,
        "retry_in_s": max(0.0, router.comeback.retry_at - now) if router.comeback.retry_at is not None else None,
        "models_max": router.settings.models_max,
        "models_dir": str(router.settings.models_dir),
        **counts(router),
        "devices": _devices(router, capacity),
        "llama_server": str(found.path) if found is not None else router.settings.llama_server,
        "build": found.version if found is not None else None,
        "log_file": str(router.output.path),
        "log_tail": router.output.tail(LOG_LINES) if explains else [],
    }


def _devices(router: Router, capacity: Capacity) -> list[dict[str, Any]] | None:
    """RAM, then the GPUs that it sees, as it calls them: what its models may take of each. None while nobody can say.

    Another router may see others, call the same otherwise, and take more or less of it.
    """
    if not capacity.knows(router.name):
        return None
    limits = capacity.limits(router.settings)
    places = [(RAM_ID, RAM_ID), *((device.id, device.name) for device in capacity.devices_of(router.name))]
    return [{"id": place, "name": name, "budget_bytes": limits[place].bytes} for place, name in places]


def unix_time(then: float) -> float:
    """A monotonic time of the past as Unix seconds, right for as long as nobody sets the clock."""
    return time.time() - (anyio.current_time() - then)
