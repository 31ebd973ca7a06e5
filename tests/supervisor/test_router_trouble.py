"""Starts that fail, and trouble while a router serves, on virtual time."""

from __future__ import annotations

import math

import anyio
import pytest

from fakes.host import FakeHost
from fakes.machine import KILLED, FakeStart
from fakes.supervised import supervised
from llamavisor.cause import Cause, Verdict
from llamavisor.errors import DeviceMissingError, RouterNotReadyError, SpawnError
from llamavisor.events import (
    RouterDegraded,
    RouterFailed,
    RouterReady,
    RouterRestartScheduled,
    RouterSpawned,
)
from llamavisor.generation import DEVICE_DEADLINE_S, PROBE_INTERVAL_S, PROBE_TIMEOUT_S
from llamavisor.states import ModelState, RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

HOUR_S = 3600.0
BAD_FLAG = FakeStart(ready_at=math.inf, ends_at=0.01, prints=("error: invalid argument: --nosuchflag",))
NO_BINARY = Verdict(Cause.BAD_BINARY, "no llama-server was found", "install one", is_obstacle=True)
NO_FOLDER = Verdict(Cause.MODELS_DIR, "models_dir /m does not exist", "create it", is_obstacle=True)


def _crash(after_s: float = 0.2, **how: object) -> FakeStart:
    """A start that ends before it is ready."""
    return FakeStart(ready_at=math.inf, ends_at=after_s, **how)


# --- starts that fail -------------------------------------------------------------------------------------------------


async def test_a_bad_flag_is_not_tried_again(host: FakeHost) -> None:
    """P4: FAILED after the first try, with the reason, for hours; tried again when the binary changes."""
    host.starts.append(BAD_FLAG)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        assert it.router.reason == "error: invalid argument: --nosuchflag"
        assert it.router.hint == "correct `args` in the configuration"
        assert [failed.cause for failed in it.story.of(RouterFailed)] == [Cause.BAD_OPTION]
        await anyio.sleep(2 * HOUR_S)
        assert it.spawns == 1
        host.build += 1
        await it.reaches(RouterState.READY, within_s=2.0)
        assert (it.spawns, it.router.reason, it.router.hint) == (2, None, None)
        assert it.story.of(RouterSpawned)[1].cause is Cause.BAD_OPTION


@pytest.mark.parametrize("obstacle", [NO_BINARY, NO_FOLDER], ids=lambda obstacle: obstacle.cause.value)
async def test_an_obstacle_that_goes_is_noticed(host: FakeHost, obstacle: Verdict) -> None:
    """P5: what stands in the way shows as FAILED without a try, and the router recovers when it goes."""
    host.obstacle = obstacle
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        assert (it.router.reason, it.router.hint) == (obstacle.reason, obstacle.hint)
        await anyio.sleep(2 * HOUR_S)
        assert it.spawns == 0
        assert len(it.story.of(RouterFailed)) == 1
        host.obstacle = None
        await it.reaches(RouterState.READY, within_s=2.0)
        assert it.spawns == 1


async def test_another_obstacle_is_shown(host: FakeHost) -> None:
    """When one obstacle goes and another shows, the reason is the new one."""
    host.obstacle = NO_BINARY
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        host.obstacle = NO_FOLDER
        await it.until(lambda: it.router.reason == NO_FOLDER.reason, within_s=2.0)
        host.obstacle = None
        await it.reaches(RouterState.READY, within_s=2.0)


async def test_a_failed_router_is_looked_at_once_a_second(host: FakeHost) -> None:
    """The look at an obstacle is no busy loop, and it ends when the router is stopped."""
    host.obstacle = NO_BINARY
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        looks = len(host.prepared_at)
        await anyio.sleep(100.0)
        assert 90 <= len(host.prepared_at) - looks <= 100
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        await anyio.sleep(2.0)
        looks = len(host.prepared_at)
        await anyio.sleep(100.0)
        assert len(host.prepared_at) == looks


@pytest.mark.parametrize("wish", ["start", "restart"])
async def test_a_person_can_clear_a_failure(host: FakeHost, wish: str) -> None:
    """A start or a restart by a person tries a FAILED router again."""
    host.starts.append(BAD_FLAG)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        getattr(it.router, wish)()
        await it.reaches(RouterState.READY, within_s=1.0)
        await anyio.sleep(HOUR_S)
        assert it.spawns == 2


