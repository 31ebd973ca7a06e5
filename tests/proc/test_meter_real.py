"""The meter on this machine: what a real process has, what comes back when it ends, and what reading costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest

from llamavisor.events import Bus
from llamavisor.gauge import RAM_ID, open_gauge
from llamavisor.meter import READ_EVERY_S, Meter
from llamavisor.reclaim import await_reclaim

pytestmark = pytest.mark.anyio

MIB = 2**20
HOLDS = 200 * MIB
HOLD = """
import sys
held = b"x" * {size}
print("ready", flush=True)
sys.stdin.read()
"""
FIRST_READ_S = 20.0


@pytest.fixture
def holder() -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Starts processes that hold so many bytes."""
    started: list[subprocess.Popen[bytes]] = []

    def start(size: int) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-I", "-c", HOLD.format(size=size)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@asynccontextmanager
async def reading() -> AsyncIterator[Meter]:
    """A meter of this machine, after its first reading."""
    meter = Meter(open_gauge(os.environ), bus=Bus())
    async with anyio.create_task_group() as group:
        group.start_soon(meter.run)
        with anyio.fail_after(FIRST_READ_S):
            await meter.first.wait()
        yield meter
        group.cancel_scope.cancel()


async def test_what_a_real_process_has(holder: Callable[[int], subprocess.Popen[bytes]]) -> None:
    """A child that allocates 200 MiB is measured within 10 %, and so is what comes free with it."""
    holding, small = holder(HOLDS), holder(0)
    async with reading() as meter:
        measured = await meter.measure({"holding": holding.pid, "small": small.pid})
        assert measured["holding"][RAM_ID] == pytest.approx(HOLDS, rel=0.1)
        assert measured["small"][RAM_ID] < HOLDS / 10
        assert meter.freed_by(holding.pid)[RAM_ID] == pytest.approx(HOLDS, rel=0.1)
        assert not meter.killed_since(0.0)


async def test_memory_of_a_real_process_is_back_at_once(holder: Callable[[int], subprocess.Popen[bytes]]) -> None:
    """When its end is seen its memory is there, or at hand for the next: one reading tells, and no swap is held up."""
    process = holder(4 * HOLDS)
    reads: list[float] = []
    async with reading() as meter:

        async def read(within_s: float) -> object:
            reads.append(within_s)
            return await meter.read_now(within_s)

        before = {device: reading.free_bytes for device, reading in (await meter.read_now(FIRST_READ_S)).items()}
        expected = meter.freed_by(process.pid)
        pidfd = os.pidfd_open(process.pid)
        try:
            process.send_signal(signal.SIGKILL)
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        missing = await await_reclaim(read, before, expected)
        assert missing == dict.fromkeys(expected, 0)
        assert len(reads) == 1


async def test_reading_costs_next_to_nothing() -> None:
    """A round every five seconds takes less than a thousandth of a processor, whatever gauges this machine has."""
    rounds = 100
    async with reading() as meter:
        began = time.process_time()
        for _ in range(rounds):
            await meter.read_now(FIRST_READ_S)
        cost_s = (time.process_time() - began) / rounds
    assert cost_s / READ_EVERY_S < 0.001
