"""The life of one supervised router, on virtual time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import anyio
import pytest

from fakes.host import KILLED, FakeHost, FakeStart
from fakes.supervised import supervised
from llamavisor.cause import Cause, Verdict
from llamavisor.errors import DeviceMissingError, RouterNotReadyError, SpawnError
from llamavisor.events import (
    RouterCrashLoop,
    RouterDegraded,
    RouterExited,
    RouterFailed,
    RouterReady,
    RouterRestartScheduled,
    RouterSpawned,
    RouterStateChanged,
    StraysKilled,
)
from llamavisor.generation import DEVICE_DEADLINE_S, START_DEADLINE_S
from llamavisor.process import TERM_GRACE_S, ExitStatus, Leftovers
from llamavisor.states import ModelState, RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

HOUR_S = 3600.0
BAD_FLAG = FakeStart(ready_at=math.inf, ends_at=0.01, prints=("error: invalid argument: --nosuchflag",))
NO_BINARY = Verdict(Cause.BAD_BINARY, "no llama-server was found", "install one", is_obstacle=True)
NO_FOLDER = Verdict(Cause.MODELS_DIR, "models_dir /m does not exist", "create it", is_obstacle=True)


def _crash(after_s: float = 0.2, **how: object) -> FakeStart:
    """A start that ends before it is ready."""
    return FakeStart(ready_at=math.inf, ends_at=after_s, **how)


# --- up and down ------------------------------------------------------------------------------------------------------


async def test_a_router_comes_up(host: FakeHost) -> None:
    """A start leads through STARTING to READY, and the first start of all is no restart."""
    async with supervised(host) as it:
        await it.comes_up()
        changes = [(change.old, change.new) for change in it.story.of(RouterStateChanged)]
        assert changes == [
            (RouterState.STOPPED, RouterState.STARTING),
            (RouterState.STARTING, RouterState.READY),
        ]
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)] == [None]
        assert (it.router.restarts, it.router.starts) == (0, 1)
        assert it.router.process is it.process
        assert it.story.of(RouterReady)[0].start_s == pytest.approx(0.05, abs=0.02)
        assert [model.name for model in it.router.table] == ["alpha", "beta", "gamma"]


async def test_a_second_start_changes_nothing(host: FakeHost) -> None:
    """Starting a router that is up, or on its way up, starts no second process."""
    async with supervised(host) as it:
        it.router.start()
        await it.comes_up()
        it.router.start()
        await anyio.sleep(HOUR_S)
        assert it.spawns == 1


async def test_a_requested_stop_is_never_restarted(host: FakeHost) -> None:
    """P2: a router that was stopped stays down, for hours, and its end counts as asked for."""
    async with supervised(host) as it:
        await it.comes_up()
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        assert host.machine.left == []
        await anyio.sleep(2 * HOUR_S)
        assert it.spawns == 1
        assert [exited.is_requested for exited in it.story.of(RouterExited)] == [True]
        assert it.story.of(RouterRestartScheduled) == []
        assert it.router.process is None


async def test_a_restart_gives_a_fresh_process(host: FakeHost) -> None:
    """A requested restart ends the old process before the new one, and counts as a restart."""
    async with supervised(host) as it:
        await it.comes_up()
        old = it.process
        it.router.restart()
        await it.until(lambda: it.router.starts == 2)
        await it.reaches(RouterState.READY)
        assert old.is_cleared
        assert it.process is not old
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)] == [None, Cause.REQUESTED]
        assert it.router.restarts == 1


async def test_a_router_that_ignores_sigterm_is_killed(host: FakeHost) -> None:
    """P8: a stop ends with SIGKILL after the grace, and still ends in STOPPED."""
    host.usual = FakeStart(term_s=math.inf)
    async with supervised(host) as it:
        await it.comes_up()
        process, asked_at = it.process, anyio.current_time()
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        assert process.status == KILLED
        assert anyio.current_time() - asked_at == pytest.approx(TERM_GRACE_S, abs=0.1)


@pytest.mark.parametrize("how", ["stop", "shut_down"])
async def test_a_router_that_survives_sigkill_is_left(host: FakeHost, how: str) -> None:
    """A process that the kernel holds even against SIGKILL is told and left: nobody waits for it for ever."""
    host.usual = FakeStart(is_unkillable=True)
    async with supervised(host) as it:
        await it.comes_up()
        process = it.process
        if how == "shut_down":
            with anyio.fail_after(60.0):
                await it.router.shut_down()
        else:
            it.router.stop()
            await it.reaches(RouterState.STOPPED, within_s=60.0)
            await it.settle()
            it.router.start()
            await it.reaches(RouterState.FAILED)
            assert it.router.reason == "port 8080 is taken by main"
        assert [strays.survivors for strays in it.story.of(StraysKilled)] == [(process.pid,)]
        assert [exited.pid for exited in it.story.of(RouterExited)] == [process.pid]
        process.end(KILLED)
        process.clear_now()
        if how == "stop":
            host.usual = FakeStart()
            await it.reaches(RouterState.READY, within_s=2.0)


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.0115, 0.0125, 0.03, 0.06])
async def test_a_stop_during_a_start(host: FakeHost, after_s: float) -> None:
    """A stop at any point of a start leads to STOPPED at once, and nothing is left."""
    async with supervised(host) as it:
        it.router.start()
        await anyio.sleep(after_s)
        it.router.stop()
        await it.reaches(RouterState.STOPPED, within_s=1.0)
        assert host.machine.left == []
        await anyio.sleep(HOUR_S)
        assert it.spawns <= 1
        assert it.router.state is RouterState.STOPPED


async def test_a_stop_during_the_backoff(host: FakeHost) -> None:
    """A stop in BACKOFF takes effect at once, and the retry that was due never comes."""
    host.usual = _crash()
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.BACKOFF)
        assert it.router.retry_at == pytest.approx(anyio.current_time() + 1.0)
        it.router.stop()
        await it.reaches(RouterState.STOPPED, within_s=0.5)
        assert it.router.retry_at is None
        await anyio.sleep(HOUR_S)
        assert it.spawns == 1


async def test_a_stop_during_a_restart(host: FakeHost) -> None:
    """A stop while the old process of a restart still ends keeps the new one from starting."""
    host.usual = FakeStart(term_s=5.0)
    async with supervised(host) as it:
        await it.comes_up()
        it.router.restart()
        await it.reaches(RouterState.STOPPING)
        await anyio.sleep(1.0)
        it.router.stop()
        await it.reaches(RouterState.STOPPED, within_s=5.0)
        await anyio.sleep(HOUR_S)
        assert it.spawns == 1


async def test_a_start_during_a_stop(host: FakeHost) -> None:
    """A start while the process still ends leads to a fresh process: the last wish wins."""
    host.usual = FakeStart(term_s=5.0)
    async with supervised(host) as it:
        await it.comes_up()
        it.router.stop()
        await it.reaches(RouterState.STOPPING)
        it.router.start()
        await it.until(lambda: it.router.starts == 2)
        await it.reaches(RouterState.READY)
        assert it.spawns == 2


async def test_strays_are_reported(host: FakeHost) -> None:
    """P9: what the end of a router left behind and had to be killed is an event."""
    host.starts.append(FakeStart(leftovers=Leftovers(killed=(77,), survivors=(78,))))
    async with supervised(host) as it:
        await it.comes_up()
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        assert it.story.of(StraysKilled) == [StraysKilled(router="main", pids=(77,), survivors=(78,))]


# --- crashes ----------------------------------------------------------------------------------------------------------


async def test_a_clean_exit_that_nobody_asked_for_is_a_failure(host: FakeHost) -> None:
    """P2: a router that exits with 0 unasked is started again."""
    host.starts.append(FakeStart(ends_at=30.0, status=ExitStatus(code=0)))
    async with supervised(host) as it:
        await it.comes_up()
        await it.until(lambda: it.spawns == 2)
        await it.reaches(RouterState.READY)
        assert [exited.is_requested for exited in it.story.of(RouterExited)] == [False]
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)] == [None, Cause.EXIT]


async def test_a_killed_router_is_back_at_once(host: FakeHost) -> None:
    """P1: a router that had been READY for 10 s is started again without delay, and the signal is named."""
    async with supervised(host) as it:
        await it.comes_up()
        await anyio.sleep(15.0)
        it.process.end(KILLED)
        await it.until(lambda: it.spawns == 2, within_s=0.2)
        await it.reaches(RouterState.READY, within_s=0.2)
        exited = it.story.of(RouterExited)[0]
        assert (exited.cause, exited.status) == (Cause.SIGNAL, "SIGKILL")
        assert "possibly out of memory" in exited.message()
        assert it.router.history.failures == 0
        assert it.router.reason is None


async def test_twenty_crashes_before_ready(host: FakeHost) -> None:
    """P3: the delays are 1, 2, 4 ... 60 s, a crash loop is raised once, at 10, and the retries never end."""
    host.usual = _crash(0.2)
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.spawns == 21)
        delays = [scheduled.delay_s for scheduled in it.story.of(RouterRestartScheduled)]
        assert delays == [1, 2, 4, 8, 16, 32, *[60] * 14]
        assert [loop.failures for loop in it.story.of(RouterCrashLoop)] == [10]
        ended = it.story.times(RouterExited)
        assert it.story.times(RouterCrashLoop) == [ended[9]]
        pauses = [spawn - end for end, spawn in zip(ended, host.machine.spawned_at[1:], strict=True)]
        assert pauses == pytest.approx(delays, abs=0.05)
        assert all(pause >= delay for pause, delay in zip(pauses, delays, strict=True))
        assert it.router.history.is_crash_loop
        assert (it.router.restarts, it.router.state) == (20, RouterState.STARTING)


async def test_jitter_stretches_the_delay(host: FakeHost) -> None:
    """The random source decides how much of the 25 % is added."""
    host.usual = _crash()
    async with supervised(host, jitter=0.5) as it:
        it.router.start()
        await it.until(lambda: it.spawns == 4)
        delays = [scheduled.delay_s for scheduled in it.story.of(RouterRestartScheduled)]
        assert delays == [1.125, 2.25, 4.5]


async def test_there_is_never_more_than_one_start_a_second(host: FakeHost) -> None:
    """Whatever mixture of ends a router meets, it is not started twice within a second."""
    ends_at = [0.0, 0.1, 10.06, 0.0, 25.0, 3.0, 10.1, 10.2, 0.0, 400.0, 0.0, 10.1]
    host.starts.extend(FakeStart(ready_at=0.02, ends_at=end) for end in ends_at)
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.spawns == len(ends_at) + 1)
        spawns = host.machine.spawned_at
        assert min(later - earlier for earlier, later in itertools.pairwise(spawns)) >= 1.0


async def test_failures_are_forgiven_after_five_minutes_ready(host: FakeHost) -> None:
    """The count of failures is nought again once the router has been READY for 5 min, and not before."""
    host.starts.extend([_crash(), _crash(), _crash()])
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.READY)
        await anyio.sleep(299.0)
        assert it.router.history.failures == 3
        await anyio.sleep(3.0)
        assert it.router.history.failures == 0


async def test_a_manual_restart_leaves_the_budget_alone(host: FakeHost) -> None:
    """A restart in BACKOFF begins at once; it neither counts as a failure nor clears the count."""
    host.starts.extend([_crash() for _ in range(5)])
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.router.history.failures == 5)
        assert it.router.state is RouterState.BACKOFF
        it.router.restart()
        await it.reaches(RouterState.READY, within_s=0.5)
        assert it.router.history.failures == 5
        await anyio.sleep(HOUR_S)
        assert it.spawns == 6


async def test_a_router_that_never_answers_is_overdue(host: FakeHost) -> None:
    """H4: a router that is not ready in time is ended, and tried again after a backoff."""
    host.starts.append(FakeStart(ready_at=600.0, term_s=3.0))
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.router.process is not None)
        began = anyio.current_time()
        await anyio.sleep(1.0)
        assert it.router.reason == "it does not answer yet: All connection attempts failed"
        await it.reaches(RouterState.STOPPING)
        assert anyio.current_time() - began == pytest.approx(START_DEADLINE_S, abs=0.1)
        assert it.story.of(RouterReady) == []
        await it.reaches(RouterState.BACKOFF)
        assert it.router.reason == "not ready within 60 s"
        assert it.router.history.failures == 1
        await it.reaches(RouterState.READY)
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)] == [None, Cause.START_TIMEOUT]


async def test_the_next_process_waits_until_the_last_has_gone(host: FakeHost) -> None:
    """A restart without delay still waits until everything of the old process is cleared away."""
    host.starts.append(FakeStart(ends_at=20.0, clear_s=3.0))
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.spawns == 2)
        first, second = host.machine.processes
        assert second.spawned_at - (first.spawned_at + 20.0) == pytest.approx(3.0, abs=0.05)


async def test_stop_means_gone_of_the_last_process_too(host: FakeHost) -> None:
    """A router stopped while it waits for the remains of a crash is not called stopped before these have gone."""
    host.starts.append(FakeStart(ends_at=20.0, clear_s=3.0))
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.router.starts == 2)
        assert host.machine.left != []
        await it.router.shut_down()
        assert it.router.state is RouterState.STOPPED
        assert host.machine.left == []


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
    verdict = Verdict(Cause.STATE_DIR, "cannot write the router's files: No space left on device")
    host.starts.extend([FakeStart(error=verdict)] * 3)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.BACKOFF)
        assert it.router.reason == verdict.reason
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
    """Two probes in a row without an answer make it DEGRADED; one answer makes it READY again."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.is_silent = True
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
        await anyio.sleep(16.0)
        it.process.is_silent = False
        await anyio.sleep(60.0)
        assert it.story.of(RouterDegraded) == []


