"""Draining: no new requests, those that are there are finished, models stay, and a person may take it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from aiohttp import web

from daemon.stage import Asked, Stage, entry
from fakes import FakeLlamaServer
from fakes.bare_router import free_port
from llamavisor.events import Bus, Event, GatewayDraining, GatewayResumed
from llamavisord.config import Config, Metrics
from llamavisord.control import WaitTimeoutError, _Api, health_routes
from llamavisord.daemon import Daemon
from llamavisord.drain import Drain, EndingError, NoGatewayError
from llamavisord.traffic import Traffic
from running import RunningDaemon

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]
URL = "http://127.0.0.1:8080"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A stage with the model alpha."""
    stage = Stage(tmp_path)
    stage.put(entry("alpha"))
    return stage


def config(stage: Stage) -> Config:
    """A configuration of one router, without metrics."""
    made: Any = stage.config(("main", "a"))
    made.metrics = Metrics(enabled=False, host="", port=0)
    return cast("Config", made)


def told(bus: Bus) -> list[Event]:
    """What is heard of the gateway from now on."""
    heard: list[Event] = []
    bus.listen(
        lambda published: (
            heard.append(published.event) if isinstance(published.event, GatewayDraining | GatewayResumed) else None
        )
    )
    return heard


def open_gateway(daemon: Daemon) -> Traffic:
    """Give the daemon a gateway that listens."""
    daemon.traffic = Traffic(Drain(daemon.bus), held_bytes=lambda: 7, connections=lambda: 3)
    daemon.traffic.urls = (URL,)
    return daemon.traffic


async def call(daemon: Daemon, command: str, **query: str) -> tuple[int, dict[str, Any]]:
    """What the control API answers."""
    response: web.Response = await getattr(_Api(daemon), command)(Asked(**query))
    return response.status, json.loads(cast("bytes", response.body))


async def readyz(daemon: Daemon) -> tuple[int, str | None]:
    """What a load balancer is told."""
    (route,) = (route for route in health_routes(daemon) if route.path == "/readyz")
    response = await route.handler(cast("web.Request", Asked()))
    assert isinstance(response, web.Response)
    return response.status, response.text


# --- the gate ---------------------------------------------------------------------------------------------------------


async def test_the_last_one_out_ends_the_wait() -> None:
    """Not an earlier one; who waits for an empty gateway does not wait at all."""
    drain = Drain(Bus())
    drain.enter()
    drain.enter()
    assert drain.begin("test")
    is_empty = False

    async def wait() -> None:
        nonlocal is_empty
        await drain.wait_empty()
        is_empty = True

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            group.start_soon(wait)
            await anyio.sleep(1)
            drain.leave()
            await anyio.sleep(1)
            assert not is_empty
            drain.leave()
        assert is_empty
        await drain.wait_empty()


async def test_whoever_waits_for_the_end_hears_that_it_was_taken_back() -> None:
    """With requests coming in again that end would never come."""
    drain = Drain(Bus())
    drain.enter()
    drain.begin("test")
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(drain.wait_empty)
            await anyio.sleep(1)
            assert drain.end()
    assert not drain.is_draining
    assert drain.inside == 1


async def test_each_change_is_told_once() -> None:
    """What is so already is no news."""
    bus = Bus()
    heard, drain = told(bus), Drain(bus)
    drain.enter()
    assert not drain.end()
    assert [drain.begin("one"), drain.begin("two")] == [True, False]
    assert [drain.end(), drain.end()] == [True, False]
    assert heard == [GatewayDraining(reason="one", requests=1, deadline_s=None), GatewayResumed()]


async def test_a_daemon_that_ends_cannot_be_told_to_go_on() -> None:
    """Its end is told also when it was draining before, and only once."""
    bus = Bus()
    heard, drain = told(bus), Drain(bus)
    drain.begin("asked for")
    assert [drain.begin("SIGTERM", deadline_s=30.0), drain.begin("SIGTERM", deadline_s=30.0)] == [True, False]
    assert not drain.begin("asked for")
    with pytest.raises(EndingError, match="takes no requests any more"):
        drain.end()
    assert drain.is_draining
    assert [event.message() for event in heard] == [
        "gateway: no new requests are taken (asked for); 0 in flight",
        "gateway: no new requests are taken (SIGTERM); 0 in flight, ended after 30 s at the latest",
    ]


# --- what is in the gateway -------------------------------------------------------------------------------------------