async def test_a_machine_short_of_processes_is_waited_for(host: FakeHost) -> None:
    """P11: a start that fails for want of something that may come back is tried again after a backoff."""
    error = SpawnError("cannot start llama-server: Resource temporarily unavailable", is_permanent=False)
    host.starts.extend([FakeStart(error=error), FakeStart(error=error)])
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.BACKOFF)
        assert it.router.reason == str(error)
        await it.reaches(RouterState.READY)
        assert [scheduled.delay_s for scheduled in it.story.of(RouterRestartScheduled)] == [1.0, 2.0]
        assert {scheduled.cause for scheduled in it.story.of(RouterRestartScheduled)} == {Cause.SPAWN}


async def test_a_binary_that_cannot_be_executed_is_permanent(host: FakeHost) -> None:
    """P5: a start that the kernel refuses for good latches FAILED until the binary changes."""
    host.starts.append(FakeStart(error=SpawnError("cannot start x: Exec format error", is_permanent=True)))
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        await anyio.sleep(HOUR_S)
        assert it.spawns == 0
        host.build += 1
        await it.reaches(RouterState.READY, within_s=2.0)


async def test_a_full_disk_is_waited_for(host: FakeHost) -> None:
    """R1: files that cannot be written keep a router in BACKOFF, and it comes up once they can."""
    host.offer_error = OSError("No space left on device")
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.BACKOFF)
        assert it.router.reason == "cannot write the router's files: No space left on device"
        await anyio.sleep(10)
        host.offer_error = None
        await it.reaches(RouterState.READY)
        assert it.spawns == 1


async def test_what_came_up_must_be_a_router(host: FakeHost) -> None:
    """A llama-server that serves a single model is ended, and not tried again."""
    host.starts.append(FakeStart(is_router=False))
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        assert it.router.reason == "llama-server came up, but not as a router"
        await anyio.sleep(HOUR_S)
        assert host.machine.left == []
        assert it.spawns == 1


async def test_a_stranger_on_the_port_is_not_taken_for_ours(host: FakeHost) -> None:
    """A router is not READY while somebody else answers on its port."""
    host.has_stranger = True
    host.usual = FakeStart(ready_at=math.inf)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.BACKOFF)
        assert it.story.of(RouterReady) == []


# --- trouble while it serves ------------------------------------------------------------------------------------------


async def test_a_silent_router_is_degraded_and_not_killed(host: FakeHost) -> None:
    """Two probes in a row without an answer make it DEGRADED; one answer makes it READY again. It works meanwhile."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.is_silent = it.process.is_working = True
        await it.reaches(RouterState.DEGRADED)
        assert "does not answer" in (it.router.reason or "")
        await anyio.sleep(120.0)
        assert it.router.is_serving
        assert len(it.story.of(RouterDegraded)) == 1
        it.process.is_silent = False
        await it.reaches(RouterState.READY)
        assert (it.spawns, it.router.reason) == (1, None)


async def test_one_slow_probe_is_no_trouble(host: FakeHost) -> None:
    """A single probe without an answer changes nothing."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.is_silent = True
        await anyio.sleep(PROBE_INTERVAL_S + PROBE_TIMEOUT_S + 0.1)
        it.process.is_silent = False
        await anyio.sleep(60.0)
        assert it.story.of(RouterDegraded) == []


async def test_slow_probes_are_not_counted_across_a_crash(host: FakeHost) -> None:
    """A slow answer of one process and a slow answer of the next are not two in a row."""
    async with supervised(host) as it:
        await it.comes_up()
        for _ in range(2):
            it.process.is_silent = True
            await anyio.sleep(PROBE_INTERVAL_S + PROBE_TIMEOUT_S + 0.1)
            it.process.end(KILLED)
            await it.settle()
            await it.reaches(RouterState.READY)
        assert it.story.of(RouterDegraded) == []


