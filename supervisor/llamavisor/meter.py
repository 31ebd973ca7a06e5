"""How much memory there is and who has it, read from time to time and kept: the one that reads the gauge.

Nothing here ends because a gauge, a driver or the kernel does not answer: what is not known is None or left out, never
0, and what was known stays with the time at which it was read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import anyio

from llamavisor import events as ev
from llamavisor.gauge import (
    RAM,
    RAM_ID,
    Device,
    Gauge,
    Pressure,
    ProcessMemory,
    Reading,
    memory_of,
    oom_kills,
    worst_pressure,
)
from llamavisor.gauge.device import unknown
from llamavisor.gauge.ram import parse_meminfo
from llamavisor.threads import run_in_thread

READ_EVERY_S = 5.0
"""A reading takes a millisecond of a processor where there is RAM only: 0.02 % of it."""
READ_BUSY_S = 1.0
"""Likewise while memory is about to change: 0.1 %."""
READ_DEADLINE_S = 15.0
"""Longer than any gauge takes that can still answer; after that all devices are unknown until it does."""
MEASURE_S = 5.0
"""How long the measurement of processes may take: the kernel walks all their pages, tens of milliseconds for a large
model, and waits while one changes its mappings."""

_T = TypeVar("_T")
_K = TypeVar("_K")


class Blocking(Protocol):
    """Has something done that blocks, without blocking the event loop; can be cancelled at any time."""

    async def __call__(self, work: Callable[[], _T], /) -> _T:
        """Wait until it is done, and return what it returns."""
        ...


class Aside:
    """Has blocking work done in a worker thread, one piece at a time; `Blocking`.

    Work that nobody waits for any longer goes on until it ends, and the next begins after that: whatever holds it would
    hold the next one too, and threads would pile up.
    """

    def __init__(self) -> None:
        self._turn = anyio.Lock()
        self._free = threading.Event()
        self._free.set()

    async def __call__(self, work: Callable[[], _T], /) -> _T:
        """Do it when all is done that was asked for before."""

        def run() -> _T:
            self._free.clear()
            try:
                return work()
            finally:
                self._free.set()

        async with self._turn:
            while not self._free.is_set():
                await anyio.sleep(_STUCK_POLL_S)
            return await run_in_thread(run, abandon_on_cancel=True)


_STUCK_POLL_S = 0.1


class Meter:
    """Reads the gauge every few seconds, or when asked, and keeps what it said.

    Args:
        gauge: what knows the devices; it is closed when `run` ends.
        bus: where its events go.
        root: where /proc and /sys are.
        aside: has the blocking measurement of processes done.

    Attributes:
        readings: the last reading of each memory, by `Device.memory_id`. A device whose memory is RAM has none of its
            own: it is counted under RAM, once.
        devices: every device there is, those whose memory is RAM too.
        pressure: how much work stands still for want of memory; None where that is unknown.
        kills: how many processes of ours the kernel has killed for want of memory since this began to look.
        first: set when everything was read for the first time, or could not be.
    """

    def __init__(self, gauge: Gauge, *, bus: ev.Bus, root: Path = Path("/"), aside: Blocking | None = None) -> None:
        self.readings: Mapping[str, Reading] = {}
        self.devices: Sequence[Device] = ()
        self.pressure: Pressure | None = None
        self.kills = 0
        self.first = anyio.Event()
        self._gauge = gauge
        self._publish = bus.publish
        self._root = root
        self._aside = aside or Aside()
        self._told: Sequence[Reading] = ()  # all that the gauge said last
        self._silent: set[str] = set()  # of which it was told that they are unknown
        self._is_busy = False
        self._hurry = anyio.Event()  # the next reading is wanted at once
        self._next = anyio.Event()  # set when the reading has ended that is the next to begin
        self._counted: int | None = None  # what the kernel's counter of kills stood at
        self._killed_at: float | None = None

    def __repr__(self) -> str:
        known = {key: reading.free_bytes for key, reading in self.readings.items()}
        return f"<Meter free={known} pressure={self.pressure} kills={self.kills}>"

    @property
    def is_busy(self) -> bool:
        """Whether memory is about to change, so that it is read every second: set by whoever changes it."""
        return self._is_busy

    @is_busy.setter
    def is_busy(self, is_busy: bool) -> None:
        if is_busy and not self._is_busy:
            self._hurry.set()
        self._is_busy = is_busy

    async def run(self) -> None:
        """Read until cancelled."""
        try:
            while True:
                self._hurry = anyio.Event()
                ended, self._next = self._next, anyio.Event()
                self._look()
                await self._read()
                ended.set()
                self.first.set()
                with anyio.move_on_after(READ_BUSY_S if self._is_busy else READ_EVERY_S):
                    await self._hurry.wait()
        finally:
            await self._gauge.aclose()  # which sees to it that it can be waited for, and not for long

    async def read_now(self, within_s: float) -> Mapping[str, Reading]:
        """`readings` as they are now; those of before if that takes longer than `within_s`: `Reading.at` tells.

        Needs `run` beside it, which alone asks the gauge: it is never asked twice at once.
        """
        ended = self._next
        self._hurry.set()
        with anyio.move_on_after(within_s):
            await ended.wait()
        return self.readings

    def killed_since(self, at: float) -> bool:
        """Whether the kernel has, as far as it tells at this moment, killed a process of ours after `at`, or so.

        To be asked when a process has ended and it is not known why. When exactly a kill took place is known no better
        than kills are looked for: one that is found now and was not there at the last look counts as one of now.
        """
        self._look()
        return self._killed_at is not None and self._killed_at >= at

    async def measure(self, pids: Mapping[_K, int]) -> dict[_K, dict[str, int]]:
        """How many bytes of each memory, by `Device.memory_id`, these processes have; what is not known is left out.

        RAM is what they have in it at this moment, mapped files included, with shared pages split among those who share
        them. What they have on other devices is as of the last reading. A device whose memory is RAM counts under RAM
        where its driver tells what a process has on it: that shows nowhere else.
        """
        resident: dict[int, int] = {}

        def walk() -> None:
            for pid in dict.fromkeys(pids.values()):
                memory = memory_of(pid, root=self._root)
                if memory is not None and (size := _resident(memory)) is not None:
                    resident[pid] = size

        with anyio.move_on_after(MEASURE_S):
            await self._aside(walk)
        resident = resident.copy()  # in one step: whatever holds the thread may end now
        return {key: self._of(pid, resident.get(pid)) for key, pid in pids.items()}

    def freed_by(self, pid: int) -> dict[str, int]:
        """How many bytes of each memory come free when this process ends; what is not known is left out.

        That is less than `measure` tells: files that it has mapped stay in the page cache. Quick: the kernel keeps
        these numbers.
        """
        return self._of(pid, self._status(pid).get("RssAnon"))

    def anonymous(self, pid: int) -> int | None:
        """Bytes that a process has for itself alone, in RAM and in swap; mapped files are not among them.

        None if nobody can say. Quick: the kernel keeps these numbers.
        """
        told = self._status(pid)
        return told["RssAnon"] + told.get("VmSwap", 0) if "RssAnon" in told else None

    def _status(self, pid: int) -> Mapping[str, int]:
        """What the kernel keeps count of for a process, in bytes; nothing of one that has gone."""
        try:
            text = (self._root / "proc" / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return {}
        return parse_meminfo(text)

    def _of(self, pid: int, ram: int | None) -> dict[str, int]:
        found = {} if ram is None else {RAM_ID: ram}
        for reading in self._told:
            size = None if reading.processes is None else reading.processes.get(pid)
            memory = reading.device.memory_id
            if size is not None and (memory != RAM_ID or ram is not None):
                found[memory] = found.get(memory, 0) + size
        return found

    def _look(self) -> None:
        """Pressure and kills as of now. They are small files of the kernel: it takes 0.2 ms, and waits for nothing."""
        self.pressure = worst_pressure(self._root)
        counted = oom_kills(self._root)
        if counted is None:
            return
        before, self._counted = self._counted, counted
        if before is not None and counted > before:  # less: we were moved to another cgroup
            self.kills += counted - before
            self._killed_at = anyio.current_time()
            self._publish(ev.MemoryKill(kills=counted - before))

    async def _read(self) -> None:
        at = anyio.current_time()
        told: Sequence[Reading] | None = None
        reason = f"the gauge does not answer within {READ_DEADLINE_S:.0f} s"
        with anyio.move_on_after(READ_DEADLINE_S):
            try:
                told = await self._gauge.read()
            except Exception as exc:  # noqa: BLE001 (whatever is wrong with a gauge, models are served on)
                reason = _reason(exc)
        self._take([unknown(device, at, reason) for device in self.devices or (RAM,)] if told is None else told)

    def _take(self, told: Sequence[Reading]) -> None:
        self._told = told
        self.devices = tuple(reading.device for reading in told)
        before = self.readings
        self.readings = {each.device.id: each for each in told if each.device.id == each.device.memory_id}
        for device, reading in self.readings.items():
            if not reading.is_known:
                self._has_failed(device, reading.reason)
            elif device in self._silent:
                self._silent.remove(device)
                self._publish(ev.GaugeBack(device=device))
        for device in before.keys() - self.readings.keys():
            self._has_failed(device, "nobody tells of it any more")

    def _has_failed(self, device: str, reason: str) -> None:
        if device not in self._silent:
            self._silent.add(device)
            self._publish(ev.GaugeFailed(device=device, reason=reason))


def _resident(memory: ProcessMemory) -> int | None:
    """What a process has in RAM; where the kernel does not split what is shared, all of that counts."""
    if memory.pss is not None:
        return memory.pss
    if memory.anonymous is None or memory.file is None or memory.shmem is None:
        return None
    return memory.anonymous + memory.file + memory.shmem


def _reason(exc: BaseException) -> str:
    while isinstance(exc, BaseExceptionGroup):  # several gauges are asked at once
        exc = exc.exceptions[0]
    return str(exc) or type(exc).__name__
