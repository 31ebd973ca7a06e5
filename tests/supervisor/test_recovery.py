"""What is loaded again after a crash of a model or of its router, and what is not, on virtual time."""

from __future__ import annotations

import math
from dataclasses import replace

import anyio
import pytest

from fakes.host import FakeHost
from fakes.machine import KILLED, FakeModel, FakeStart
from fakes.supervised import Supervised, Waiter, supervised
from llamavisor.errors import (
    ModelLoadError,
    RouterNotReadyError,
)
from llamavisor.events import (
    ModelLoading,
    ModelUnloaded,
    RouterRecovered,
    UnloadReason,
)
from llamavisor.restart import STABLE_AFTER_S
from llamavisor.states import ModelState, RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

HOUR_S = 3600.0
FOREVER = FakeModel(load_s=math.inf, progress=())


async def _loaded(it: Supervised, *names: str) -> None:
    for name in names:
        await it.router.load(name)
        await anyio.sleep(1.0)


# --- children that crash ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_events", [True, False])
async def test_a_model_that_served_and_crashed_is_loaded_again(host: FakeHost, has_events: bool) -> None:
    """The crash of a model that had been loaded for a while is an event, and the model is back by itself."""
    host.has_events = has_events
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        await anyio.sleep(STABLE_AFTER_S + 1.0)
        it.process.crash("alpha")
        await it.until(lambda: it.process.loads == ["alpha", "alpha"], within_s=1.5)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED, within_s=3.0)
        assert [unloaded.reason for unloaded in it.story.of(ModelUnloaded)] == [UnloadReason.CRASHED]
        assert (it.spawns, it.router.state) == (1, RouterState.READY)


async def test_a_model_that_crashes_at_once_stays_away(host: FakeHost) -> None:
    """A model that crashes soon after its load is not loaded in a loop; its error is shown."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        await anyio.sleep(STABLE_AFTER_S - 1.0)
        it.process.crash("alpha")
        await anyio.sleep(HOUR_S)
        model = it.router.table.get("alpha")
        assert model is not None
        assert (model.state, model.error) == (ModelState.FAILED, "its process ended unasked")
        assert it.process.loads == ["alpha"]
        assert await it.router.load("alpha")


# --- after a crash of the router --------------------------------------------------------------------------------------


async def test_what_was_resident_is_loaded_again(host: FakeHost) -> None:
    """After a crash the resident models are loaded again, the most recent first, and this is an event."""
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "beta", "alpha", "gamma")
        await it.router.unload("beta")
        await it.router.load("beta")
        await anyio.sleep(60.0)
        crashed_at = anyio.current_time()
        it.process.end(KILLED)
        await it.until(lambda: it.story.of(RouterRecovered))
        assert it.process.loads == ["beta", "gamma", "alpha"]
        recovered = it.story.of(RouterRecovered)[0]
        assert (recovered.models, recovered.missing) == (("beta", "gamma", "alpha"), ())
        assert recovered.seconds == pytest.approx(anyio.current_time() - crashed_at, abs=0.01)


async def test_a_second_crash_keeps_the_order(host: FakeHost) -> None:
    """The order in which people loaded models survives any number of crashes."""
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "beta", "alpha", "gamma")
        for crashes in (1, 2, 3):
            await anyio.sleep(60.0)
            it.process.end(KILLED)
            await it.until(lambda crashes=crashes: len(it.story.of(RouterRecovered)) == crashes)
            assert it.process.loads == ["gamma", "alpha", "beta"]


async def test_a_load_after_a_recovery_counts(host: FakeHost) -> None:
    """A model that somebody loads after a recovery is the most recent one, though it was recovered before."""
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "alpha", "beta")
        for crashes, expected in ((1, ["beta", "alpha"]), (2, ["alpha", "beta"])):
            await anyio.sleep(60.0)
            it.process.end(KILLED)
            await it.until(lambda crashes=crashes: len(it.story.of(RouterRecovered)) == crashes)
            assert it.process.loads == expected
            await it.router.unload("alpha")
            await it.router.load("alpha")


async def test_a_crash_during_the_recovery(host: FakeHost) -> None:
    """What was loaded again and what was still to be loaded again comes back; what was loading does not."""
    host.models |= {name: FakeModel(load_s=30.0) for name in ("alpha", "beta", "gamma")}
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "alpha", "beta", "gamma")
        await anyio.sleep(60.0)
        it.process.end(KILLED)
        await it.until(lambda: it.router.starts == 2)
        await it.until(lambda: it.router.is_serving and it.model("beta") is ModelState.LOADING)
        it.process.end(KILLED)
        await it.until(lambda: it.story.of(RouterRecovered))
        assert it.process.loads == ["gamma", "alpha"]


async def test_what_was_loading_when_the_router_died_is_not_loaded_again(host: FakeHost) -> None:
    """A model that was still loading may be what killed the router: who waited is told, and it stays away."""
    host.models["beta"] = FakeModel(load_s=30.0)
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        await _loaded(it, "alpha")
        group.start_soon(waiter, it.router.load, "beta")
        await anyio.sleep(20.0)
        it.process.end(KILLED)
        await it.until(lambda: it.story.of(RouterRecovered))
        assert "its router ended while it was loading" in str(waiter.error)
        await anyio.sleep(HOUR_S)
        assert it.process.loads == ["alpha"]
        assert it.model("beta") is ModelState.FAILED


async def test_a_queued_load_outlives_the_router(host: FakeHost) -> None:
    """A load that had not begun when the router died is done by the next process."""
    host.models["alpha"].answer_s = 5.0
    waiters = [Waiter(), Waiter()]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiters[0], it.router.load, "alpha")
        await it.settle()
        group.start_soon(waiters[1], it.router.load, "beta")
        await it.settle()
        it.process.end(KILLED)
        await it.until(lambda: all(waiter.is_done for waiter in waiters))
        assert isinstance(waiters[0].error, ModelLoadError)
        assert waiters[1].answer
        assert it.process.loads == ["beta"]


@pytest.mark.parametrize("has_events", [True, False])
async def test_a_call_that_died_with_its_router_is_forgotten(host: FakeHost, has_events: bool) -> None:
    """After a crash in the middle of a load's call, the new router is believed what it says of that model."""
    host.has_events = has_events
    host.models["alpha"].answer_s = 5.0
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiter, it.router.load, "alpha")
        await anyio.sleep(1.0)
        it.process.end(KILLED)
        await it.until(lambda: it.router.starts == 2)
        await it.reaches(RouterState.READY)
        it.process.listed["alpha"].load_s = 3.0
        it.process.load_for_client("alpha")
        await it.until(lambda: it.model("alpha") is ModelState.LOADED, within_s=10.0)
        assert [loading.is_requested for loading in it.story.of(ModelLoading)] == [True, False]


