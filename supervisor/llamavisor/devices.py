"""Notices when a GPU vanishes under a router, and when it comes back.

A driver that does not answer for a while has not lost its device: one of which the gauge could tell and knows nothing
for long is suspected, and then the router's own llama-server is asked, twice. If it lists fewer than it did, the device
is gone. A router would go on without it, on the processor and in silence; so it loads nothing more, is restarted when
nothing of what it had works, is DEGRADED for as long as the device is missing, and is restarted once more when it is
back.
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
        told = router.settings.without_models(), router.launch.found.fingerprint if router.launch is not None else None
        watched = self._watched.get(router.name)
        if watched is None or watched.told != told:  # another build may call the same devices otherwise
            watched = self._watched[router.name] = _Watched(told, router.starts)
            await self._tell_of_fallback(router)
        watched.had |= {device.id: device for device in self._capacity.devices_of(router.name)}
        if router.starts != watched.starts:  # a fresh process, which may see more, or less
            watched.starts = router.starts
            if watched.missing:
                router.tell(DevicesLost(watched.missing, is_news=False))
        silent = watched.silent(self._known(), now)
        if not (silent or watched.missing) or now - watched.asked_at < ASK_EVERY_S:
            return
        watched.asked_at = now
        seen = await router.host.sight(self._capacity.meter.devices, is_fresh=True)
        if seen is None or router.state not in SERVING:
            return  # nobody can say
        count = len(watched.had) - len(seen)
        missing = tuple(watched.had[each].name for each in silent)[:count] if count > 0 else ()
        is_sure, watched.listed = watched.listed == missing, missing
        if is_sure and missing != watched.missing:
            is_worse = bool(set(missing) - set(watched.missing))
            watched.missing = missing
            router.tell(DevicesLost(missing, is_news=is_worse))

    def _known(self) -> set[str]:
        """The memories of which the gauge can tell now."""
        return {each for each, reading in self._capacity.meter.readings.items() if reading.is_known}

    async def _tell_of_fallback(self, router: Router) -> None:
        """A machine with a GPU and a llama-server that sees none: models run on the processor, and nobody says so."""
        gpus = [each.name for each in self._capacity.meter.devices if each.memory_id != RAM_ID]
        if not gpus or not _may_use_gpus(router):
            return
        if await router.host.sight(self._capacity.meter.devices) == ():
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
    """What is known of the devices of one router.

    Args:
        told: what the router is told to be, and which build it runs.
        starts: how many processes it has had.
    """

    def __init__(self, told: object, starts: int) -> None:
        self.told = told
        self.starts = starts
        self.had: dict[str, footprint.Device] = {}  # all that it has seen since it was told to be this, by id
        self.missing: tuple[str, ...] = ()
        self.listed: tuple[str, ...] | None = None  # what was missing in the last list
        self.asked_at = -ASK_EVERY_S
        self._known: set[str] = set()  # of which the gauge could tell once
        self._silent_since: dict[str, float] = {}

    def silent(self, known: set[str], now: float) -> tuple[str, ...]:
        """Its devices of which the gauge could tell, and has told nothing for long."""
        ours = self.had.keys() - {RAM_ID}
        self._known |= ours & known
        self._silent_since = {each: self._silent_since.get(each, now) for each in (ours & self._known) - known}
        return tuple(sorted(each for each, since in self._silent_since.items() if now - since >= SUSPECT_AFTER_S))
