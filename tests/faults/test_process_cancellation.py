"""X1 with real processes: whoever starts, ends or clears away a process may be cancelled at any moment of that."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from llamavisor import procfs
from llamavisor.process import INSTANCE_VARIABLE, Process, Spawner, become_subreaper

pytestmark = pytest.mark.anyio

ENV = {"PATH": os.environ["PATH"]}
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
LEAVES = """
import os, time
if os.fork() == 0:
    os.setsid()
    print('up', flush=True)
    time.sleep(60)
time.sleep(60)
"""
GRACE_S = 0.05
LONG_S = 10.0


@pytest.fixture(autouse=True)
def subreaper() -> None:
    """Orphans come to the test process, as they come to the daemon."""
    become_subreaper()


@pytest.fixture
def spawner(tmp_path: Path) -> Spawner:
    """A spawner with an instance of its own."""
    return Spawner(f"x1-{os.getpid()}-{tmp_path}")


def alive(spawner: Spawner) -> list[int]:
    """What carries its mark."""
    marker = f"{INSTANCE_VARIABLE}={spawner.instance}"
    return [pid for pid in procfs.all_pids() if procfs.has_environment(pid, marker)]


async def cancelled_at(turn: int, work: Callable[[], Awaitable[object]]) -> bool:
    """Do it, and cancel it when it has waited for the event loop so many times; whether it was over by then."""
    with anyio.CancelScope() as scope:
        task = asyncio.current_task()
        assert task is not None
        waker = asyncio.create_task(_cancel_after(turn, scope))
        try:
            await work()
        finally:
            is_over = not scope.cancel_called
            waker.cancel()
    return is_over


async def _cancel_after(turns: int, scope: anyio.CancelScope) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
    scope.cancel()


async def gone(process: Process) -> None:
    """Make an end of it, as its owner does whatever has happened before."""
    with anyio.fail_after(LONG_S), anyio.CancelScope(shield=True):
        process.kill()
        await process.wait()
        await process.clear()


def reap(spawner: Spawner) -> None:
    """What the daemon does every second, which finds at the second look what nobody waits for."""
    for _ in range(2):
        spawner.reap_orphans()


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.005, 0.01, 0.02, 0.05])
async def test_x1_a_start_that_takes_its_time(spawner: Spawner, tmp_path: Path, delay_s: float) -> None:
    """X1: a start that is cancelled after so many seconds leaves no process, no zombie and no descriptor."""
    with anyio.move_on_after(delay_s):
        await gone(await spawner.spawn(["/bin/sleep", "60"], env=ENV, output=tmp_path / "log"))
    assert alive(spawner) == []


async def test_x1_a_start(spawner: Spawner, tmp_path: Path) -> None:
    """X1: nor one that is cancelled at its k-th turn of the event loop, for every k."""
    started: list[Process] = []

    async def start() -> None:
        started.append(await spawner.spawn(["/bin/sleep", "60"], env=ENV, output=tmp_path / "log"))

    outcomes = set()
    for turn in [*range(20), *range(20, 20_000, 400)]:
        outcomes.add(await cancelled_at(turn, start))
        if started:  # it was over: somebody has it
            await gone(started.pop())
        reap(spawner)
        assert alive(spawner) == []
        assert spawner._own == set()
        if True in outcomes and turn > 20:
            break
    assert outcomes == {True, False}


@pytest.mark.parametrize("code", [STUBBORN, LEAVES], ids=["stubborn", "leaves"])
async def test_x1_a_stop(spawner: Spawner, tmp_path: Path, code: str) -> None:
    """X1: a stop or the clearing away that is cancelled at any moment can be done again, and then nothing is left."""
    for number, delay_s in enumerate([0.0, 0.001, 0.01, GRACE_S, GRACE_S + 0.003, GRACE_S + 0.006, GRACE_S + 0.02]):
        log = tmp_path / f"log{number}"
        process = await spawner.spawn([sys.executable, "-I", "-S", "-c", code], env=ENV, output=log)
        with anyio.fail_after(LONG_S):
            while "up" not in log.read_text():
                await anyio.sleep(0.005)
        with anyio.move_on_after(delay_s):
            await process.terminate(grace_s=GRACE_S)
            await process.clear()
        await gone(process)
        assert process.status is not None
        assert process.status.signal in {signal.SIGTERM, signal.SIGKILL}
        reap(spawner)
        assert alive(spawner) == []
        assert spawner._own == set()
