"""Memory that comes back after a process has ended: at once, late, in part, or nobody knows."""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import pytest
from trio.testing import MockClock

from llamavisor.gauge.device import RAM, RAM_ID, Device, Reading, unknown
from llamavisor.reclaim import GPU_S, MAX_PAUSE_S, RAM_S, await_reclaim

pytestmark = pytest.mark.anyio

GIB = 2**30
GPU = Device("0000:01:00.0", "nvidia", "RTX 3090")
OTHER = Device("0000:41:00.0", "nvidia", "RTX 3060")
PROCESSORS = 8
TOTAL = {RAM_ID: 64 * GIB, GPU.id: 24 * GIB, OTHER.id: 24 * GIB}
KEPT = TOTAL[RAM_ID] // 8 // PROCESSORS
"""What a processor may keep of RAM."""
READ_S = 0.001


class Bench:
    """Devices on which memory comes free when the test says; `Meter.read_now` for a test.

    Attributes:
        comes: for each device, after how many seconds how many bytes are free.
        lost: since when a device is unknown.
        old: devices of which only a reading of before is known.
        is_stuck: whether nothing is read within the time that there is.
        new_after_s: until when nothing new is read.
        reads: when it was read.
    """

    def __init__(self) -> None:
        self.began = anyio.current_time()
        self.comes: dict[Device, list[tuple[float, int]]] = {}
        self.lost: dict[Device, float] = {}
        self.old: set[Device] = set()
        self.is_stuck = False
        self.new_after_s = 0.0
        self.reads: list[float] = []

    async def read(self, within_s: float) -> Mapping[str, Reading]:
        """As things are."""
        self.reads.append(anyio.current_time() - self.began)
        await anyio.sleep(within_s if self.is_stuck else READ_S)
        return {device.id: self._reading(device) for device in self.comes}

    def _reading(self, device: Device) -> Reading:
        passed_s = anyio.current_time() - self.began
        is_old = self.is_stuck or device in self.old or passed_s < self.new_after_s
        at = self.began - 20.0 if is_old else anyio.current_time()
        if passed_s >= self.lost.get(device, 1e9):
            return unknown(device, at, "the test says so")
        free = sum(size for after_s, size in self.comes[device] if passed_s >= after_s)
        total = TOTAL[device.id]
        return Reading(device, total, total - free, free, at)

    async def wait(self, expected: Mapping[str, int], before: Mapping[str, int | None] | None = None) -> dict[str, int]:
        """Wait for it; nothing was free before unless said otherwise."""
        had = dict.fromkeys(expected, 0) if before is None else before
        return await await_reclaim(self.read, had, expected, processors=PROCESSORS)

    @property
    def took_s(self) -> float:
        """How long it has taken."""
        return anyio.current_time() - self.began


async def test_what_is_back_costs_one_reading(virtual_time: MockClock) -> None:
    """As a rule the memory is there when its process has gone."""
    bench = Bench()
    bench.comes = {RAM: [(0.0, 8 * GIB)], GPU: [(0.0, 10 * GIB)]}
    assert await bench.wait({RAM_ID: 8 * GIB, GPU.id: 10 * GIB}) == {RAM_ID: 0, GPU.id: 0}
    assert bench.reads == [0.0]
    assert bench.took_s == pytest.approx(READ_S)


async def test_nothing_expected_is_not_even_read(virtual_time: MockClock) -> None:
    """A model that had nothing there is not waited for."""
    bench = Bench()
    assert await bench.wait({RAM_ID: 0}) == {RAM_ID: 0}
    assert bench.reads == []


async def test_a_driver_that_takes_its_time_is_waited_for(virtual_time: MockClock) -> None:
    """It is asked soon at first, then ever less often, and the answer comes right after the memory."""
    bench = Bench()
    bench.comes = {GPU: [(0.0, 4 * GIB), (1.5, 6 * GIB)]}
    assert await bench.wait({GPU.id: 10 * GIB}) == {GPU.id: 0}
    assert 1.5 <= bench.took_s <= 1.5 + MAX_PAUSE_S + 2 * READ_S
    assert bench.reads[1] == pytest.approx(READ_S + 0.002)
    assert len(bench.reads) < 15


async def test_what_does_not_come_is_told(virtual_time: MockClock) -> None:
    """After five seconds the wait for a device ends; what is missing is told, what came beside it is not."""
    bench = Bench()
    bench.comes = {GPU: [(0.0, 3 * GIB)], OTHER: [(2.0, 10 * GIB)]}
    assert await bench.wait({GPU.id: 10 * GIB, OTHER.id: 10 * GIB}) == {GPU.id: 7 * GIB, OTHER.id: 0}
    assert bench.took_s == pytest.approx(GPU_S, abs=0.01)
    assert len(bench.reads) < 40


