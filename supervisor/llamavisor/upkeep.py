"""What is done about memory every second: idle models expire, short memory is relieved, what is loaded is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import anyio
import anyio.abc

from llamavisor import events as ev
from llamavisor import growth
from llamavisor.appraisals import Appraisals
from llamavisor.capacity import Capacity
from llamavisor.eviction import Resident, expired
from llamavisor.gaps import Gaps
from llamavisor.gauge import RAM_ID
from llamavisor.models import Model
from llamavisor.router import Router
from llamavisor.scheduler import Scheduler
from llamavisor.slots import Key, Slot, Stage
from llamavisor.strain import Advice, Level, Strain
from llamavisor.survey import ttl_of

TICK_S = 1.0
MEASURE_FIRST_S = 1.0
"""A model is measured so long after its load, before anybody has used it."""
MEASURE_EVERY_S = 30.0
"""And so often while it is used: the kernel walks all of its pages for that."""


class Upkeep:
    """Does it.

    Args:
        routers: those of the fleet, by name.
        scheduler: who decides.
        capacity: what routers may take.
        appraisals: what models take.
        publish: where events go.
        resize: called when it is known, or known anew, how much memory there is.

    Attributes:
        strain: why no model is loaded for now: memory is short; "" while it is not.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        scheduler: Scheduler,
        *,
        capacity: Capacity,
        appraisals: Appraisals,
        publish: Callable[[ev.Event], None],
        resize: Callable[[], None],
    ) -> None:
        self.strain = ""
        self._routers = routers
        self._scheduler = scheduler
        self._capacity = capacity
        self._meter = capacity.meter
        self._appraisals = appraisals
        self._publish = publish
        self._resize = resize
        self._totals: Mapping[str, int | None] | None = None
        self._gaps = Gaps(TICK_S)
        self._strain, self._advice = Strain(), Advice()
        self._growth, self._looked_at = growth.Growth(), 0.0
        self._seen: dict[Key, _Seen] = {}
        self._is_measuring = False
        self._lineup: list[int] = []  # who is loaded, as of the last look
        self._lineup_since = 0.0
        self._ticked = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Upkeep of {len(self._seen)} models>"

    async def run(self) -> None:
        """Do it until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            while True:
                await anyio.sleep(TICK_S)
                self._tick(anyio.current_time(), self._tasks)
                self._ticked.set()
                self._ticked = anyio.Event()

    async def live_on(self) -> None:
        """Returns when it has been done once more."""
        await self._ticked.wait()

    def _tick(self, now: float, tasks: anyio.abc.TaskGroup) -> None:
        scheduler, admission = self._scheduler, self._scheduler.admission
        if gap_s := self._gaps.pass_s(now):
            admission.was_away(gap_s)
        scheduler.check(now)
        if (totals := self._capacity.totals()) != self._totals:
            if self._totals is not None:
                self._resize()
            self._totals = totals
        self._expire(now)
        self._recycle(now)
        if scheduler.decides:
            self._relieve(now)
        slots = admission.slots()
        self._meter.is_busy = bool(admission.orders) or any(slot.stage is not Stage.LOADED for slot in slots)
        self._note_others(slots, now)
        self._look_at(slots)
        if not self._is_measuring and (due := self._due(now)):
            self._is_measuring = True
            tasks.start_soon(self._measure, due)
        scheduler.refresh()

    def _expire(self, now: float) -> None:
        """Unload who has been idle for longer than its ttl."""

        def ttl(resident: Resident) -> float | None:
            return ttl_of(self._routers.get(resident.router), resident.name)

        for resident in expired(self._scheduler.admission.residents(now), now=now, ttl_of=ttl):
            self._scheduler.dismiss(resident.router, resident.name, ev.UnloadReason.EXPIRED)

    def _recycle(self, now: float) -> None:
        """Have models loaded anew whose processes have grown beyond their bounds, when nobody uses them."""
        if now - self._looked_at < growth.LOOK_S:
            return
        self._looked_at = now
        there: set[Key] = set()
        for slot in self._scheduler.admission.slots():
            router, name = slot.key
            model, owner = self._model(slot.key), self._routers.get(router)
            spec = owner.shelf.spec(name) if owner is not None else None
            limit = spec.recycle_bytes if spec is not None else None
            if limit is None or model is None or model.pid is None or slot.stage is not Stage.LOADED:
                continue
            there.add(slot.key)
            size = self._meter.anonymous(model.pid) or 0
            resident = slot.resident
            is_over = size > limit
            if self._growth.is_due(
                slot.key, loaded_at=resident.loaded_at, is_over=is_over, is_busy=resident.is_busy, now=now
            ):
                self._publish(ev.ModelGrown(router=router, model=name, bytes=size, limit_bytes=limit))
                self._scheduler.dismiss(router, name, ev.UnloadReason.RECYCLED)
        self._growth.forget_all_but(there)

    def _relieve(self, now: float) -> None:
        """See whether memory is short, and do what follows (FAULTS.md, R3)."""
        admission = self._scheduler.admission
        can_relieve = any(
            slot.stage is Stage.LOADED and not slot.resident.is_busy and not slot.resident.is_pinned
            for slot in admission.slots()
        )
        before = self._advice
        self._advice = advice = self._strain.step(
            self._meter.readings.get(RAM_ID), self._meter.pressure, now, can_relieve=can_relieve
        )
        if advice.level is not before.level:
            if advice.level is Level.CALM:
                self._publish(ev.MemoryEased())
            else:
                self._publish(ev.MemoryShort(is_refusing=advice.level is Level.REFUSE, detail=advice.text))
        if advice.lacking_bytes:
            actions = admission.relieve({RAM_ID: advice.lacking_bytes}, now)
            self._scheduler.carry_out(actions, reason=ev.UnloadReason.PRESSURE)
        why = advice.text if advice.level is Level.REFUSE else ""
        if why != self.strain:
            self.strain = why
            retry_after_s = advice.retry_after_s or 0.0
            self._scheduler.carry_out(admission.strain(why, now, retry_after_s=retry_after_s))

    def _note_others(self, slots: list[Slot], now: float) -> None:
        """See what others hold of GPUs, while nothing of ours is on its way."""
        lineup = [id(slot) for slot in slots if slot.stage is Stage.LOADED]
        if lineup != self._lineup or len(lineup) < len(slots):
            self._lineup, self._lineup_since = lineup, now
            return
        held: dict[str, int] = {}
        for slot in slots:
            # Of what a driver does not tell of our processes the estimate has to do.
            for device, size in {**slot.resident.bytes, **self._appraisals.measured(slot.key)}.items():
                held[device] = held.get(device, 0) + size
        self._capacity.note_others(held, since=self._lineup_since)

    # --- measuring ------------------------------------------------------------------------------------------------

    def _look_at(self, slots: list[Slot]) -> None:
        """Keep a record of each loaded model, and say so if it has less context than it was to have."""
        there = {slot.key: slot for slot in slots if slot.stage in {Stage.LOADED, Stage.DRAINING}}
        self._seen = {key: seen for key, seen in self._seen.items() if there.get(key) is seen.slot}
        for key, slot in there.items():
            seen = self._seen.setdefault(key, _Seen(slot))
            model, appraisal = self._model(key), self._appraisals.get(key)
            if seen.is_told or model is None or model.n_ctx is None or appraisal is None:
                continue
            seen.is_told = True
            if model.n_ctx < appraisal.n_ctx:
                router, name = key
                self._publish(ev.ContextShrunk(router=router, model=name, asked=appraisal.n_ctx, got=model.n_ctx))

    def _model(self, key: Key) -> Model | None:
        router = self._routers.get(key[0])
        return router.table.get(key[1]) if router is not None else None

    def _due(self, now: float) -> dict[Key, int]:
        """The process of every model that is to be measured now."""
        due: dict[Key, int] = {}
        for key, seen in self._seen.items():
            model, resident = self._model(key), seen.slot.resident
            if model is None or model.pid is None or resident.is_busy:
                continue
            is_first = seen.at is None and now - resident.loaded_at >= MEASURE_FIRST_S
            is_used = resident.last_used > max(seen.at or 0.0, resident.loaded_at)
            if is_first or (is_used and (not seen.is_recorded or now - (seen.at or 0.0) >= MEASURE_EVERY_S)):
                due[key] = model.pid
        return due

    async def _measure(self, due: Mapping[Key, int]) -> None:
        """The worker of it."""
        try:
            measured = await self._meter.measure(due)
        finally:
            self._is_measuring = False
        now = anyio.current_time()
        for key, size in measured.items():
            seen = self._seen.get(key)
            if seen is None or not size:
                continue
            resident = seen.slot.resident
            is_telling = not seen.is_recorded and resident.last_used > resident.loaded_at
            self._appraisals.note(key, size, is_telling=is_telling)
            seen.at, seen.is_recorded = now, seen.is_recorded or is_telling
            sized = self._scheduler.admission.sized(*key, self._appraisals.expected(key), now)
            self._scheduler.carry_out(sized)


class _Seen:
    """What was seen of one loaded model since its load."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.at: float | None = None  # when it was last measured
        self.is_recorded = False  # whether it was measured after it had answered somebody
        self.is_told = False  # whether its context was looked at