async def test_slow_probes_are_not_counted_across_a_crash(host: FakeHost) -> None:
    """A slow answer of one process and a slow answer of the next are not two in a row."""
    async with supervised(host) as it:
        await it.comes_up()
        for _ in range(2):
            it.process.is_silent = True
            await anyio.sleep(16.0)
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
        assert it.router.history.failures == 0
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
        assert it.router.history.failures == 0
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


# --- the end of it all ------------------------------------------------------------------------------------------------


async def test_shut_down_returns_when_nothing_is_left(host: FakeHost) -> None:
    """After shut_down no process is left."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.shut_down()
        assert host.machine.left == []
        assert it.router.state is RouterState.STOPPED


async def test_shut_down_of_a_router_that_was_only_just_told_to_start(host: FakeHost) -> None:
    """A start that the owner has not even seen yet does not survive a shut_down."""
    async with supervised(host) as it:
        it.router.start()
        await it.router.shut_down()
        assert (it.router.starts, host.machine.left) == (1, [])
        await anyio.sleep(HOUR_S)
        assert host.machine.alive == []


async def test_a_second_shut_down_hurries(host: FakeHost) -> None:
    """D6: a second, shorter grace takes effect at once on a process that ignores the first SIGTERM."""
    host.usual = FakeStart(term_s=math.inf)
    async with supervised(host) as it:
        await it.comes_up()
        began = anyio.current_time()
        async with anyio.create_task_group() as group:
            group.start_soon(it.router.shut_down)
            await anyio.sleep(1.0)
            await it.router.shut_down(grace_s=0.5)
            assert anyio.current_time() - began == pytest.approx(1.5, abs=0.1)
        assert anyio.current_time() - began == pytest.approx(1.5, abs=0.1)


async def test_shut_down_of_a_router_that_is_down(host: FakeHost) -> None:
    """shut_down of a router that is FAILED, or never ran, returns at once, and so does another one after it."""
    host.starts.append(BAD_FLAG)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        with anyio.fail_after(1.0):
            await it.router.shut_down()
            await it.router.shut_down()
        assert it.router.state is RouterState.STOPPED
    async with supervised(host) as it:
        with anyio.fail_after(1.0):
            await it.router.shut_down()


async def test_a_router_ends_with_its_shut_down(host: FakeHost) -> None:
    """After shut_down the owner's task is over, and who asks for a model is told instead of waiting for ever."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.shut_down()
        await it.settle()
        assert it.has_ended
        with anyio.fail_after(1.0), pytest.raises(RouterNotReadyError):
            await it.router.load("alpha")


