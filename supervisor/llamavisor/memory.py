"""All about memory of a fleet in one place: what there is, who takes it, who may have it, and who has to leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import anyio

from llamavisor.appraisals import Appraisals
from llamavisor.capacity import Capacity
from llamavisor.devices import DeviceWatch
from llamavisor.errors import ModelNotFoundError
from llamavisor.events import (
    Bus,
    ModelAdded,
    ModelPinned,
    ModelRemoved,
    ModelsChanged,
    Published,
    RouterReady,
)
from llamavisor.ledger import Footprints
from llamavisor.meter import Meter
from llamavisor.occupancy import Forecast, Occupancy
from llamavisor.pins import Pins
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.router import Router
from llamavisor.scheduler import Scheduler
from llamavisor.settings import FleetSettings
from llamavisor.survey import forecast, survey
from llamavisor.upkeep import Upkeep

PINS_S = 0.5
"""Between two looks at what thousands of tables say of pins."""


class Memory:
    """The memory of one fleet.

    Args:
        routers: those of the fleet, by name; the fleet changes them.
        meter: reads how much there is.
        footprints: what models took when they were loaded before.
        pins: which models people want to stay.
        records: what of quarantines outlives the daemon.
        bus: where events come from and go to.
        resize: called when it is known, or known anew, how much memory there is.
        clock: as for `Scheduler`.

    Attributes:
        capacity: what routers may take.
        scheduler: who decides.
        devices: notices which vanish.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        *,
        meter: Meter,
        footprints: Footprints | None,
        pins: Pins | None,
        records: QuarantineRecords | None = None,
        bus: Bus,
        resize: Callable[[], None],
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self.capacity = Capacity(meter)
        self._routers = routers
        self._bus = bus
        self._pins = Pins() if pins is None else pins
        self._specs_changed = anyio.Event()
        self._appraisals = Appraisals(self.capacity.devices_of, footprints=footprints, publish=bus.publish)
        self.scheduler = Scheduler(
            routers, bus=bus, capacity=self.capacity, appraisals=self._appraisals, records=records, clock=clock
        )
        self._upkeep = Upkeep(
            routers,
            self.scheduler,
            capacity=self.capacity,
            appraisals=self._appraisals,
            publish=bus.publish,
            resize=resize,
        )
        self.devices = DeviceWatch(routers, self.capacity, publish=bus.publish)
        bus.listen(self._hear, hears_frequent=False)

    def __repr__(self) -> str:
        return f"<Memory {self.scheduler!r}>"

    async def run(self) -> None:
        """Look after it until cancelled."""
        async with anyio.create_task_group() as group:
            for part in (self.capacity.meter, self.scheduler, self._upkeep, self.devices):
                group.start_soon(part.run)
            group.start_soon(self._keep_pins)

    async def live_on(self) -> None:
        """Returns when it has been looked after once more."""
        await self._upkeep.live_on()

    async def _keep_pins(self) -> None:
        """Look who is to stay after models have changed: once for many that change together."""
        while True:
            await self._specs_changed.wait()
            self._specs_changed = anyio.Event()
            self.note_specs()
            await anyio.sleep(PINS_S)

    def is_loading(self) -> bool:
        """Whether a model is being loaded anywhere."""
        return any(slot.resident.is_loading for slot in self.scheduler.admission.slots())

    def follow(self, settings: FleetSettings) -> None:
        """Go by these settings from now on."""
        self.scheduler.follow(settings)

    def forget_all_but(self, routers: Collection[str]) -> None:
        """Keep nothing of routers that are not there any more."""
        self.scheduler.forget(routers)
        self.capacity.forget(routers)
        self._appraisals.forget(routers)

    def occupancy(self) -> Occupancy:
        """Who takes memory, what there is of it, and who waits for it, at this moment."""
        return survey(
            self._routers,
            self.scheduler.admission,
            self._appraisals,
            self.capacity,
            is_enforced=self.scheduler.decides,
            strain=self._upkeep.strain,
            now=anyio.current_time(),
        )

    async def forecast(self, model: str, *, router: str | None = None) -> Forecast:
        """What would happen if a model were asked for now: where it would go, and who would have to leave.

        Args:
            model: its name, or an alias.
            router: the only router on which it may be, None for any.

        Raises:
            ModelNotFoundError: there is no such model.
            RouterNotReadyError: all routers that may have it are stopped or failed.
        """
        where = self.scheduler.where
        name = where.name_of(model, only=router)
        await where.appraise(name, only=router)
        candidates = where.candidates(name, only=router)
        return forecast(name, self.scheduler.admission, candidates, anyio.current_time())

    # --- pins -----------------------------------------------------------------------------------------------------

    def pin(self, model: str) -> bool:
        """Want a model to stay in memory once it is there, also after a restart of the daemon; False if it is so.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        return self._wish(model, is_pinned=True)

    def unpin(self, model: str) -> bool:
        """Do not want that any more, be it said here or written in the configuration; False if it is so.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        return self._wish(model, is_pinned=False)

    def _wish(self, model: str, *, is_pinned: bool) -> bool:
        name = self.scheduler.where.name_of(model)
        routers = self._routers.values()
        if not any(name in router.shelf.wanted or router.table.get(name) is not None for router in routers):
            raise ModelNotFoundError(f"no model {model!r}", hint="see `llamavisor models`")
        was_pinned = self.scheduler.is_pinned(name)
        specs = (router.shelf.wanted.get(name) for router in routers)
        if is_pinned is any(spec is not None and spec.is_pinned for spec in specs):
            self._pins.forget(name)  # it is written so: what will be written later counts again
        else:
            self._pins.wish(name, is_pinned=is_pinned)
        self.note_specs()
        if was_pinned is not is_pinned:
            self._bus.publish(ModelPinned(model=name, is_pinned=is_pinned))
        return was_pinned is not is_pinned

    def note_specs(self) -> None:
        """What models should be has changed, or which there are: other ones may be pinned."""
        shelves = [router.shelf for router in self._routers.values()]
        # A model whose file has gone or been damaged is wanted no more, and stays as long as its router was told of it.
        specs = (spec for shelf in shelves for spec in {**shelf.offer.specs(), **shelf.wanted}.values())
        self.scheduler.pin(self._pins.among(specs))

    def _hear(self, published: Published) -> None:
        if isinstance(published.event, RouterReady):
            self.note_specs()  # before any of its models is loaded, and another takes its place
        elif isinstance(published.event, ModelAdded | ModelRemoved | ModelsChanged):
            self._specs_changed.set()
