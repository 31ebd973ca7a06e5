"""What is kept of the gauge, how it is read, and what happens when it, or the kernel, does not answer."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import anyio
import pytest
from trio.testing import MockClock

from fakes.gauge import GIB, FakeGauge
from fakes.kernel import Kernel
from fakes.supervised import Story
from fakes.waiting import PATIENCE_S
from llamavisor.events import Bus, GaugeBack, GaugeFailed, MemoryKill
from llamavisor.gauge import RAM_ID, Device, Pressure, Reading
from llamavisor.meter import MEASURE_S, READ_BUSY_S, READ_DEADLINE_S, READ_EVERY_S, Aside, Meter

pytestmark = pytest.mark.anyio

_T = TypeVar("_T")
MIB = 2**20
GPU = Device("0000:01:00.0", "nvidia", "RTX 3090")
APU = Device("0000:c1:00.0", "nvidia", "GB10", is_ram_shared=True)


class Gauge(FakeGauge):
    """One that also tells what processes have.

    Attributes:
        processes: by device.
        delay_s: how long a read takes.
        is_closed: whether it was.
    """

    def __init__(self, *gpus: Device) -> None:
        super().__init__(gpus=gpus)
        self.processes: dict[str, Mapping[int, int | None]] = {}
        self.delay_s = 0.0
        self.is_closed = False

    async def read(self) -> list[Reading]:
        """Every device."""
        told = [replace(each, processes=self.processes.get(each.device.id)) for each in await super().read()]
        await anyio.sleep(self.delay_s)
        return told

    async def aclose(self) -> None:
        """Take note of it."""
        self.is_closed = True


async def at_once(work: Callable[[], _T], /) -> _T:
    """Blocking work that takes no time."""
    await anyio.sleep(0)
    return work()


async def never(work: Callable[[], _T], /) -> _T:
    """Blocking work that never ends."""
    await anyio.sleep_forever()
    return work()


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel that has killed before."""
    return Kernel(tmp_path)


@pytest.fixture
def gauge() -> Gauge:
    """RAM and a card."""
    return Gauge(GPU)


class Running:
    """A meter that runs, and what it says."""

    def __init__(self, gauge: Gauge, kernel: Kernel) -> None:
        bus = Bus()
        self.story = Story(bus)
        self.meter = Meter(gauge, bus=bus, root=kernel.root, aside=at_once)

    @property
    def told(self) -> list[tuple[str, str]]:
        """What was said of gauges."""
        return [
            (type(event).__name__, event.device)
            for _, event in self.story.all
            if isinstance(event, GaugeFailed | GaugeBack)
        ]