async def test_wishes_of_a_router_that_is_down_are_refused(host: FakeHost) -> None:
    """A load on a STOPPED or FAILED router fails at once and says why."""
    host.starts.append(BAD_FLAG)
    async with supervised(host) as it:
        with pytest.raises(RouterNotReadyError, match="router main is stopped"):
            await it.router.load("alpha")
        it.router.start()
        await it.reaches(RouterState.FAILED)
        with pytest.raises(RouterNotReadyError, match="router main is failed: error: invalid argument") as refused:
            await it.router.load("alpha")
        assert refused.value.hint == "correct `args` in the configuration"


# --- other settings ---------------------------------------------------------------------------------------------------


async def test_a_new_configuration_restarts_the_router(host: FakeHost, make_host: Callable[..., FakeHost]) -> None:
    """A reconfigured router goes over to its new host, and what was resident is loaded again there."""
    other = make_host(port=8099, machine=host.machine)
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("beta")
        it.router.reconfigure(other)
        await it.until(lambda: it.router.starts == 2)
        await it.until(lambda: it.model("beta") is ModelState.LOADED)
        assert it.router.settings.port == 8099
        assert [process.host for process in host.machine.alive] == [other]
        assert it.story.of(RouterSpawned)[1].cause is Cause.REQUESTED