async def test_the_wait_ends_whatever_the_time_is(virtual_time: MockClock) -> None:
    """Times are rounded: that so much has passed since it began may never become true, and no pause be long enough."""
    for power in range(6, 20):  # the later times are coarser than the earlier ones
        virtual_time.jump(2.0**power - 2.1 - power / 7 - anyio.current_time())
        reads: list[float] = []

        async def read(within_s: float, reads: list[float] = reads) -> Mapping[str, Reading]:
            reads.append(within_s)
            assert len(reads) < 100, "it never ends"
            return {GPU.id: Reading(GPU, TOTAL[GPU.id], TOTAL[GPU.id], 0, anyio.current_time())}

        assert await await_reclaim(read, {GPU.id: 0}, {GPU.id: GIB}) == {GPU.id: GIB}


async def test_almost_all_is_all(virtual_time: MockClock) -> None:
    """Nine tenths of a device's memory are enough: others use it too. A little less is missing."""
    bench = Bench()
    bench.comes = {GPU: [(0.0, 9 * GIB)], OTHER: [(0.0, 9 * GIB - 1)]}
    assert await bench.wait({GPU.id: 10 * GIB, OTHER.id: 10 * GIB}) == {GPU.id: 0, OTHER.id: GIB + 1}


async def test_no_more_is_missing_than_was_expected(virtual_time: MockClock) -> None:
    """Where others have taken more meanwhile than came back, that is theirs."""
    bench = Bench()
    bench.comes = {GPU: [(0.0, 2 * GIB)]}
    assert await bench.wait({GPU.id: 10 * GIB}, {GPU.id: 5 * GIB}) == {GPU.id: 10 * GIB}


async def test_ram_is_not_waited_for_long(virtual_time: MockClock) -> None:
    """A quarter of a second: what is not back then does not come."""
    bench = Bench()
    bench.comes = {RAM: [(0.0, 2 * GIB), (1.0, 8 * GIB)]}
    assert await bench.wait({RAM_ID: 10 * GIB}) == {RAM_ID: 8 * GIB}
    assert bench.took_s == pytest.approx(RAM_S, abs=0.01)


async def test_what_a_processor_keeps_of_ram_is_not_missing(virtual_time: MockClock) -> None:
    """The kernel does not count as free what it has at hand for the next allocation."""
    bench = Bench()
    bench.comes = {RAM: [(0.0, GIB // 16)], GPU: [(0.0, GIB // 16)]}
    assert GIB // 2 < KEPT + GIB // 16
    assert await bench.wait({RAM_ID: GIB // 2, GPU.id: GIB // 2}) == {RAM_ID: 0, GPU.id: GIB // 2 - GIB // 16}


@pytest.mark.parametrize("what", ["before", "now", "not there"])
async def test_of_what_is_unknown_nothing_is_said(virtual_time: MockClock, what: str) -> None:
    """A device that was unknown, or is, counts as 0 at once: waiting changes nothing."""
    bench = Bench()
    bench.comes = {RAM: [(0.0, 10 * GIB)]} if what == "not there" else {RAM: [(0.0, 10 * GIB)], GPU: [(0.0, 1)]}
    bench.lost = {GPU: 0.0} if what == "now" else {}
    before = {RAM_ID: 0} if what == "before" else {RAM_ID: 0, GPU.id: 0}
    assert await bench.wait({RAM_ID: GIB, GPU.id: GIB}, before) == {RAM_ID: 0, GPU.id: 0}
    assert len(bench.reads) == 1


async def test_a_device_that_is_lost_while_it_is_waited_for(virtual_time: MockClock) -> None:
    """What was missing of it before says nothing any more."""
    bench = Bench()
    bench.comes, bench.lost = {GPU: [(0.0, GIB)]}, {GPU: 1.0}
    assert await bench.wait({GPU.id: 10 * GIB}) == {GPU.id: 0}
    assert bench.took_s == pytest.approx(1.0, abs=2 * MAX_PAUSE_S)


async def test_a_gauge_that_asks_but_seldom_is_not_waited_for(virtual_time: MockClock) -> None:
    """Where RAM was read now and a device was not, the next reading of that would be as old."""
    bench = Bench()
    bench.comes, bench.old = {RAM: [(0.0, 10 * GIB)], GPU: [(0.0, 0)]}, {GPU}
    assert await bench.wait({GPU.id: 10 * GIB}) == {GPU.id: 0}
    assert len(bench.reads) == 1


async def test_what_was_read_before_the_end_says_nothing(virtual_time: MockClock) -> None:
    """An old reading is no reason to stop waiting, nor to miss anything."""
    bench = Bench()
    bench.comes, bench.new_after_s = {GPU: [(0.0, GIB), (3.0, 9 * GIB)]}, 1.0
    assert await bench.wait({GPU.id: 10 * GIB}) == {GPU.id: 0}
    assert bench.took_s == pytest.approx(3.0, abs=2 * MAX_PAUSE_S)


async def test_a_gauge_that_hangs_costs_the_bound_and_no_more(virtual_time: MockClock) -> None:
    """Nothing is read in time: nothing is said, and the wait ends all the same."""
    bench = Bench()
    bench.comes, bench.is_stuck = {RAM: [(0.0, 0)], GPU: [(0.0, 0)]}, True
    assert await bench.wait({RAM_ID: 10 * GIB, GPU.id: 10 * GIB}) == {RAM_ID: 0, GPU.id: 0}
    assert bench.took_s == pytest.approx(GPU_S, abs=0.01)
    assert len(bench.reads) < 5