async def test_a_model_that_does_not_come_back_is_named(host: FakeHost) -> None:
    """The recovery tells which models could not be loaded again: broken ones, and those whose files are gone."""
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "alpha", "beta", "gamma")
        await anyio.sleep(60.0)
        host.models["beta"] = FakeModel(exit_code=1, load_s=0.1)
        del host.models["gamma"]
        it.process.end(KILLED)
        await it.until(lambda: it.story.of(RouterRecovered))
        recovered = it.story.of(RouterRecovered)[0]
        assert (recovered.models, set(recovered.missing)) == (("alpha",), {"beta", "gamma"})


async def test_a_recovery_is_counted_from_the_first_end(host: FakeHost) -> None:
    """The time of a recovery that took several tries is the time that people had to wait."""
    host.starts.extend([FakeStart(), *(FakeStart(ready_at=math.inf, ends_at=0.1) for _ in range(3))])
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "alpha")
        await anyio.sleep(60.0)
        crashed_at = anyio.current_time()
        it.process.end(KILLED)
        await it.until(lambda: it.story.of(RouterRecovered))
        recovered = it.story.of(RouterRecovered)
        assert [each.seconds for each in recovered] == [pytest.approx(anyio.current_time() - crashed_at, abs=0.01)]
        assert recovered[0].seconds > 7.0


async def test_a_requested_restart_loads_again_and_a_stop_forgets(host: FakeHost) -> None:
    """A restart keeps what is resident; after a stop and a start nothing is loaded, and nothing was recovered."""
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "alpha", "beta")
        it.router.restart()
        await it.until(lambda: it.story.of(RouterRecovered))
        assert it.process.loads == ["beta", "alpha"]
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        await anyio.sleep(HOUR_S)
        await it.comes_up()
        await anyio.sleep(60.0)
        assert it.process.loads == []
        assert len(it.story.of(RouterRecovered)) == 1


