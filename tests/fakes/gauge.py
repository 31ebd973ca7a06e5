"""A gauge within the test itself, for virtual time: what it tells is what the test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import anyio

from llamavisor.events import Bus
from llamavisor.gauge import RAM, Device, Reading
from llamavisor.meter import Meter

GIB = 2**30


class FakeGauge:
    """Reads memory that is not there; `llamavisor.gauge.Gauge` for a test.

    Attributes:
        total: bytes of each device.
        used: likewise; a device without a number is unknown.
        failure: raised by every read, None for a gauge that works.
        hangs: whether a read never ends.
        reads: how often it was read.
    """

    def __init__(self, ram: int = 64 * GIB, *, gpus: Sequence[Device] = (), gpu_total: int = 24 * GIB) -> None:
        self.devices = [RAM, *gpus]
        self.total = {RAM.id: ram, **{gpu.id: gpu_total for gpu in gpus}}
        self.used: dict[str, int | None] = {RAM.id: ram // 16, **dict.fromkeys((gpu.id for gpu in gpus), 0)}
        self.failure: Exception | None = None
        self.hangs = False
        self.reads = 0

    def __repr__(self) -> str:
        return f"<FakeGauge {self.used}>"

    async def read(self) -> Sequence[Reading]:
        """Every device, each once."""
        self.reads += 1
        if self.hangs:
            await anyio.sleep_forever()
        if self.failure is not None:
            raise self.failure
        at = anyio.current_time()
        readings = []
        for device in self.devices:
            total, used = self.total[device.id], self.used[device.id]
            if used is None:
                readings.append(Reading(device, None, None, None, at, "the test says so"))
            else:
                readings.append(Reading(device, total, used, total - used, at))
        return readings

    async def aclose(self) -> None:
        """There is nothing to let go of."""


async def at_once(work: Callable[[], None]) -> None:
    """Does what takes no time here: a thread would let virtual deadlines pass."""
    work()


def fake_meter(bus: Bus, folder: Path, gauge: FakeGauge | None = None) -> Meter:
    """A meter of memory that is not there, on a machine whose kernel tells nothing."""
    root = folder / "no-kernel"
    root.mkdir(exist_ok=True)
    return Meter(gauge or FakeGauge(), bus=bus, root=root, aside=at_once)