async def test_a_degraded_router_can_crash_and_be_stopped(host: FakeHost) -> None:
    """DEGRADED is serving: its time counts, its end is a crash, and its trouble does not outlive it."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.is_silent = True
        await it.reaches(RouterState.DEGRADED)
        it.process.end(KILLED)
        await it.until(lambda: it.router.starts == 2, within_s=0.1)
        await it.reaches(RouterState.READY)
        assert it.router.comeback.history.failures == 0
        it.process.is_silent = True
        await it.reaches(RouterState.DEGRADED)
        assert len(it.story.of(RouterDegraded)) == 2
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        assert it.router.reason is None


async def test_a_device_that_shows_late_is_waited_for(host: FakeHost) -> None:
    """A start waits for the device that it needs, says so, and is a normal start once it is there."""
    host.invisible = ("CUDA0",)
    async with supervised(host) as it:
        it.router.start()
        await anyio.sleep(30.0)
        assert (it.router.state, it.spawns) == (RouterState.STARTING, 0)
        assert it.router.reason == "waiting up to 60 s for llama-server to see CUDA0"
        host.invisible = ()
        await it.reaches(RouterState.READY, within_s=5.0)
        assert it.process.autoload
        assert it.router.reason is None


async def test_a_device_that_stays_away_degrades(host: FakeHost) -> None:
    """After 60 s the router comes up DEGRADED, loads nothing, not even for clients, and never falls back to the CPU."""
    host.invisible = ("CUDA0",)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.DEGRADED)
        assert anyio.current_time() == pytest.approx(DEVICE_DEADLINE_S, abs=2.0)
        assert not it.process.autoload
        assert "does not see CUDA0" in (it.router.reason or "")
        with pytest.raises(DeviceMissingError, match="CUDA0"):
            await it.router.load("alpha")
        await anyio.sleep(HOUR_S)
        assert (it.spawns, it.router.state) == (1, RouterState.DEGRADED)
        assert it.process.loads == []


async def test_a_load_asked_for_during_the_wait_for_a_device(host: FakeHost) -> None:
    """A load waits with the start, and is refused once the device is given up."""
    host.invisible = ("CUDA0",)
    async with supervised(host) as it:
        it.router.start()
        with pytest.raises(DeviceMissingError):
            await it.router.load("alpha")
        assert anyio.current_time() == pytest.approx(DEVICE_DEADLINE_S, abs=2.0)


async def test_a_device_that_appears_after_all(host: FakeHost) -> None:
    """A router without its device is restarted when the device appears, and then serves as it should."""
    host.invisible = ("CUDA0",)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.DEGRADED)
        await anyio.sleep(100.0)
        host.invisible = ()
        await it.reaches(RouterState.READY, within_s=15.0)
        assert it.process.autoload
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)] == [None, Cause.DEVICE]
        assert it.router.comeback.history.failures == 0
        assert await it.router.load("alpha")


async def test_what_was_loaded_returns_with_its_device(host: FakeHost) -> None:
    """Models that were resident before the device vanished are loaded again when it is back."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        host.invisible = ("CUDA0",)
        it.process.end(KILLED)
        await it.reaches(RouterState.DEGRADED)
        assert it.process.loads == []
        host.invisible = ()
        await it.until(lambda: it.model("alpha") is ModelState.LOADED, within_s=30.0)


async def test_a_replaced_binary(host: FakeHost) -> None:
    """D4: a router whose llama-server was replaced loads nothing more, and is restarted once it holds no model."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        host.build += 1
        await it.reaches(RouterState.DEGRADED, within_s=10.0)
        with pytest.raises(RouterNotReadyError, match="replaced"):
            await it.router.load("beta")
        await anyio.sleep(HOUR_S)
        assert (it.spawns, it.model("alpha")) == (1, ModelState.LOADED)
        await it.router.unload("alpha")
        await it.reaches(RouterState.READY, within_s=2.0)
        await anyio.sleep(60.0)
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)] == [None, Cause.UPGRADE]
        assert await it.router.load("beta")


async def test_a_replaced_binary_does_not_wake_a_stopped_router(host: FakeHost) -> None:
    """A router that was stopped stays down, though its llama-server was replaced while it still ran."""
    host.usual = FakeStart(term_s=3.0)
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        host.build += 1
        await it.reaches(RouterState.DEGRADED)
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        await anyio.sleep(HOUR_S)
        assert (it.router.state, it.spawns) == (RouterState.STOPPED, 1)


async def test_a_binary_that_is_replaced_while_its_router_stops(host: FakeHost) -> None:
    """Who wants a router down has the last word, also when what is seen meanwhile calls for another process."""
    host.usual = FakeStart(term_s=9.0)
    async with supervised(host) as it:
        await it.comes_up()
        it.router.stop()
        await it.reaches(RouterState.STOPPING)
        host.build += 1
        await it.reaches(RouterState.STOPPED)
        await anyio.sleep(HOUR_S)
        assert (it.router.state, it.spawns) == (RouterState.STOPPED, 1)
