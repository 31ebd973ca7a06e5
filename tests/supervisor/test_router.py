"""The life of one supervised router, on virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable

import anyio
import pytest

from fakes.host import FakeHost
from fakes.machine import KILLED, FakeStart
from fakes.supervised import supervised
from llamavisor.cause import Cause, Verdict
from llamavisor.errors import RouterNotReadyError
from llamavisor.events import (
    RouterExited,
    RouterReady,
    RouterRestartScheduled,
    RouterSpawned,
    RouterStateChanged,
    StraysKilled,
)
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
        assert it.router.comeback.retry_at == pytest.approx(anyio.current_time() + 1.0)
        it.router.stop()
        await it.reaches(RouterState.STOPPED, within_s=0.5)
        assert it.router.comeback.retry_at is None
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
        assert it.router.comeback.history.failures == 0
        assert it.router.reason is None


async def test_jitter_stretches_the_delay(host: FakeHost) -> None:
    """The random source decides how much of the 25 % is added."""
    host.usual = _crash()
    async with supervised(host, jitter=0.5) as it:
        it.router.start()
        await it.until(lambda: it.spawns == 4)
        delays = [scheduled.delay_s for scheduled in it.story.of(RouterRestartScheduled)]
        assert delays == [1.125, 2.25, 4.5]


async def test_failures_are_forgiven_after_five_minutes_ready(host: FakeHost) -> None:
    """The count of failures is nought again once the router has been READY for 5 min, and not before."""
    host.starts.extend([_crash(), _crash(), _crash()])
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.READY)
        await anyio.sleep(299.0)
        assert it.router.comeback.history.failures == 3
        await anyio.sleep(3.0)
        assert it.router.comeback.history.failures == 0


async def test_a_manual_restart_leaves_the_budget_alone(host: FakeHost) -> None:
    """A restart in BACKOFF begins at once; it neither counts as a failure nor clears the count."""
    host.starts.extend([_crash() for _ in range(5)])
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.router.comeback.history.failures == 5)
        assert it.router.state is RouterState.BACKOFF
        it.router.restart()
        await it.reaches(RouterState.READY, within_s=0.5)
        assert it.router.comeback.history.failures == 5
        await anyio.sleep(HOUR_S)
        assert it.spawns == 6


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
        await it.until(lambda: it.router.comeback.history.failures == 6)
        assert it.router.state is RouterState.BACKOFF
        it.router.reconfigure(good)
        await it.reaches(RouterState.READY, within_s=0.5)