@asynccontextmanager
async def running(gauge: Gauge, kernel: Kernel) -> AsyncIterator[Running]:
    """A meter that reads, after its first reading or the failure of it."""
    it = Running(gauge, kernel)
    async with anyio.create_task_group() as group:
        group.start_soon(it.meter.run)
        with anyio.fail_after(2 * READ_DEADLINE_S):
            await it.meter.first.wait()
        yield it
        group.cancel_scope.cancel()
    assert gauge.is_closed


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_what_is_read_is_kept(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """Readings are there by the memory that they are of, with the devices and the pressure."""
    kernel.pressure(12.5)
    gauge.used[GPU.id] = GIB
    async with running(gauge, kernel) as it:
        assert {memory: reading.free_bytes for memory, reading in it.meter.readings.items()} == {
            RAM_ID: 60 * GIB,
            GPU.id: 23 * GIB,
        }
        assert [device.id for device in it.meter.devices] == [RAM_ID, GPU.id]
        assert it.meter.pressure == Pressure(12.5, 12.5)
        assert it.story.all == []


async def test_memory_that_is_ram_is_listed_once(kernel: Kernel, virtual_time: MockClock) -> None:
    """A device without memory of its own has no reading, and is no failure; but it is there."""
    gauge = Gauge(APU)
    gauge.used[APU.id] = None
    async with running(gauge, kernel) as it:
        assert list(it.meter.readings) == [RAM_ID]
        assert it.meter.devices[1] == APU
        assert it.told == []


async def test_it_is_read_seldom_and_more_often_while_memory_changes(
    gauge: Gauge, kernel: Kernel, virtual_time: MockClock
) -> None:
    """Every five seconds; every second while somebody says so, beginning at once."""
    async with running(gauge, kernel) as it:
        await anyio.sleep(60.5)
        assert gauge.reads == 1 + 60.0 / READ_EVERY_S
        before = gauge.reads
        it.meter.is_busy = True
        await anyio.sleep(0.1)
        assert gauge.reads == before + 1
        it.meter.is_busy = True
        await anyio.sleep(10.0)
        assert gauge.reads == before + 1 + 10.0 / READ_BUSY_S
        it.meter.is_busy = False
        await anyio.sleep(60.0)
        assert gauge.reads <= before + 1 + 10.0 / READ_BUSY_S + 60.0 / READ_EVERY_S


async def test_a_reading_of_now(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """One that is asked for begins after the question, even where another is under way, and nobody else is needed."""
    async with running(gauge, kernel) as it:
        await anyio.sleep(1.0)
        gauge.delay_s = 0.1
        for late_s in (0.0, 0.05):
            async with anyio.create_task_group() as group:
                group.start_soon(it.meter.read_now, 1.0)
                await anyio.sleep(late_s)  # the other's is under way
                asked_at = anyio.current_time()
                gauge.used[GPU.id] = used = int(asked_at * GIB) % (20 * GIB)
                readings = await it.meter.read_now(1.0)
                assert readings[GPU.id].at >= asked_at
                assert readings[GPU.id].used_bytes == used
                assert anyio.current_time() - asked_at <= 0.2


async def test_a_reading_that_takes_too_long_is_the_last_one(
    gauge: Gauge, kernel: Kernel, virtual_time: MockClock
) -> None:
    """Who cannot wait has what was known, and the gauge is not asked twice at once."""
    async with running(gauge, kernel) as it:
        known = dict(it.meter.readings)
        gauge.hangs = True
        began, reads = anyio.current_time(), gauge.reads
        assert await it.meter.read_now(0.5) == known
        assert await it.meter.read_now(0.5) == known
        assert anyio.current_time() - began == pytest.approx(1.0)
        assert gauge.reads == reads + 1


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_a_device_that_is_unknown_is_told_once(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """R5: when it becomes so, and when it is known again; the others are read meanwhile."""
    async with running(gauge, kernel) as it:
        for _ in range(2):
            gauge.used[GPU.id] = None
            await anyio.sleep(10 * READ_EVERY_S)
            assert it.meter.readings[GPU.id].free_bytes is None
            assert it.meter.readings[RAM_ID].is_known
            gauge.used[GPU.id] = 0
            await anyio.sleep(10 * READ_EVERY_S)
            assert it.meter.readings[GPU.id].is_known
        assert it.told == [("GaugeFailed", GPU.id), ("GaugeBack", GPU.id)] * 2
        assert it.story.of(GaugeFailed)[0].reason == "the test says so"


@pytest.mark.parametrize("how", ["raises", "raises in a group", "hangs"])
async def test_a_gauge_that_fails_does_not_stop_the_reading(
    gauge: Gauge, kernel: Kernel, virtual_time: MockClock, how: str
) -> None:
    """R5: while it raises or hangs everything is unknown, and nothing is 0; then everything is as before."""
    async with running(gauge, kernel) as it:
        broken = RuntimeError("driver broken")
        gauge.failure = ExceptionGroup("several", [broken]) if "group" in how else broken if how == "raises" else None
        gauge.hangs = how == "hangs"
        await anyio.sleep(10 * READ_DEADLINE_S)
        assert [reading.free_bytes for reading in it.meter.readings.values()] == [None, None]
        assert [device.id for device in it.meter.devices] == [RAM_ID, GPU.id]
        assert it.told == [("GaugeFailed", RAM_ID), ("GaugeFailed", GPU.id)]
        reason = "the gauge does not answer within 15 s" if how == "hangs" else "driver broken"
        assert {event.reason for event in it.story.of(GaugeFailed)} == {reason}
        gauge.failure, gauge.hangs = None, False
        await anyio.sleep(2 * READ_DEADLINE_S)
        assert it.meter.readings[GPU.id].free_bytes == 24 * GIB
        assert it.told[2:] == [("GaugeBack", RAM_ID), ("GaugeBack", GPU.id)]


async def test_a_gauge_that_fails_from_the_beginning(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """Whoever waits for the first reading goes on; RAM there is in any case, and it is unknown."""
    gauge.failure = OSError("nothing works")
    async with running(gauge, kernel) as it:
        assert {memory: reading.is_known for memory, reading in it.meter.readings.items()} == {RAM_ID: False}
        assert it.told == [("GaugeFailed", RAM_ID)]


async def test_a_device_that_nobody_tells_of_any_more(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """It is gone from the readings, and that is told once; so is its return."""
    async with running(gauge, kernel) as it:
        ram = gauge.devices[:1]
        gauge.devices, cards = ram, gauge.devices[1:]
        await anyio.sleep(10 * READ_EVERY_S)
        assert list(it.meter.readings) == [RAM_ID]
        gauge.devices = [*ram, *cards]
        await anyio.sleep(2 * READ_EVERY_S)
        assert it.told == [("GaugeFailed", GPU.id), ("GaugeBack", GPU.id)]


async def test_pressure_that_the_kernel_does_not_tell(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """It is unknown then, even if it was known before."""
    kernel.pressure(1.0)
    async with running(gauge, kernel) as it:
        kernel.hides("proc/pressure/memory")
        await anyio.sleep(2 * READ_EVERY_S)
        assert it.meter.pressure is None


# --- kills ------------------------------------------------------------------------------------------------------------


async def test_kills_are_counted_from_the_first_look(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """P7: what the kernel killed before was nobody of ours; from then on every kill is told, once."""
    async with running(gauge, kernel) as it:
        await anyio.sleep(2 * READ_EVERY_S)
        assert (it.meter.kills, it.story.of(MemoryKill)) == (0, [])
        kernel.kills(5)
        await anyio.sleep(2 * READ_EVERY_S)
        assert (it.meter.kills, it.story.of(MemoryKill)) == (2, [MemoryKill(kills=2)])
        kernel.kills(1)  # as after a move to another cgroup
        await anyio.sleep(2 * READ_EVERY_S)
        kernel.kills(2)
        await anyio.sleep(2 * READ_EVERY_S)
        assert it.meter.kills == 3


async def test_whether_the_kernel_has_killed_a_moment_ago(
    gauge: Gauge, kernel: Kernel, virtual_time: MockClock
) -> None:
    """P7: who asks is told as of this moment; an old kill explains nothing."""
    async with running(gauge, kernel) as it:
        await anyio.sleep(100.5)
        assert not it.meter.killed_since(anyio.current_time() - 10.0)
        kernel.kills(4)
        assert it.meter.killed_since(anyio.current_time() - 10.0)
        assert len(it.story.of(MemoryKill)) == 1
        await anyio.sleep(11.0)
        assert not it.meter.killed_since(anyio.current_time() - 10.0)
        assert it.meter.killed_since(anyio.current_time() - 12.0)
        assert it.meter.kills == 1


async def test_kills_that_the_kernel_does_not_tell_of(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """Nothing is known of them then, and when it tells again only what is new counts."""
    async with running(gauge, kernel) as it:
        kernel.hides("sys/fs/cgroup/ours/memory.events")
        assert not it.meter.killed_since(0.0)
        kernel.kills(4)
        assert it.meter.killed_since(0.0)
        assert it.meter.kills == 1


# --- processes --------------------------------------------------------------------------------------------------------


async def test_processes_are_measured(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """RAM by PSS, other memory as the driver tells; what nobody tells is left out and never 0."""
    kernel.process(100, pss=300 * MIB, anonymous=100 * MIB)
    kernel.process(101, pss=None, anonymous=100 * MIB, file=50 * MIB)
    kernel.process(102, pss=10 * MIB)
    gauge.processes[GPU.id] = {100: 2 * GIB, 101: None, 104: 3 * GIB}
    async with running(gauge, kernel) as it:
        pids = {"a": 100, "b": 101, "c": 102, "gone": 103, "hidden": 104, "again": 100}
        assert await it.meter.measure(pids) == {
            "a": {RAM_ID: 300 * MIB, GPU.id: 2 * GIB},
            "b": {RAM_ID: 150 * MIB + 4096},
            "c": {RAM_ID: 10 * MIB},
            "gone": {},
            "hidden": {GPU.id: 3 * GIB},
            "again": {RAM_ID: 300 * MIB, GPU.id: 2 * GIB},
        }


async def test_what_a_process_has_on_a_device_that_is_ram(kernel: Kernel, virtual_time: MockClock) -> None:
    """It is counted under RAM, where it does not show by itself; not where the rest of it is unknown."""
    gauge = Gauge(APU)
    kernel.process(100, pss=1 * GIB)
    gauge.processes[APU.id] = {100: 4 * GIB, 101: 4 * GIB}
    async with running(gauge, kernel) as it:
        assert await it.meter.measure({100: 100, 101: 101}) == {100: {RAM_ID: 5 * GIB}, 101: {}}


async def test_what_comes_free_when_a_process_ends(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """What it has allocated, and what it has on the card; the files that it has mapped stay where they are."""
    kernel.process(100, pss=4 * GIB, anonymous=100 * MIB, file=4 * GIB)
    gauge.processes[GPU.id] = {100: 2 * GIB}
    async with running(gauge, kernel) as it:
        assert it.meter.freed_by(100) == {RAM_ID: 100 * MIB, GPU.id: 2 * GIB}
        assert it.meter.freed_by(101) == {}


async def test_a_measurement_that_hangs_ends(gauge: Gauge, kernel: Kernel, virtual_time: MockClock) -> None:
    """What was not measured in time is left out; what is known without it is there."""
    gauge.processes[GPU.id] = {100: GIB}
    kernel.process(100, pss=GIB)
    async with running(gauge, kernel):
        meter = Meter(gauge, bus=Bus(), root=kernel.root, aside=never)
        meter._take(await gauge.read())
        began = anyio.current_time()
        assert await meter.measure({"a": 100}) == {"a": {GPU.id: GIB}}
        assert anyio.current_time() - began == pytest.approx(MEASURE_S)


async def test_work_that_hangs_holds_one_thread() -> None:
    """Real threads: while abandoned work goes on no other is begun, and when it ends the next one is."""
    aside = Aside()
    release, began = threading.Event(), list[int]()

    def hang() -> int:
        began.append(0)
        release.wait(PATIENCE_S)
        return 0

    assert await aside(lambda: 7) == 7
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(aside, hang)
        with anyio.fail_after(PATIENCE_S):
            while not began:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    with anyio.move_on_after(0.2) as scope:
        await aside(hang)
    assert scope.cancelled_caught
    assert began == [0]
    release.set()
    with anyio.fail_after(PATIENCE_S):
        assert await aside(lambda: 8) == 8
    with pytest.raises(ZeroDivisionError):
        await aside(lambda: 1 // 0)
    assert await aside(lambda: 9) == 9
