"""The metrics port when it cannot be had, and what metrics say of memory."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from prometheus_client import generate_latest

from daemon.stage import Stage, entry
from fakes.request import ended
from llamavisor.events import (
    Bus,
    DemandMet,
    DemandRefused,
    MemoryKill,
    MemoryUnreclaimed,
    ModelQuarantined,
    ModelUnloaded,
    UnloadReason,
)
from llamavisor.gauge import Pressure
from llamavisor.occupancy import DeviceUse, Occupancy, Occupant, Queue
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
    ("host", "why"), [("127.0.0.1", "address already in use"), ("é..b", "not a name of a host"), ("x.invalid", "")]
)
async def test_tries_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, taken: int, host: str, why: str) -> None:
    """An address that cannot be listened on is a warning, told once, and tried again without heaping anything up."""
    tries, listen = 0, anyio.create_tcp_listener

    async def count(**address: Any) -> object:
        nonlocal tries
        tries += 1
        return await listen(**address)

    monkeypatch.setattr(anyio, "create_tcp_listener", count)
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
        tasks.cancel_scope.cancel()
    assert len(told) == 1
    assert f"{host}:{taken}" in told[0]
    assert why in told[0].lower()


# --- memory -----------------------------------------------------------------------------------------------------------


OCCUPANCY = Occupancy(
    occupants=(
        Occupant(
            router="main",
            model="alpha",
            state="loaded",
            expected={"RAM": 100, "GPU-1": 2000},
            measured={"RAM": 90},
            is_pinned=True,
        ),
        Occupant(router="main", model="beta", state="loading"),
    ),
    devices=(
        DeviceUse(
            id="RAM",
            name="RAM",
            total_bytes=1000,
            used_bytes=400,
            free_bytes=600,
            budget_bytes=800,
            is_auto=True,
            expected_bytes=100,
            measured_bytes=90,
        ),
        DeviceUse(
            id="GPU-1",
            name="CUDA0 (H200)",
            total_bytes=None,
            used_bytes=None,
            free_bytes=None,
            budget_bytes=3000,
            is_auto=False,
            expected_bytes=2000,
            measured_bytes=None,
            reason="it hangs",
        ),
    ),
    queues=(Queue(model="gamma", demands=3, since=0.0, obstacle="waited for alpha"),),
    is_enforced=True,
    strain="RAM is short",
)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage with the models alpha and beta and the memory of `OCCUPANCY`."""
    stage = Stage(tmp_path)
    stage.put(entry("alpha"), entry("beta"))
    monkeypatch.setattr(stage.fleet.memory, "occupancy", lambda: OCCUPANCY, raising=False)
    return stage


def series(exposition: Exposition, *prefixes: str) -> list[str]:
    """The lines about metrics of which the names begin so, without those that explain them."""
    exposition._forget_vanished()  # as every scrape does
    lines = generate_latest(exposition.registry).decode().splitlines()
    return sorted(line for line in lines if line.startswith(tuple(f"llamavisor_{each}" for each in prefixes)))


@pytest.mark.usefixtures("virtual_time")
async def test_metrics_tell_what_takes_memory_now(stage: Stage) -> None:
    """Per device and model; a number that is not known has no series, and is no zero."""
    async with stage.running(stage.config(("main", "a"))) as daemon:
        shown = series(Exposition(daemon), "device_", "model_resident", "model_pinned", "demands_waiting", "memory_str")
    assert shown == [
        'llamavisor_demands_waiting{model="gamma"} 3.0',
        'llamavisor_device_budget_bytes{device="GPU-1",name="CUDA0 (H200)"} 3000.0',
        'llamavisor_device_budget_bytes{device="RAM",name="RAM"} 800.0',
        'llamavisor_device_free_bytes{device="RAM",name="RAM"} 600.0',
        'llamavisor_device_others_bytes{device="RAM",name="RAM"} 310.0',
        'llamavisor_device_total_bytes{device="RAM",name="RAM"} 1000.0',
        'llamavisor_device_used_bytes{device="RAM",name="RAM"} 400.0',
        "llamavisor_memory_strained 1.0",
        'llamavisor_model_pinned{model="alpha",router="main"} 1.0',
        'llamavisor_model_pinned{model="beta",router="main"} 0.0',
        'llamavisor_model_resident_bytes{device="GPU-1",kind="expected",model="alpha",router="main"} 2000.0',
        'llamavisor_model_resident_bytes{device="RAM",kind="expected",model="alpha",router="main"} 100.0',
        'llamavisor_model_resident_bytes{device="RAM",kind="measured",model="alpha",router="main"} 90.0',
    ]