async def test_residents_survive_a_failed_start(host: FakeHost) -> None:
    """What was resident before a bad flag latched the router is loaded again once it starts."""
    async with supervised(host) as it:
        await it.comes_up()
        await _loaded(it, "alpha")
        bad = FakeStart(ready_at=math.inf, ends_at=0.1, prints=("error: invalid argument: --x",))
        host.starts.append(bad)
        it.router.restart()
        await it.reaches(RouterState.FAILED)
        await anyio.sleep(100.0)
        host.build += 1
        await it.until(lambda: it.story.of(RouterRecovered))
        assert it.process.loads == ["alpha"]


async def test_those_who_wait_are_told_when_the_router_is_stopped(host: FakeHost) -> None:
    """A load that waits when its router is stopped, or fails for good, ends with the reason."""
    host.models["alpha"] = FOREVER
    waiters = [Waiter(), Waiter()]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiters[0], it.router.load, "alpha")
        await it.settle()
        it.router.stop()
        await it.until(lambda: waiters[0].is_done, within_s=1.0)
        await it.reaches(RouterState.STOPPED)
        host.starts.append(FakeStart(ready_at=math.inf, ends_at=0.1, prints=("error: invalid argument: --x",)))
        it.router.start()
        await anyio.sleep(0.01)
        group.start_soon(waiters[1], it.router.load, "alpha")
        await it.reaches(RouterState.FAILED)
        await it.settle()
        assert isinstance(waiters[1].error, RouterNotReadyError)
        assert "invalid argument" in str(waiters[1].error)


async def test_an_unload_during_a_recovery_is_heeded(host: FakeHost) -> None:
    """A model that is unloaded while its router comes back is not loaded again after all."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        await it.router.load("beta")
        it.process.end(KILLED)
        await it.reaches(RouterState.BACKOFF)
        async with anyio.create_task_group() as group:
            group.start_soon(it.router.unload, "alpha")
            await it.until(lambda: it.story.of(RouterRecovered))
        assert it.story.of(RouterRecovered)[0].models == ("beta",)
        assert it.model("alpha") is ModelState.UNLOADED


async def test_a_restart_wished_for_while_it_comes_up_loses_nothing(host: FakeHost) -> None:
    """News that a router is up, heard while it is being stopped already, does not load models into a dying process."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        it.process.end(KILLED)
        await it.until(lambda: it.spawns == 2 and it.process.is_listening)
        it.router.restart()
        await it.until(lambda: it.story.of(RouterRecovered) and it.router.state is RouterState.READY)
        await it.settle()
        assert it.story.of(RouterRecovered)[-1].models == ("alpha",)
        assert it.model("alpha") is ModelState.LOADED


async def test_those_who_leave_are_forgotten(host: FakeHost) -> None:
    """A wish whose owner has left waits in nobody's list: a thousand callers in a backoff cost nothing."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.end(KILLED)
        await it.reaches(RouterState.BACKOFF)
        for _ in range(1000):
            with anyio.move_on_after(0.0001):
                await it.router.load("alpha")
        assert "tickets=1000" not in repr(it.router._residency)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)
        assert "tickets=0" in repr(it.router._residency)


async def test_a_wish_beats_the_restoration(host: FakeHost) -> None:
    """What somebody asks for while a router is down is not pushed out by what was resident before."""
    host.settings = replace(host.settings, models_max=2)
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        await it.router.load("beta")
        it.process.end(KILLED)
        await it.reaches(RouterState.BACKOFF)
        assert await it.router.load("gamma")
        await it.until(lambda: it.story.of(RouterRecovered))
        recovered = it.story.of(RouterRecovered)[0]
        assert (recovered.models, recovered.missing) == (("beta",), ("alpha",))
        assert it.model("gamma") is ModelState.LOADED


async def test_a_load_during_a_restart_waits_for_the_next_process(host: FakeHost) -> None:
    """A load that is asked for while the router is being stopped is done by the process that follows."""
    async with supervised(host) as it:
        await it.comes_up()
        it.router.restart()
        await it.reaches(RouterState.STOPPING)
        assert await it.router.load("alpha")
        assert (it.spawns, it.process.loads) == (2, ["alpha"])