async def test_a_new_configuration_of_a_stopped_router(host: FakeHost, make_host: Callable[..., FakeHost]) -> None:
    """A reload wakes no router that somebody has stopped, or is stopping; its next start uses the new settings."""
    host.usual = FakeStart(term_s=2.0)
    other = make_host(port=8099, machine=host.machine)
    async with supervised(host) as it:
        await it.comes_up()
        it.router.stop()
        await it.reaches(RouterState.STOPPING)
        it.router.reconfigure(other)
        await it.reaches(RouterState.STOPPED)
        await anyio.sleep(HOUR_S)
        it.router.reconfigure(other)
        await anyio.sleep(HOUR_S)
        assert (it.router.state, it.spawns) == (RouterState.STOPPED, 1)
        await it.comes_up()
        assert [process.host for process in host.machine.alive] == [other]


async def test_a_new_configuration_clears_a_failure(host: FakeHost, make_host: Callable[..., FakeHost]) -> None:
    """P4: a FAILED router is tried again with new settings; so is one in BACKOFF, at once."""
    host.starts.append(BAD_FLAG)
    bad = make_host(machine=host.machine)
    bad.usual = _crash()
    good = make_host(machine=host.machine)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.FAILED)
        it.router.reconfigure(bad)
        await it.until(lambda: it.router.history.failures == 6)
        assert it.router.state is RouterState.BACKOFF
        it.router.reconfigure(good)
        await it.reaches(RouterState.READY, within_s=0.5)