@pytest.mark.usefixtures("virtual_time")
async def test_metrics_tell_how_much_stands_still_for_memory(stage: Stage) -> None:
    """As a share, of some tasks and of all; nothing where the kernel does not tell."""
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition, meter = Exposition(daemon), stage.fleet.memory.capacity.meter
        assert series(exposition, "memory_pressure") == []
        meter.pressure = Pressure(some_avg10=12.5, full_avg10=2.5)
        assert series(exposition, "memory_pressure") == [
            'llamavisor_memory_pressure_ratio{tasks="all"} 0.025',
            'llamavisor_memory_pressure_ratio{tasks="some"} 0.125',
        ]


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=1.0.0", "*/*", "text/plain;version=1.0.0"])
async def test_one_format_is_told_whatever_is_asked_for(stage: Stage, accept: str) -> None:
    """The text format 0.0.4, which has no exemplars, no times of creation and no end mark."""
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        for event in (ended(model="alpha"), DemandMet(router="main", model="alpha", wait_s=0.0)):
            stage.bus.publish(event)
        app = exposition.app()
        (route,) = (each for each in app.router.routes() if each.method == "GET" and "/metrics" in str(each.resource))
        response = await route.handler(make_mocked_request("GET", "/metrics", {"Accept": accept}))
    assert isinstance(response, web.Response)
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert isinstance(response.body, bytes)
    lines = response.body.decode().splitlines()
    assert 'llamavisor_demand_wait_seconds_count{model="alpha",router="main"} 1.0' in lines
    assert not any(" # " in line or "# EOF" in line for line in lines if not line.startswith(("# HELP", "# TYPE")))
    assert not any("_created" in line for line in lines)


@pytest.mark.usefixtures("virtual_time")
async def test_metrics_count_what_happens_about_memory(stage: Stage) -> None:
    """Waits, refusals, what did not come back, what the kernel killed, and why models left."""
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        for event in (
            DemandMet(router="main", model="alpha", wait_s=0.0),
            DemandMet(router="main", model="alpha", wait_s=4.0),
            ModelQuarantined(router="main", model="beta", for_s=30.0, failures=1, reason="no memory"),
            MemoryUnreclaimed(router="main", model="beta", device="RAM", bytes=500),
            MemoryUnreclaimed(router="main", model="alpha", device="RAM", bytes=1),
            MemoryKill(kills=2),
            *(ModelUnloaded(router="main", model="alpha", reason=reason) for reason in UnloadReason),
        ):
            stage.bus.publish(event)
        shown = series(exposition, "demand_wait", "model_quarantines", "device_unrecl", "memory_oom", "model_unloads")
        for line in (
            'llamavisor_demand_wait_seconds_bucket{le="0.001",model="alpha",router="main"} 1.0',
            'llamavisor_demand_wait_seconds_bucket{le="5.0",model="alpha",router="main"} 2.0',
            'llamavisor_demand_wait_seconds_sum{model="alpha",router="main"} 4.0',
            'llamavisor_model_quarantines_total{model="beta",router="main"} 1.0',
            'llamavisor_device_unreclaimed_bytes_total{device="RAM"} 501.0',
            "llamavisor_memory_oom_kills_total 2.0",
            *(
                f'llamavisor_model_unloads_total{{model="alpha",reason="{reason}",router="main"}} 1.0'
                for reason in ("evicted", "expired", "pressure", "oom")
            ),
        ):
            assert line in shown


@pytest.mark.usefixtures("virtual_time")
async def test_refusals_make_no_series_of_names_that_clients_invent(stage: Stage) -> None:
    """They are counted by reason alone."""
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        for number in range(50):
            reason = ("impossible", "queue_full")[number % 2]
            stage.bus.publish(
                DemandRefused(model=f"invented-{number}", reason=reason, detail="no", wait_s=0.0, retry_after_s=None)
            )
        everything = series(exposition, "")
    assert [line for line in everything if "demands_refused" in line] == [
        'llamavisor_demands_refused_total{reason="impossible"} 25.0',
        'llamavisor_demands_refused_total{reason="queue_full"} 25.0',
    ]
    assert not any("invented" in line for line in everything)


@pytest.mark.usefixtures("virtual_time")
async def test_metrics_of_memory_forget_what_has_gone(stage: Stage) -> None:
    """Models that nobody lists any more, and routers that are not there; the others stay."""
    async with stage.running(stage.config(("main", "a"), ("other", "a"))) as daemon:
        exposition = Exposition(daemon)
        for router in ("main", "other"):
            for model in ("alpha", "gone"):
                stage.bus.publish(DemandMet(router=router, model=model, wait_s=1.0))
                stage.bus.publish(ModelQuarantined(router=router, model=model, for_s=1.0, failures=1, reason="no"))
        assert len(series(exposition, "demand_wait_seconds_count", "model_quarantines")) == 4
        await stage.fleet.apply(stage.config(("main", "a")).fleet_settings())
        assert series(exposition, "demand_wait_seconds_count", "model_quarantines") == [
            'llamavisor_demand_wait_seconds_count{model="alpha",router="main"} 1.0',
            'llamavisor_model_quarantines_total{model="alpha",router="main"} 1.0',
        ]
