"""Routers and models as the control API shows them."""

from __future__ import annotations

import time
from typing import Any

import anyio

from llamavisor.fleet import Fleet
from llamavisor.models import Model
from llamavisor.router import Router
from llamavisor.states import RouterState

LOG_LINES = 20
"""How many of the last lines a router that does not serve shows."""


def router_view(router: Router) -> dict[str, Any]:
    """One router; times are Unix seconds, durations seconds."""
    now = anyio.current_time()
    # What llama-server printed last explains its own end, not an obstacle that we saw before it was started.
    is_down = router.state in {RouterState.FAILED, RouterState.BACKOFF}
    explains = is_down and router.verdict is not None and not router.verdict.is_obstacle
    found = router.launch.found if router.launch is not None else None
    return {
        "name": router.name,
        "state": router.state.value,
        "since_unix": unix_time(router.since),
        "url": router.settings.url,
        "pid": router.process.pid if router.process is not None else None,
        "reason": router.reason,
        "hint": router.hint,
        "failures": router.history.failures,
        "crash_loop": router.history.is_crash_loop,
        "restarts": router.restarts,
        "retry_in_s": max(0.0, router.retry_at - now) if router.retry_at is not None else None,
        "models_max": router.settings.models_max,
        "models_dir": str(router.settings.models_dir),
        "llama_server": str(found.path) if found is not None else router.settings.llama_server,
        "build": found.version if found is not None else None,
        "log_file": str(router.output.path),
        "log_tail": router.output.tail(LOG_LINES) if explains else [],
    }


def model_view(router: Router, model: Model) -> dict[str, Any]:
    """One model on one router; times are Unix seconds, sizes bytes, the context tokens."""
    return {
        "name": model.name,
        "router": router.name,
        "state": model.state.value,
        "stage": model.stage,
        "progress": model.progress,
        "pid": model.pid,
        "port": model.port,
        "since_unix": unix_time(model.since),
        "error": model.error,
        "path": str(model.path) if model.path is not None else None,
        "n_ctx": model.n_ctx,
        "size_bytes": model.size_bytes,
    }


def models_view(fleet: Fleet) -> list[dict[str, Any]]:
    """Every model on every router, by name."""
    pairs = [(router, model) for router in fleet for model in router.table]
    pairs.sort(key=lambda pair: (pair[1].name, pair[0].name))
    return [model_view(router, model) for router, model in pairs]


def unix_time(then: float) -> float:
    """A monotonic time of the past as Unix seconds, right for as long as nobody sets the clock."""
    return time.time() - (anyio.current_time() - then)
