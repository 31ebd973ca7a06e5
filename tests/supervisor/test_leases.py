"""Leases on models: had at once where they can be, kept, lost, and given back."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.fleet import GIB, GatewayStage
from fakes.machine import KILLED, FakeModel
from llamavisor.errors import RouterNotReadyError
from llamavisor.events import ModelUnloaded, UnloadReason

pytestmark = pytest.mark.anyio


@pytest.fixture
def it(virtual_time: object, tmp_path: Path) -> GatewayStage:
    """A router with two models that load in five seconds."""
    models = {name: FakeModel(load_s=5.0, takes={"RAM": GIB}) for name in ("alpha", "beta")}
    return GatewayStage(tmp_path, models)


async def test_a_loaded_model_is_had_without_a_wait(it: GatewayStage) -> None:
    """In one step, and it counts as used until it is given back; twice means nothing."""
    async with it.running():
        leases = it.fleet.leases
        assert leases.acquire_loaded("alpha") is None
        await it.served("alpha")
        endpoint = leases.acquire_loaded("alpha")
        assert endpoint is not None
        assert (endpoint.model, endpoint.router, endpoint.waited_s) == ("alpha", "main", 0.0)
        assert it.fleet.memory.scheduler.is_used("main", "alpha")
        leases.release(endpoint)
        leases.release(endpoint)
        assert not it.fleet.memory.scheduler.is_used("main", "alpha")


async def test_what_a_load_took_is_told_apart_from_the_wait_for_it(it: GatewayStage) -> None:
    """Who found it loaded has waited for no load."""
    async with it.running():
        first = await it.fleet.leases.acquire("alpha")
        assert first.load_s == pytest.approx(5.0, abs=0.5)
        assert first.waited_s >= first.load_s
        second = await it.fleet.leases.acquire("alpha")
        assert (second.waited_s < 0.1, second.load_s) == (True, 0.0)
        it.fleet.leases.release(first)
        it.fleet.leases.release(second)


async def test_a_model_that_leaves_is_not_had_at_once(it: GatewayStage) -> None:
    """Nor one whose router has ended."""
    async with it.running():
        await it.served("alpha")
        it.hosts["main"].process.end(KILLED)
        await it.until(lambda: not it["main"].is_serving)
        assert it.fleet.leases.acquire_loaded("alpha") is None


async def test_a_broken_connection_is_explained_by_the_end_of_the_process(it: GatewayStage) -> None:
    """The word of who watches the process is waited for; one that lives is told to be alive."""
    async with it.running():
        endpoint = await it.fleet.leases.acquire("alpha")
        assert not await it.fleet.leases.has_ended(endpoint)
        it.hosts["main"].process.crash("alpha")
        assert await it.fleet.leases.has_ended(endpoint)
        again = await it.fleet.leases.acquire("alpha")
        assert again.lease != endpoint.lease


async def test_a_process_that_takes_no_connection_is_ended(it: GatewayStage) -> None:
    """It would be called loaded for ever; who asks again has a fresh one."""
    async with it.running():
        endpoint = await it.fleet.leases.acquire("alpha")
        it.fleet.memory.scheduler.end_unresponsive(endpoint)
        assert await it.fleet.leases.has_ended(endpoint)  # it is promised to nobody any more
        again = await it.fleet.leases.acquire("alpha")
        assert again.load_s > 0.0
        assert [event.reason for event in it.story.of(ModelUnloaded)] == [UnloadReason.UNRESPONSIVE]
        it.fleet.memory.scheduler.end_unresponsive(endpoint)  # of a former life: it means nothing
        assert it.fleet.leases.is_kept(again)


async def test_who_waits_while_the_router_is_stopped_is_told_so(it: GatewayStage) -> None:
    """A person stops the router: whoever waits in its queue may come again, and is not told that nothing is there."""
    async with it.running():
        holder = it.client("alpha")
        waiting = it.client("beta")
        await it.until(lambda: it["main"].table.get("alpha") is not None)
        it["main"].stop()
        await it.until(lambda: waiting.is_over and holder.is_over)
        for client in (waiting, holder):
            assert isinstance(client.error, RouterNotReadyError), client
            assert "is stop" in str(client.error)
