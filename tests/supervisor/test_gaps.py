"""Clocks that jump: times in which nothing ran count for nothing, and the wall clock counts for nothing at all."""

from __future__ import annotations

import ast
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

import llamavisor
from fakes.host import FakeHost
from fakes.machine import KILLED, FakeModel, FakeStart
from fakes.supervised import Supervised, Waiter, supervised
from llamavisor.admission import Admission
from llamavisor.demands import Grant
from llamavisor.errors import ModelLoadError
from llamavisor.events import Event, RouterDegraded, RouterProbed, Warned
from llamavisor.eviction import Budget
from llamavisor.gaps import GAP_S, Gaps, was_missed
from llamavisor.generation import PROBE_INTERVAL_S, PROBE_PAUSE_S, PROBE_TIMEOUT_S, START_DEADLINE_S
from llamavisor.healing import LOAD_DEADLINE_S
from llamavisor.placement import Candidate
from llamavisor.states import ModelState, RouterState

HOUR_S = 3600.0
NIGHT_S = 8 * HOUR_S
FOREVER = FakeModel(load_s=math.inf, progress=())


# --- the gaps themselves ----------------------------------------------------------------------------------------------


def test_what_happens_in_time_is_no_gap() -> None:
    """Times as they are expected, and some seconds late, are none; the first time has nothing before it."""
    gaps = Gaps(1.0)
    assert [gaps.pass_s(now) for now in (100.0, 101.0, 101.2, 101.2 + 1.0 + GAP_S)] == [0.0] * 4
    assert not gaps.has_disturbed(0.0)


def test_a_gap_is_told_once_and_without_the_expected_time() -> None:
    """What is told is how much longer it took than it may."""
    gaps = Gaps(10.0)
    gaps.pass_s(0.0)
    assert gaps.pass_s(10.0 + NIGHT_S) == NIGHT_S
    assert gaps.pass_s(20.0 + NIGHT_S) == 0.0


def test_what_a_gap_disturbs() -> None:
    """What began before its end is disturbed, and what began soon after it if that counts."""
    gaps = Gaps(1.0)
    gaps.pass_s(0.0)
    gaps.pass_s(100.0)
    assert gaps.has_disturbed(99.9)
    assert not gaps.has_disturbed(100.0)
    assert gaps.has_disturbed(100.0, within_s=5.0)
    assert not gaps.has_disturbed(105.0, within_s=5.0)


def test_a_deadline_that_was_missed() -> None:
    """A deadline that is seen in time counts; one that is seen much later passed while nobody could look."""
    assert not was_missed(10.0, 10.0 + GAP_S)
    assert was_missed(10.0, 10.1 + GAP_S)


@given(st.lists(st.floats(0.0, 1e6), max_size=20))
def test_gaps_never_add_up_to_more_than_the_time_that_has_passed(steps: list[float]) -> None:
    """Who shifts a deadline by every gap never shifts it beyond the present."""
    gaps, now, shifted = Gaps(1.0), 0.0, 0.0
    gaps.pass_s(now)
    for step in steps:
        now += step
        shifted += gaps.pass_s(now)
        assert shifted <= now


# --- a router through a gap -------------------------------------------------------------------------------------------


async def _through(it: Supervised, clock: MockClock, gap_s: float = NIGHT_S) -> None:
    """Nothing of us runs for so long."""
    clock.jump(gap_s)
    await it.settle()


@pytest.mark.anyio
async def test_no_load_is_cancelled_by_a_gap_and_a_real_stall_is(host: FakeHost, virtual_time: MockClock) -> None:
    """T2: eight hours in which nothing ran cancel no load; a minute without progress after them does."""
    host.models["alpha"] = FOREVER
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        began = anyio.current_time()
        group.start_soon(waiter, it.router.load, "alpha")
        await anyio.sleep(LOAD_DEADLINE_S - 30.0)
        await _through(it, virtual_time)
        await anyio.sleep(20.0)
        assert (it.model("alpha"), it.process.unloads) == (ModelState.LOADING, [])
        await it.until(lambda: waiter.is_done)
        assert isinstance(waiter.error, ModelLoadError)
        # The tick before the gap is up to a second old when it begins, and so is the look at the deadline.
        assert anyio.current_time() - began - NIGHT_S == pytest.approx(LOAD_DEADLINE_S, abs=3.5)
        assert len(it.story.of(Warned)) == 1


