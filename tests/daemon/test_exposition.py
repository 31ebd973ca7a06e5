"""The metrics port when it cannot be had."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from aiohttp import web

from llamavisor.events import Bus
from llamavisord import app
from llamavisord.daemon import Daemon
from llamavisord.exposition import Exposition

pytestmark = pytest.mark.anyio


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "why"), [("127.0.0.1", "address already in use"), ("a..b", "not a name of a host"), ("x.invalid", "")]
)
async def test_tries_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, taken: int, host: str, why: str) -> None:
    """An address that cannot be listened on is a warning, told once, and tried again without heaping anything up."""
    runners: list[web.AppRunner] = []

    class Runner(web.AppRunner):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            runners.append(self)

    tries = 0

    class Site(web.TCPSite):
        async def start(self) -> None:
            nonlocal tries
            tries += 1
            await super().start()

    monkeypatch.setattr(web, "AppRunner", Runner)
    monkeypatch.setattr(web, "TCPSite", Site)
    monkeypatch.setattr(app, "METRICS_RETRY_S", 0.01)
    told: list[str] = []
    bus = Bus()
    bus.listen(lambda published: told.append(published.event.message()))
    metrics = SimpleNamespace(host=host, port=taken)
    daemon = SimpleNamespace(config=SimpleNamespace(metrics=metrics), bus=bus, metrics_error=None)
    exposition = SimpleNamespace(app=web.Application)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app._serve_metrics, cast("Daemon", daemon), cast("Exposition", exposition))
        with anyio.fail_after(10):
            while tries < 5:
                await anyio.sleep(0.01)
        assert len(runners[0].sites) <= 1
        tasks.cancel_scope.cancel()
    assert len(told) == 1
    assert f"{host}:{taken}" in told[0]
    assert why in told[0].lower()
