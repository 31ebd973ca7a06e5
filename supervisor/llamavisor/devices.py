"""Notices when a GPU vanishes under a router, and when it comes back.

A driver that does not answer for a while has not lost its device: one that the gauge knows nothing of for long is
suspected, and then the router's own llama-server is asked. What it does not list is gone. It would go on without it,
on the processor and in silence; so its router is restarted, is DEGRADED for as long as the device is missing, and is
restarted once more when it is back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import anyio

from llamavisor import footprint
from llamavisor.capacity import Capacity
from llamavisor.events import Event, Warned
from llamavisor.gauge import RAM_ID
from llamavisor.gauge.listed import HIDING
from llamavisor.messages import DevicesLost
from llamavisor.router import Router
from llamavisor.settings import RouterSettings
from llamavisor.states import SERVING

LOOK_S = 10.0
SUSPECT_AFTER_S = 30.0
"""Drivers are reset, and gauges slow, for shorter."""
ASK_EVERY_S = 60.0
"""To list devices takes a moment of every GPU."""


class DeviceWatch:
    """Does it for all routers of a fleet.

    Args:
        routers: those of the fleet, by name.
        capacity: knows what routers see, and reads the gauge.
        publish: where events go.
    """

    def __init__(self, routers: Mapping[str, Router], capacity: Capacity, *, publish: Callable[[Event], None]) -> None:
        self._routers = routers
        self._capacity = capacity
        self._publish = publish
        self._watched: dict[str, _Watched] = {}

    def __repr__(self) -> str:
        return f"<DeviceWatch {self.missing}>"

    @property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """The devices that have vanished, by router."""
        return {name: watched.missing for name, watched in self._watched.items() if watched.missing}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await anyio.sleep(LOOK_S)
            self._watched = {name: each for name, each in self._watched.items() if name in self._routers}
            for router in list(self._routers.values()):
                if router.state in SERVING:
                    await self._look(router, anyio.current_time())

    async def _look(self, router: Router, now: float) -> None:
        watched = self._watched.get(router.name)
        if watched is None or watched.settings != router.settings.without_models():
            watched = self._watched[router.name] = _Watched(router.settings.without_models(), router.starts)
            self._tell_of_fallback(router)
        watched.had |= {device.name: device for device in self._capacity.devices_of(router.name)}
        if router.starts != watched.starts:  # a fresh process, which may see more, or less
            watched.starts = router.starts
            if watched.missing:
                router.tell(DevicesLost(watched.missing, is_news=False))
        is_suspect = watched.suspect(self._silent(), now)
        if not (is_suspect or watched.missing) or now - watched.asked_at < ASK_EVERY_S:
            return
        watched.asked_at = now
        seen = await router.host.sight(self._capacity.meter.devices, is_fresh=True)
        if seen is None or router.state not in SERVING:
            return  # nobody can say
        names = {device.name for device in seen}
        missing = tuple(name for name in watched.had if name not in names)
        if missing != watched.missing:
            is_worse = bool(set(missing) - set(watched.missing))
            watched.missing = missing
            router.tell(DevicesLost(missing, is_news=is_worse))

    def _silent(self) -> set[str]:
        """The memories of which the gauge says nothing."""
        readings = self._capacity.meter.readings
        known = {each for each, reading in readings.items() if reading.is_known}
        had = {device.id for watched in self._watched.values() for device in watched.had.values()}
        return had - known - {RAM_ID}

    def _tell_of_fallback(self, router: Router) -> None:
        """A machine with a GPU and a llama-server that sees none: models run on the processor, and nobody says so."""
        gpus = [each.name for each in self._capacity.meter.devices if each.memory_id != RAM_ID]
        if gpus and not self._capacity.devices_of(router.name) and _may_use_gpus(router):
            text = (
                f"this machine has {', '.join(gpus)}, and its llama-server sees no GPU: models run on the processor. "
                "Use a build for that GPU, mend its driver, or say gpu_layers = 0"
            )
            self._publish(Warned(subject=f"router {router.name}", text=text))


def _may_use_gpus(router: Router) -> bool:
    """Whether a router's options and its environment leave GPUs to its models."""
    launch = router.launch
    return launch is not None and launch.options.may_use_gpus and launch.env.keys().isdisjoint(HIDING)


class _Watched:
    """What is known of the devices of one router."""

    def __init__(self, settings: RouterSettings, starts: int) -> None:
        self.settings = settings
        self.starts = starts
        self.had: dict[str, footprint.Device] = {}  # all that it has seen since it was told to be this
        self.missing: tuple[str, ...] = ()
        self.asked_at = -ASK_EVERY_S
        self._silent_since: dict[str, float] = {}

    def suspect(self, silent: set[str], now: float) -> bool:
        """Whether the gauge has said nothing of one of its devices for long."""
        ours = {device.id for device in self.had.values()} & silent
        self._silent_since = {each: self._silent_since.get(each, now) for each in ours}
        return any(now - since >= SUSPECT_AFTER_S for since in self._silent_since.values())