@pytest.mark.anyio
async def test_a_probe_beside_a_gap_does_not_count(host: FakeHost, virtual_time: MockClock) -> None:
    """T2: of a probe that met with a gap, and of those before it, nothing is believed; of later ones everything."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.is_silent = True
        await anyio.sleep(PROBE_INTERVAL_S + PROBE_TIMEOUT_S + PROBE_PAUSE_S + 1.0)  # the second one is under way
        await _through(it, virtual_time)
        await anyio.sleep(2 * PROBE_PAUSE_S + PROBE_TIMEOUT_S + 1.0)  # one that is too soon, and one that counts
        it.process.is_silent = False
        await anyio.sleep(120.0)
        assert it.story.of(RouterDegraded) == []
        assert len([probed for probed in it.story.of(RouterProbed) if probed.error]) == 4
        it.process.is_silent = True
        await it.reaches(RouterState.DEGRADED)


@pytest.mark.anyio
async def test_a_probe_right_after_a_gap_does_not_count(host: FakeHost, virtual_time: MockClock) -> None:
    """T2: a machine that has just woken up may be slow once more than at other times."""
    async with supervised(host) as it:
        await it.comes_up()
        await anyio.sleep(PROBE_INTERVAL_S - 2.0)
        it.process.is_silent = True
        await _through(it, virtual_time)
        slow_s = PROBE_TIMEOUT_S + PROBE_PAUSE_S + PROBE_TIMEOUT_S + 0.1  # this and the next probe
        await anyio.sleep(slow_s)
        it.process.is_silent = False
        await anyio.sleep(60.0)
        assert it.story.of(RouterDegraded) == []
        it.process.is_silent = True
        await anyio.sleep(slow_s + PROBE_INTERVAL_S)
        assert len(it.story.of(RouterDegraded)) == 1


@pytest.mark.anyio
async def test_a_gap_ends_no_trouble(host: FakeHost, virtual_time: MockClock) -> None:
    """A router that does not answer still does not after a gap, until it does."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.is_silent = True
        await it.reaches(RouterState.DEGRADED)
        await _through(it, virtual_time)
        assert it.router.state is RouterState.DEGRADED
        it.process.is_silent = False
        await it.reaches(RouterState.READY)
        assert it.spawns == 1


@pytest.mark.anyio
async def test_a_start_is_not_overdue_because_of_a_gap(host: FakeHost, virtual_time: MockClock) -> None:
    """T2: a router that came up while nobody could look is not killed; one that does not come up after a gap is."""
    host.starts.extend([FakeStart(ready_at=HOUR_S), FakeStart(ready_at=math.inf)])
    async with supervised(host) as it:
        it.router.start()
        await anyio.sleep(START_DEADLINE_S - 10.0)
        await _through(it, virtual_time)
        await it.reaches(RouterState.READY, within_s=5.0)
        assert it.spawns == 1
        it.process.end(KILLED)
        await it.until(lambda: it.spawns == 2)
        await anyio.sleep(START_DEADLINE_S - 10.0)
        await _through(it, virtual_time)
        again = anyio.current_time()
        await it.until(lambda: it.spawns == 3)
        assert anyio.current_time() - again == pytest.approx(START_DEADLINE_S, abs=5.0)


