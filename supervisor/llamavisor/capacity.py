"""How much memory the models of each router may take, as things are now."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import anyio

from llamavisor import budgets, footprint
from llamavisor.eviction import Budget
from llamavisor.gauge import RAM_ID, Reading
from llamavisor.host import Host
from llamavisor.meter import Meter
from llamavisor.penalty import Penalty
from llamavisor.router import Router
from llamavisor.settings import RouterSettings

FIRST_READING_S = 5.0
"""How long the first start of a router waits for the first reading; what comes later is told when it comes."""


class Capacity:
    """The devices that routers see, what there is of them, and what of that models may take.

    Args:
        meter: reads what there is.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._devices: dict[str, tuple[footprint.Device, ...]] = {}  # by router
        self._foreign: dict[str, int] = {}  # bytes that others hold, by device
        self._last: dict[str, Reading] = {}  # of each memory the last reading that told how much there is
        self._penalty = Penalty()

    def __repr__(self) -> str:
        return f"<Capacity {self._devices}>"

    async def look(self, host: Host) -> bool:
        """Find out which devices a router sees; whether they are others than before. Waits.

        Where nobody can say, what was known stays.
        """
        with anyio.move_on_after(FIRST_READING_S):
            await self.meter.first.wait()
        seen = await host.sight(self.meter.devices)
        name = host.settings.name
        if seen is None or _places(seen) == _places(self._devices.setdefault(name, ())):
            return False
        self._devices[name] = seen
        return True

    def forget(self, routers: Collection[str]) -> None:
        """Keep nothing of routers but these."""
        self._devices = {name: devices for name, devices in self._devices.items() if name in routers}

    def knows(self, router: str) -> bool:
        """Whether anybody could say which GPUs a router sees."""
        return router in self._devices

    def devices_of(self, router: str) -> tuple[footprint.Device, ...]:
        """The GPUs that a router sees, in its order; none while nobody can say."""
        return self._devices.get(router, ())

    def limits(self, settings: RouterSettings) -> dict[str, budgets.Limit]:
        """What the models of a router may take of each device as things are: less where others hold more."""
        devices = self.devices_of(settings.name)
        return budgets.limits(settings.memory, devices, self._readings(), foreign=self._foreign)

    def budget(self, router: Router) -> Budget:
        """The same as admission wants it; of RAM less for a while after the kernel had to kill."""
        limits: dict[str, int | None] = {device: limit.bytes for device, limit in self.limits(router.settings).items()}
        ram = limits.get(RAM_ID)
        if ram is not None:
            limits[RAM_ID] = self._penalty.lowered(ram, anyio.current_time())
        return Budget(limits, router.settings.models_max)

    def allowance(self, settings: RouterSettings) -> budgets.Allowance:
        """What the models of a router are told: it changes only with what there is and with what is written."""
        devices = self.devices_of(settings.name)
        limits = budgets.limits(settings.memory, devices, self._readings())
        return budgets.allow(limits, devices, settings.models_max)

    def note_others(self, held: Mapping[str, int], *, since: float) -> None:
        """Take note of what others hold of GPUs, given what models are known to hold while nothing is on its way.

        Of RAM nobody can say: what is mapped counts as free there. When it is short, that is seen by other signs.

        Args:
            held: bytes by device.
            since: since when that has been so: an earlier reading says nothing.
        """
        for device, reading in self._gpus().items():
            if reading.used_bytes is not None and reading.at > since:
                self._foreign[device] = max(0, reading.used_bytes - held.get(device, 0))

    def note_kills(self, kills: int, now: float) -> None:
        """The kernel has killed processes of ours for want of memory: models may take less RAM for a while."""
        self._penalty.note(kills, now)

    def totals(self) -> dict[str, int | None]:
        """How much there is of each memory, as far as that was ever told; None where it was not."""
        return {reading.device.memory_id: reading.total_bytes for reading in self._readings()}

    def unseen(self, settings: RouterSettings) -> tuple[str, ...]:
        """The devices for which the configuration has budgets and that the router does not see."""
        return budgets.unseen(settings.memory, self.devices_of(settings.name))

    def _readings(self) -> tuple[Reading, ...]:
        """A device that does not answer for a moment has as much memory as before: else all its models would change."""
        for device, reading in self.meter.readings.items():
            if reading.total_bytes is not None or device not in self._last:
                self._last[device] = reading
        return tuple(self._last.values())

    def _gpus(self) -> dict[str, Reading]:
        return {device: reading for device, reading in self.meter.readings.items() if device != RAM_ID}


def _places(devices: Collection[footprint.Device]) -> list[tuple[str, str]]:
    """What matters of the devices that a router sees: how much of them is free changes all the time."""
    return [(device.name, device.id) for device in devices]