async def test_a_request_is_counted_where_it_is() -> None:
    """Waiting, with a model, waiting again because that has died, with another; and out, also by an error."""
    traffic = Traffic(Drain(Bus()), held_bytes=lambda: 0, connections=lambda: 0)
    counts = []

    def note() -> None:
        counts.append((traffic.waiting, dict(traffic.in_flight), traffic.drain.inside))

    with traffic.enter() as other:
        other.run("alpha")
        with pytest.raises(RuntimeError), traffic.enter() as passage:  # noqa: PT012 (each step is looked at)
            note()
            passage.run("alpha")
            note()
            passage.wait()
            passage.wait()
            note()
            passage.run("beta")
            passage.run("gamma")
            note()
            raise RuntimeError
        note()
    note()
    assert counts == [
        (1, {"alpha": 1}, 2),
        (0, {"alpha": 2}, 2),
        (1, {"alpha": 1}, 2),
        (0, {"alpha": 1, "gamma": 1}, 2),
        (0, {"alpha": 1}, 1),
        (0, {}, 0),
    ]


# --- commands ---------------------------------------------------------------------------------------------------------


async def test_drain_waits_for_what_runs_and_resume_takes_it_back(stage: Stage) -> None:
    """The answer comes with the end of the last request; models stay loaded all the while."""
    async with stage.running(config(stage)) as daemon, anyio.create_task_group() as group:
        traffic = open_gateway(daemon)
        await stage.fleet.load(stage.fleet["main"], "alpha")
        answers: list[tuple[int, dict[str, Any]]] = []

        async def ask() -> None:
            answers.append(await call(daemon, "drain", wait="true"))

        with traffic.enter() as passage:
            passage.run("alpha")
            group.start_soon(ask)
            await anyio.sleep(60)
            assert answers == []
            assert traffic.drain.is_draining
            status, again = await call(daemon, "drain")
            assert (status, again["changed"], again["gateway"]["in_flight"]) == (202, False, {"alpha": 1})
        await stage.until(lambda: answers)
        status, answer = answers[0]
        assert (status, answer["changed"], answer["gateway"]["draining"]) == (200, True, True)
        model = stage.fleet["main"].table.get("alpha")
        assert model is not None
        assert model.state.value == "loaded"
        for changed in (True, False):
            status, answer = await call(daemon, "resume")
            assert (status, answer["changed"], answer["gateway"]["draining"]) == (200, changed, False)


async def test_drain_that_takes_too_long_goes_on(stage: Stage) -> None:
    """Its caller is told so after the time that it gave."""
    async with stage.running(config(stage)) as daemon:
        traffic = open_gateway(daemon)
        with traffic.enter(), pytest.raises(WaitTimeoutError, match="not done within 5 s; it goes on"):
            await call(daemon, "drain", wait="5")
        assert traffic.drain.is_draining


@pytest.mark.parametrize("command", ["drain", "resume"])
async def test_without_a_gateway_there_is_nothing_to_drain(stage: Stage, command: str) -> None:
    """The text says why, and nothing else is touched."""
    async with stage.running(config(stage)) as daemon:
        with pytest.raises(NoGatewayError, match='serve = "router"'):
            await call(daemon, command)
        assert daemon.is_ready
        assert daemon.view()["gateway"] is None
        assert await readyz(daemon) == (200, "main ready\n")


async def test_a_load_balancer_turns_away_while_it_drains(stage: Stage) -> None:
    """And while nobody listens; not from requests that run."""
    async with stage.running(config(stage)) as daemon:
        traffic = open_gateway(daemon)
        assert await readyz(daemon) == (200, "main ready\ngateway open\n")
        with traffic.enter():
            await call(daemon, "drain")
            assert await readyz(daemon) == (503, "main ready\ngateway draining\n")
            await call(daemon, "resume")
        traffic.urls = ()
        assert await readyz(daemon) == (503, "main ready\ngateway closed\n")


async def test_status_tells_of_the_gateway(stage: Stage) -> None:
    """Where it is, what is in it, and what a person should know of it."""
    async with stage.running(config(stage)) as daemon:
        traffic = open_gateway(daemon)
        with traffic.enter() as passage, traffic.enter():
            passage.run("alpha")
            shown = daemon.view()
            assert shown["gateway"] == {
                "urls": [URL],
                "draining": False,
                "keys": 0,
                "in_flight": {"alpha": 1},
                "waiting": 1,
                "held_bytes": 7,
                "connections": 3,
            }
            assert not any("gateway" in warning for warning in shown["warnings"])
            await call(daemon, "drain")
            assert "the gateway takes no new requests, until `llamavisor resume`" in daemon.view()["warnings"]
        traffic.problem = "gateway: cannot listen on 127.0.0.1:8080: address already in use"
        assert traffic.problem in daemon.view()["warnings"]


def test_over_the_socket_of_a_daemon_without_a_gateway(
    tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., FakeLlamaServer]
) -> None:
    """The commands are there, refused with 409, and say so in one line."""
    config = f'serve = "router"\nmodels_dir = "{models_dir}"\nport = {free_port()}\n[metrics]\nenabled = false\n'
    with RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config) as daemon:
        for command in ("drain", "resume"):
            status, problem = daemon.call("POST", f"/control/v1/{command}?wait=5")
            assert (status, problem["code"]) == (409, "no_gateway")
            done = daemon.cli(command)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert 'serve = "router"' in done.stderr
        assert daemon.status()["gateway"] is None