@pytest.mark.anyio
async def test_the_router_s_word_on_a_child_is_not_late_after_a_gap(host: FakeHost, virtual_time: MockClock) -> None:
    """A process that ended right before a gap is no corpse after it: what the router said of it may be unread yet."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        await it.router.load("beta")
        table = it.router.table
        it.process.children["alpha"].ended.set()  # the router has not said anything of it
        await it.until(lambda: table.get("alpha").dead_since is not None)
        virtual_time.jump(NIGHT_S)
        await anyio.sleep(0.5)
        assert table.corpse(now=anyio.current_time()) is None
        assert (it.spawns, it.router.is_closed) == (1, False)
        await it.until(lambda: it.router.is_closed, within_s=5.0)


# --- the wall clock ---------------------------------------------------------------------------------------------------


WALL_CLOCK = {
    "announcer.py": "how long a file was waited for, which people read",
    "catalog/scanner.py": "how old a file was when it was first seen; after that it is watched by the monotonic clock",
    "events/bus.py": "when an event happened, which people read",
    "ledger.py": "how old a measurement is, across restarts of the machine",
    "quarantine_records.py": "what is left of a quarantine goes on after a restart, and never for longer than at most",
    "storage/storage.py": "how old a leftover in the folder is, which its file tells",
}
"""Who may look at the wall clock, and what for."""


class Wall:
    """The wall clock, which somebody sets."""

    def __init__(self) -> None:
        self.offset_s = 0.0
        self._true = time.time

    def __call__(self) -> float:
        """Unix seconds."""
        return self._true() + self.offset_s


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    """What `time.time` tells."""
    wall = Wall()
    monkeypatch.setattr(time, "time", wall)
    return wall


async def _life(host: FakeHost, set_clock: Callable[[], None]) -> list[tuple[float, str]]:
    """What is told, and when, of a router that crashes, comes up, is silent for a while and has a load that stalls."""
    host.starts.extend(FakeStart(ready_at=math.inf, ends_at=0.1) for _ in range(4))
    host.models["beta"] = FOREVER
    async with supervised(host) as it:
        began = anyio.current_time()
        it.router.start()
        for _ in range(4):
            set_clock()
            await it.reaches(RouterState.BACKOFF)
            await it.until(lambda: it.router.state is not RouterState.BACKOFF)
        await it.reaches(RouterState.READY)
        await it.router.load("alpha")
        set_clock()
        with pytest.raises(ModelLoadError):
            await it.router.load("beta")
        set_clock()
        it.process.is_silent = True
        await it.reaches(RouterState.DEGRADED)
        set_clock()
        it.process.is_silent = False
        await it.reaches(RouterState.READY)
        await anyio.sleep(HOUR_S)
        told = [(at, event) for at, event in it.story.all if not isinstance(event, RouterProbed)]
    return sorted((round(at - began, 3), _said(event)) for at, event in told)


def _said(event: Event) -> str:
    return type(event).__name__


@pytest.mark.anyio
@pytest.mark.parametrize("offset_s", [-HOUR_S, HOUR_S], ids=["back", "on"])
async def test_a_wall_clock_that_is_set_changes_nothing(
    make_host: Callable[..., FakeHost], wall: Wall, virtual_time: MockClock, offset_s: float
) -> None:
    """T1: backoff, deadlines and probes come at the same moments, whatever hour the clock on the wall shows."""

    def set_clock() -> None:
        wall.offset_s = offset_s if wall.offset_s == 0.0 else 0.0

    true = await _life(make_host(), lambda: None)
    assert len(true) > 20
    assert await _life(make_host("other"), set_clock) == true


def test_policy_never_looks_at_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """T1: admission chooses the least recently used model and keeps its deadlines without it."""

    def look() -> float:
        raise AssertionError("policy looked at the wall clock")

    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, look)
    here = (Candidate("r", Budget({"RAM": 2}), {"RAM": 1}),)
    admission = Admission()
    for now, model in ((1.0, "old"), (2.0, "new")):
        admission.loading("r", model, {"RAM": 1}, now)
        admission.loaded("r", model, None, now)
    _, actions = admission.ask("old", here, 100.0)
    lease = next(action.lease for action in actions if isinstance(action, Grant))
    admission.release(lease, 101.0)
    _, actions = admission.ask("third", here, 200.0)
    assert [action.model for action in actions] == ["new"]
    assert [type(action).__name__ for action in admission.tick(1000.0)] == ["Refuse"]


def test_who_looks_at_the_wall_clock() -> None:
    """T1: nobody in the library but those who have a reason."""
    root = Path(llamavisor.__file__).parent
    looking = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(_is_wall_clock(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert looking == WALL_CLOCK.keys()


def _is_wall_clock(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and (node.value.id, node.attr) in {
            ("time", "time"),
            ("time", "time_ns"),
        }
    imported: Iterable[str] = ()
    if isinstance(node, ast.ImportFrom):
        imported = [f"{node.module}.{each.name}" for each in node.names]
    elif isinstance(node, ast.Import):
        imported = [each.name for each in node.names]
    return any(name in {"time.time", "time.time_ns"} or name.split(".")[0] == "datetime" for name in imported)
