"""Carries out what admission decides, over all routers of a fleet, and tells it what came of that.

What routers say comes as events, each at the moment at which the router's owner has taken note of it; admission's table
is brought up to date in the same step, and who waits is granted, refused, or served by a worker that was begun in it.
No method here waits, but for those that are said to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

import anyio
import anyio.abc

from llamavisor import events as ev
from llamavisor.admission import Admission
from llamavisor.appraisals import Appraisals
from llamavisor.capacity import Capacity
from llamavisor.cause import Cause, Consequence, Subject, consequence
from llamavisor.demands import Action, CancelLoad, Grant, Lease, Limits, Load, Order, Refuse, Rejection, Unload
from llamavisor.endpoint import Endpoint
from llamavisor.errors import LlamavisorError
from llamavisor.inbox import Inbox
from llamavisor.leases import Leases
from llamavisor.messages import Suspected
from llamavisor.moves import Moves, has_child
from llamavisor.operations import Ticket
from llamavisor.placement import Candidate
from llamavisor.quarantine import Quarantine
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.router import Router
from llamavisor.sections import ModelSpec
from llamavisor.settings import FleetSettings
from llamavisor.slots import Key, Stage
from llamavisor.states import RouterState
from llamavisor.waiters import Waiters, refusal
from llamavisor.whereabouts import Whereabouts

CLOSED_S = 5.0
"""Who has waited for so long for a router that is to be restarted need not wait for it to become idle by itself."""
CRASHES = 3
CRASHES_WITHIN_S = 300.0
"""A model that has crashed so often within so long, and answered nobody, is left alone for a while (FAULTS.md, P6)."""
HANGS = 2
HANGS_WITHIN_S = 900.0
"""One that has hung so often within so long is, whomever it has answered: to find that out takes a minute each time."""
FAILURES = 3
"""A model is suspected that has answered so many requests in a row with a server error, and none well."""
OOM_NEWS_S = 2.0
"""How long after a kill by the kernel the end of a process is put down to it."""
_CRASHED = frozenset({ev.UnloadReason.CRASHED, ev.UnloadReason.FILE_CHANGED})


class Scheduler:
    """The face of admission; `arbiter.Arbiter` for the routers.

    Args:
        routers: those of the fleet, by name; the fleet changes them.
        bus: where events come from and go to.
        capacity: what routers may take.
        appraisals: what models take.
        records: what of quarantines outlives the daemon.
        clock: monotonic seconds; anyio's is the same and costs a microsecond.

    Attributes:
        admission: the table and the queue.
        where: where models may be.
        leases: how whoever wants a model comes to it.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        *,
        bus: ev.Bus,
        capacity: Capacity,
        appraisals: Appraisals,
        records: QuarantineRecords | None = None,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self.admission = Admission()
        self._routers = routers
        self._bus = bus
        self._capacity = capacity
        self._appraisals = appraisals
        self._records = QuarantineRecords() if records is None else records
        self._decides = False
        self._pinned: frozenset[str] = frozenset()
        self._waiters = Waiters(bus.publish)
        self._is_refreshing = self._refreshes_again = False
        self.where = Whereabouts(routers, self.admission, capacity, appraisals)
        self.leases = Leases(
            routers,
            admission=self.admission,
            waiters=self._waiters,
            where=self.where,
            carry_out=self.carry_out,
            start_soon=self._start_soon,
            forgive=self.forgive,
            decides=lambda: self._decides,
            clock=clock,
        )
        self._moves = Moves(
            routers,
            self.admission,
            capacity.meter,
            publish=bus.publish,
            tell=self.carry_out,
            start_soon=self._start_soon,
        )
        self._ended: set[str] = set()  # routers whose process has ended, or is being ended
        self._crashes: dict[Key, deque[float]] = {}
        self._hangs: dict[Key, deque[float]] = {}
        self._work = Inbox[tuple[Callable[..., Coroutine[Any, Any, None]], tuple[object, ...]]]()
        bus.listen(self._hear, hears_frequent=False)

    def __repr__(self) -> str:
        return f"<Scheduler {self.admission!r}>"

    async def run(self) -> None:
        """Carry out what is decided until cancelled. Waits."""
        async with anyio.create_task_group() as workers:
            while True:
                work, args = await self._work.take()
                workers.start_soon(work, *args)

    def follow(self, settings: FleetSettings) -> None:
        """Decide by these settings from now on."""
        self._decides = settings.serve == "gateway"
        limits = Limits(
            max_waiting=settings.max_waiting,
            max_waiting_per_model=settings.max_waiting_per_model,
            min_residency_s=settings.min_residency_s,
            oversize=settings.oversize,
        )
        self.carry_out(self.admission.restrict(limits, anyio.current_time()))

    # --- for routers ----------------------------------------------------------------------------------------------

    @property
    def decides(self) -> bool:
        """Whether every load is decided here; else routers load what they are asked to, and this only looks on."""
        return self._decides

    def demand(self, router: str, ticket: Ticket) -> None:
        """Have the model of a ticket loaded, there if it is as good as elsewhere, and finish the ticket."""
        name = ticket.operation.model

        def answer(outcome: Lease | Rejection) -> None:
            if isinstance(outcome, Lease):
                self._release(outcome)
                ticket.finish()
            else:
                ticket.finish(refusal(outcome))

        async def ask() -> None:
            try:
                await self.where.appraise(name)
                self.leases.ask(name, self.where.candidates(name, first=router), answer)
            except LlamavisorError as error:
                ticket.finish(error)

        self._start_soon(ask)

    def dismiss(self, router: str, model: str, reason: ev.UnloadReason = ev.UnloadReason.REFRESHED) -> None:
        """Have a model unloaded as soon as nobody uses it."""
        actions = self.admission.dismiss(router, model, anyio.current_time())
        slot = self.admission.slot(router, model)
        if slot is not None and slot.is_dismissed:
            self._moves.note_reason((router, model), reason)
        self.carry_out(actions)

    def lose(self, router: str, model: str) -> None:
        """Promise the model to nobody any more: its process hangs, and is being ended whomever it answers."""
        self.carry_out(self.admission.leaving(router, model, anyio.current_time()))

    def clear(self, router: str, model: str) -> None:
        """The model was suspected, was tried, and works."""
        if (slot := self.admission.slot(router, model)) is not None:
            slot.failures = 0

    def make_way(self, router: str) -> None:
        """That router loads nothing until it is restarted: have its models leave if somebody has waited for long.

        Each leaves when the last one has ended whom it answers, and whoever asks for it until then waits.
        """
        now = anyio.current_time()
        waiting = [order for order in self.admission.orders if now - order.since >= CLOSED_S]
        if any(each.router == router for order in waiting for each in order.candidates):
            for slot in self.admission.slots():
                if slot.resident.router == router and slot.stage is Stage.LOADED:
                    self.dismiss(*slot.key)

    def is_pinned(self, model: str) -> bool:
        """Whether a person wants the model to stay in memory."""
        return model in self._pinned

    def is_used(self, router: str, model: str | None = None) -> bool:
        """Whether somebody has a lease on that model, or, of None, on any of that router, but for one that hangs."""
        slots = self.admission.slots() if model is None else [self.admission.slot(router, model)]
        return any(
            slot is not None and slot.resident.router == router and slot.leases and slot.stage is not Stage.LEAVING
            for slot in slots
        )

    def was_killed_for_memory(self) -> bool:
        """Whether the kernel has, a moment ago, killed a process of our cgroup for want of memory (P7)."""
        return self._capacity.meter.killed_since(anyio.current_time() - OOM_NEWS_S)

    # --- for those who want models --------------------------------------------------------------------------------

    def _release(self, lease: Lease) -> None:
        self.carry_out(self.admission.release(lease, anyio.current_time()))

    def refresh(self) -> None:
        """Something has changed about routers, models or memory: see that who waits is served accordingly."""
        if self._is_refreshing:
            self._refreshes_again = True
        elif self.admission.orders:
            self._is_refreshing = True
            self._start_soon(self._refresh)

    async def _refresh(self) -> None:
        try:
            self._refreshes_again = False
            for order in self.admission.orders:
                await self.where.appraise(order.model, only=order.only)
            candidates = {(order.model, order.only): self._candidates_of(order) for order in self.admission.orders}
            self.carry_out(self.admission.candidates_changed(candidates, anyio.current_time()))
        finally:
            self._is_refreshing = False
        if self._refreshes_again:
            self.refresh()

    def _candidates_of(self, order: Order) -> list[Candidate]:
        try:
            return self.where.candidates(order.model, only=order.only)
        except LlamavisorError:
            return []  # admission says that it may be nowhere

    def pin(self, models: frozenset[str]) -> None:
        """These models are to stay in memory, and no others."""
        if models != self._pinned:
            self._pinned = models
            self.carry_out(self.admission.pin(models, anyio.current_time()))

    def end_unresponsive(self, endpoint: Endpoint) -> None:
        """The process of a model lives and takes no connection: have it ended, so that it can be loaded anew."""
        if self.leases.is_kept(endpoint):
            self._routers[endpoint.router].tell(Suspected(endpoint.model, endpoint.port))

    # --- what is decided ------------------------------------------------------------------------------------------

    def carry_out(self, actions: Sequence[Action], *, reason: ev.UnloadReason | None = None) -> None:
        """Do what admission has decided.

        Args:
            actions: in their order.
            reason: why models are unloaded, None if that has been said or is to make room.
        """
        for action in actions:
            match action:
                case Grant(number, lease):
                    if not self._waiters.grant(number, lease):
                        self._release(lease)
                case Refuse(number, rejection):
                    self._waiters.refuse(number, rejection)
                case Load(router, model, is_oversize):
                    if is_oversize:
                        text = f"is larger than the whole budget of router {router}; llama.cpp makes it fit as it can"
                        self._bus.publish(ev.Warned(subject=f"model {model}", text=text))
                    self._moves.load((router, model))
                case Unload(router, model):
                    if reason is not None:
                        self._moves.note_reason((router, model), reason)
                    # Who has a lease is known where we decide; else a client may have come a moment ago.
                    self._moves.unload((router, model), if_idle=not self._decides)
                case CancelLoad(router, model):
                    self._moves.note_reason((router, model), ev.UnloadReason.CANCELLED)
                    self._moves.unload((router, model), if_idle=False)
                case Quarantine() if self._decides:  # else its router tries again whenever it is asked
                    self._tell_quarantine(action)

    def _spec_of(self, key: Key) -> ModelSpec | None:
        router = self._routers.get(key[0])
        return router.shelf.wanted.get(key[1]) if router is not None else None

    def _recall(self) -> None:
        """Models are known that were not: an earlier daemon may have left some of them alone."""
        for quarantine in self._records.recall(self._spec_of) if self._decides else ():
            self.admission.recall(quarantine)

    def forgive(self, model: str) -> None:
        """The model's file or options have changed, or a person says so: its failures are forgotten."""
        self._records.forget(model)
        for known in (self._crashes, self._hangs):
            for key in [key for key in known if key[1] == model]:
                del known[key]
        self.carry_out(self.admission.forgive(model, anyio.current_time()))

    def _tell_quarantine(self, quarantine: Quarantine) -> None:
        self._records.note(quarantine, self._spec_of((quarantine.router, quarantine.model)))
        self._bus.publish(
            ev.ModelQuarantined(
                router=quarantine.router,
                model=quarantine.model,
                for_s=quarantine.until - anyio.current_time(),
                failures=quarantine.failures,
                reason=quarantine.reason,
            )
        )

    # --- what happens ---------------------------------------------------------------------------------------------

    def _hear(self, published: ev.Published) -> None:
        now, admission = anyio.current_time(), self.admission
        match published.event:
            case ev.RouterStateChanged(router=router, new=RouterState.STOPPING):
                self._router_ended(router, has_crashed=False, now=now)
            case ev.RouterExited(router=router, is_requested=is_requested):
                self._router_ended(router, has_crashed=not is_requested, now=now)
            case ev.RouterGone(router=router):
                if router in self._ended:
                    self.carry_out(admission.router_gone(router, now))
            case ev.RouterReady(router=router):
                self._ended.discard(router)
                self._recall()
                self.carry_out(admission.router_up(router, now))
                self.refresh()
            case ev.ModelAdded() | ev.ModelRemoved() | ev.ModelsChanged() | ev.ModelWithheld():
                self._recall()
                self.refresh()
            case ev.MemoryKill(kills=kills):
                self._capacity.note_kills(kills, now)
            case ev.ModelChanged(model=model):
                self.forgive(model)
            case ev.ModelLoading(router=router, model=model):
                if not self._moves.is_loading((router, model)):
                    size = self._appraisals.expected((router, model))
                    self.carry_out(admission.loading(router, model, size, now))
                self._start_soon(self._size_up, (router, model))
            case ev.ModelProgress(router=router, model=model, progress=progress):
                admission.progressed(router, model, progress, now)
            case ev.ModelLoaded(router=router, model=model):
                self._loaded((router, model), now)
            case ev.ModelLoadFailed(router=router, model=model, reason=reason, cause=cause) if (
                router not in self._ended
            ):
                then = consequence(cause, Subject.LOADING)
                self.carry_out(admission.load_failed(router, model, reason, then=then, now=now))
                self._moves.see_off((router, model))
            case ev.ModelUnloaded(router=router, model=model) if router not in self._ended:
                self._unloaded((router, model), published.event, now)
            case ev.ModelChildExited(router=router, model=model):
                slot = admission.slot(router, model)
                if slot is not None and slot.stage in {Stage.LOADED, Stage.DRAINING}:
                    self.carry_out(admission.leaving(router, model, now))  # whatever its router goes on saying

    def forget(self, routers: Collection[str]) -> None:
        """Keep nothing of routers but these."""
        self._ended.intersection_update(routers)
        for known in (self._crashes, self._hangs):
            for key in [key for key in known if key[0] not in routers]:
                del known[key]
        self.admission.forget(routers)

    def _router_ended(self, router: str, *, has_crashed: bool, now: float) -> None:
        self._ended.add(router)
        self.carry_out(self.admission.router_ended(router, has_crashed=has_crashed, now=now))

    def _loaded(self, key: Key, now: float) -> None:
        router = self._routers.get(key[0])
        model = router.table.get(key[1]) if router is not None else None
        used_at = model.used_at if model is not None else None
        self.carry_out(self.admission.loaded(*key, None, now, last_used=used_at))

    def _unloaded(self, key: Key, event: ev.ModelUnloaded, now: float) -> None:
        self._appraisals.unloaded(key)
        if event.reason is ev.UnloadReason.STALLED:
            then = consequence(Cause.STALLED, Subject.LOADING)
            self.carry_out(self.admission.load_failed(*key, "its load made no progress", then=then, now=now))
        if (reason := self._why_left_alone(key, event, now)) is not None:
            self.carry_out(self.admission.crashed(*key, reason, now))
        else:
            self.carry_out(self.admission.leaving(*key, now))
        self._moves.see_off(key)

    def _why_left_alone(self, key: Key, event: ev.ModelUnloaded, now: float) -> str | None:
        """Why a model that has served and was lost is not loaded again at once; None if it may be."""
        if event.cause is not None and consequence(event.cause, Subject.SERVING) is Consequence.QUARANTINE:
            return event.detail
        if event.reason is ev.UnloadReason.UNRESPONSIVE:
            if _is_too_often(self._hangs.setdefault(key, deque(maxlen=HANGS)), now, HANGS_WITHIN_S):
                return f"its process has hung {HANGS} times within {HANGS_WITHIN_S / 60:.0f} min"
        elif event.reason not in _CRASHED or event.cause is Cause.KILLED:
            return None  # somebody wanted it to go
        slot = self.admission.slot(*key)
        if slot is not None and slot.has_answered:  # it is of use: whatever ends it is not its own fault each time
            self._crashes.pop(key, None)
            return None
        if _is_too_often(self._crashes.setdefault(key, deque(maxlen=CRASHES)), now, CRASHES_WITHIN_S):
            return f"its process has crashed {CRASHES} times within {CRASHES_WITHIN_S / 60:.0f} min and answered nobody"
        return None

    async def _size_up(self, key: Key) -> None:
        """Somebody had a model loaded: find out what it takes."""
        router = self._routers.get(key[0])
        if router is not None:
            await self._appraisals.appraise(router, key[1])
            self.carry_out(self.admission.sized(*key, self._appraisals.expected(key), anyio.current_time()))

    def check(self, now: float) -> None:
        """Bring the table up to date with what routers say, whatever was missed; called every second."""
        for router in self._routers.values():
            if not router.is_serving or router.name in self._ended:
                continue
            for model in router.table.running():
                key = router.name, model.name
                slot = self.admission.slot(*key)
                if slot is None and not self._moves.is_moving(key):
                    self.carry_out(self.admission.loading(*key, self._appraisals.expected(key), now))
                    if model.loaded_at is not None and model.port is not None:
                        self._loaded(key, now)
                elif slot is not None:
                    if slot.failures >= FAILURES:
                        router.tell(Suspected(model.name))
                    used = model.in_flight or 0
                    self.carry_out(self.admission.observed(*key, used, now, used_at=model.used_at))
        for slot in self.admission.slots():
            owner = self._routers.get(slot.key[0])
            is_told_of = self._moves.is_moving(slot.key)
            if owner is not None and owner.is_serving and not is_told_of and not has_child(owner, slot.key[1]):
                self._moves.see_off(slot.key)
        self.carry_out(self.admission.tick(now))

    def _start_soon(self, work: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        self._work.post((work, args))


def _is_too_often(times: deque[float], now: float, within_s: float) -> bool:
    """Take note that it has happened once more: whether that fills `times` within so many seconds."""
    times.append(now)
    return len(times) == times.maxlen and now - times[0] <= within_s
