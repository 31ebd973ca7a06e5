"""A request that has ended, for tests of what is told of it."""

from __future__ import annotations

from typing import Any

from llamavisor.events import RequestEnded, RequestOutcome


def ended(**changes: Any) -> RequestEnded:
    """A request for alpha that was answered, and what `changes` says of it."""
    told: dict[str, Any] = {
        "route": "chat/completions",
        "model": "alpha",
        "router": "main",
        "client": None,
        "key": None,
        "status": 200,
        "outcome": RequestOutcome.OK,
        "queue_s": 0.0,
        "load_s": 0.0,
        "first_data_s": 0.25,
        "duration_s": 1.5,
        "retries": 0,
        "bytes_in": 10,
        "bytes_out": 20,
        "tokens_in": None,
        "tokens_out": None,
        "is_stream": False,
    }
    return RequestEnded(**told | changes)
