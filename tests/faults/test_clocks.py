"""T1 and T2 for a whole fleet: a wall clock that somebody sets, and a night in which nothing of us runs.

What single routers make of it is in tests/supervisor/test_gaps.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from trio.testing import MockClock

from fakes.fleet import GIB, GatewayStage, models
from fakes.machine import FakeModel
from fakes.waiting import eventually
from llamavisor.demands import DRAIN_AFTER_S, STALL_S, Why
from llamavisor.errors import DemandRefusedError
from llamavisor.events import DemandRefused, ModelQuarantined, ModelUnloaded, RouterDegraded, RouterExited, UnloadReason
from llamavisor.gaps import GAP_S
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.quarantine import FIRST_S
from llamavisor.settings import RouterSettings
from running import RunningDaemon

HOUR_S = 3600.0
NIGHT_S = 8 * HOUR_S
TTL_S = 300.0


def stage(folder: Path) -> GatewayStage:
    """Models of 4 GiB, one of 9 GiB and one that cannot be loaded; a router has room for two of the former."""
    folder.mkdir()
    kinds = models(["alpha", "beta", "gamma"]) | models(["large"], gib=9)
    return GatewayStage(folder, kinds | {"broken": FakeModel(exit_code=1, takes={"RAM": GIB})})


def with_ttl(it: GatewayStage) -> RouterSettings:
    """Models that nobody uses leave after five minutes."""
    return replace(it.router(), layers=(OptionLayer("[defaults]", ModelOptions(ttl=TTL_S)),))


# --- T1: the wall clock -----------------------------------------------------------------------------------------------


async def _day(it: GatewayStage, set_clock: Callable[[], None]) -> list[tuple[float, str]]:
    """What is told, and when, while models come, fail, wait, make room for others and expire."""
    async with it.running(with_ttl(it)):
        began = anyio.current_time()
        await it.served("alpha", "beta")
        set_clock()
        await it.served("alpha", "gamma")  # beta, the least recently used, makes room
        set_clock()
        await _is_refused(it, "broken")
        set_clock()
        await _is_refused(it, "broken")
        await anyio.sleep(FIRST_S)
        await _is_refused(it, "broken")  # it was tried again
        first = it.client("alpha")
        await it.until(lambda: first.has_it)
        second = it.client("gamma")
        await it.until(lambda: second.has_it)
        waiting = it.client("large")
        await anyio.sleep(DRAIN_AFTER_S / 2)
        set_clock()
        await it.until(lambda: waiting.is_over)
        first.leave()
        await anyio.sleep(TTL_S / 2)
        second.leave()
        set_clock()
        await anyio.sleep(2 * TTL_S)
    # What happens at the same moment has no order.
    return sorted((round(at - began, 3), event.message().replace(str(it._folder), "")) for at, event in it.story.all)


async def _is_refused(it: GatewayStage, model: str) -> None:
    client = it.client(model)
    await it.until(lambda: client.is_answered)
    assert isinstance(client.error, DemandRefusedError), client


@pytest.mark.anyio
@pytest.mark.parametrize("offset_s", [-HOUR_S, HOUR_S], ids=["back", "on"])
async def test_t1_the_wall_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, virtual_time: MockClock, offset_s: float
) -> None:
    """T1: who leaves, who is refused, what is tried again and what expires, and when, is the same at any hour.

    On virtual time with `time.time` replaced: the clock on the wall is that of the whole machine.
    """
    shown, true = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: true() + shown[0])

    def set_clock() -> None:
        shown[0] += offset_s

    told = await _day(it := stage(tmp_path / "true"), lambda: None)
    why = [event.reason for event in it.story.of(ModelUnloaded)]
    assert (why.count(UnloadReason.EVICTED), why.count(UnloadReason.EXPIRED)) == (1, 2)
    assert [event.reason for event in it.story.of(DemandRefused)] == [*[Why.QUARANTINED.value] * 3, Why.STALLED.value]
    assert [event.for_s for event in it.story.of(ModelQuarantined)] == pytest.approx([FIRST_S, 2 * FIRST_S])
    assert await _day(stage(tmp_path / "set"), set_clock) == told


# --- T2: a suspension -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_t2_a_night_of_sleep(tmp_path: Path, virtual_time: MockClock) -> None:
    """T2: after eight hours in which nothing ran nobody is unloaded, killed or refused; who waited is served.

    On virtual time, where the clock jumps while every task waits: what a suspension is if the clock goes on.
    """
    it = stage(tmp_path / "it")
    async with it.running(with_ttl(it)):
        await it.served("alpha")
        holder = it.client("beta")
        await it.until(lambda: holder.has_it)
        await anyio.sleep(TTL_S / 2)
        waiting = it.client("large")  # beta has to leave for it, and alpha
        await anyio.sleep(DRAIN_AFTER_S / 2)
        virtual_time.jump(NIGHT_S)
        await anyio.sleep(DRAIN_AFTER_S / 3)
        assert it.loaded() == {"alpha", "beta"}
        assert holder.has_it
        assert not waiting.is_answered
        assert not [*it.story.of(ModelUnloaded), *it.story.of(DemandRefused)]
        assert not [*it.story.of(RouterDegraded), *it.story.of(RouterExited)]
        holder.leave()
        await it.until(lambda: waiting.has_it, within_s=10.0)
        assert it["main"].starts == 1


@pytest.mark.anyio
async def test_t2_a_night_amid_a_load(tmp_path: Path, virtual_time: MockClock) -> None:
    """T2: a load goes on after the night, and who waits for it is served; a model in quarantine is tried again.

    On virtual time, as above.
    """
    it = stage(tmp_path / "it")
    it.models["alpha"] = FakeModel(load_s=NIGHT_S + 40.0, progress=(), takes={"RAM": 4 * GIB})
    async with it.running():
        await _is_refused(it, "broken")
        waiting = it.client("alpha")
        await anyio.sleep(25.0)
        virtual_time.jump(NIGHT_S)
        await it.until(lambda: waiting.is_answered, within_s=20.0)
        assert waiting.has_it, waiting
        assert it.hosts["main"].process.loads == ["broken", "broken", "alpha"]
        it.hosts["main"].models["broken"].exit_code = 0
        await it.served("broken")


@pytest.mark.anyio
async def test_t2_nobody_was_idle_at_night(tmp_path: Path, virtual_time: MockClock) -> None:
    """T2: the ttl of a model, and the patience of who waits, go on where they were; they are not begun anew.

    On virtual time, as above.
    """
    it = stage(tmp_path / "it")
    async with it.running(with_ttl(it)):
        await it.served("gamma")
        idle_since = anyio.current_time()
        await anyio.sleep(TTL_S / 2)
        virtual_time.jump(NIGHT_S)
        await it.until(lambda: it.story.of(ModelUnloaded))
        assert anyio.current_time() - idle_since - NIGHT_S == pytest.approx(TTL_S, abs=5.0)
        holder = it.client("alpha")
        await it.until(lambda: holder.has_it)
        waiting = it.client("large")
        asked_at = anyio.current_time()
        await anyio.sleep(STALL_S / 2)
        virtual_time.jump(NIGHT_S)
        await it.until(lambda: waiting.is_over)
        assert isinstance(waiting.error, DemandRefusedError)
        assert waiting.error.reason == Why.STALLED.value
        assert anyio.current_time() - asked_at - NIGHT_S == pytest.approx(STALL_S, abs=5.0)


@pytest.mark.real
def test_t2_a_daemon_that_is_stopped(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """T2: a daemon that is stopped for some seconds leaves its router and its models as they are when it goes on."""
    with RunningDaemon(tmp_path, models_dir, llama_server, serve="router") as daemon:
        daemon.wait_for_router("ready")
        for name in ("alpha", "beta"):
            assert daemon.cli("load", name).returncode == 0
        before = pids(daemon)
        daemon.signal(signal.SIGSTOP)
        try:
            time.sleep(GAP_S + 3.0)  # nothing else tells that a gap is long enough to be one
            assert daemon.chat("alpha") == "I am alpha", "clients do not need it"
        finally:
            daemon.signal(signal.SIGCONT)
        eventually(lambda: daemon.status()["ready"], what="a daemon that answers")
        probes = probed(daemon)
        eventually(lambda: probed(daemon) > probes, what="another look at the router")
        assert pids(daemon) == before
        for kind in ("ModelUnloaded", "RouterDegraded", "RouterExited", "Warned"):
            assert daemon.events(kind) == []
        assert daemon.chat("beta") == "I am beta"


def pids(daemon: RunningDaemon) -> dict[str, int]:
    """The processes of the daemon that matter to clients."""
    return {name: daemon.model(name)["pid"] for name in ("alpha", "beta")} | {"router": daemon.router()["pid"]}


def probed(daemon: RunningDaemon) -> float:
    """How often the router was asked whether it answers."""
    name = 'llamavisor_router_probe_duration_seconds_count{router="main"} '
    return sum(float(line.removeprefix(name)) for line in daemon.metrics().splitlines() if line.startswith(name))
