"""Leases on models: how whoever wants a model comes to it, keeps it, and gives it back.

A lease is the promise of admission that a model stays where it is. One on a model that is loaded is had at once, in one
step that does not wait; any other by a place in the queue.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio

from llamavisor.admission import Admission
from llamavisor.demands import Action, Lease, Rejection, Why
from llamavisor.endpoint import Endpoint
from llamavisor.errors import LlamavisorError, ModelLoadError, RouterNotReadyError
from llamavisor.eviction import Reason
from llamavisor.operations import Kind, Operation, Ticket
from llamavisor.placement import Candidate
from llamavisor.router import Router
from llamavisor.waiters import Answer, Waiters, refusal
from llamavisor.whereabouts import Whereabouts

PORT_S = 5.0
"""How long the process of a loaded model may take to be found; it is known long before, as a rule."""
APPRAISE_S = 30.0
"""How long it may take to find out what a model would take; then it waits in the queue until that is known."""
QUEUE_RETRY_S = 5.0
LOST_S = 1.0
"""How long the end of a process may take to be known here: some milliseconds, as a rule."""


class Leases:
    """Who holds which model. No method waits, but for those that are `async`.

    Args:
        routers: those of the fleet, by name; the fleet changes them.
        admission: the table and the queue.
        waiters: who waits for its answers.
        where: where models may be.
        carry_out: does what admission has decided.
        start_soon: begins a worker.
        forgive: forgets the failures of a model.
        decides: whether admission decides over loads at all.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        *,
        admission: Admission,
        waiters: Waiters,
        where: Whereabouts,
        carry_out: Callable[[Sequence[Action]], None],
        start_soon: Callable[..., None],
        forgive: Callable[[str], None],
        decides: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._routers = routers
        self._admission = admission
        self._waiters = waiters
        self._where = where
        self._carry_out = carry_out
        self._start_soon = start_soon
        self._forgive = forgive
        self._decides = decides
        self._now = clock
        self._wishes: dict[str, set[anyio.CancelScope]] = {}  # of people whose models are not there yet, by name
        self._appraising = 0  # demands that are not in the queue yet: what they would take is being found out

    def __repr__(self) -> str:
        return f"<Leases {self._waiters!r}>"

    @asynccontextmanager
    async def lease(self, model: str, *, router: str | None = None) -> AsyncIterator[Endpoint]:
        """The address of a model that stays until the block ends; raises as `acquire` does."""
        endpoint, has_answered = await self.acquire(model, router=router), False
        try:
            yield endpoint
            has_answered = True
        finally:
            self.release(endpoint, has_answered=has_answered)

    def acquire_loaded(self, model: str, *, router: str | None = None) -> Endpoint | None:
        """The address of a model that is loaded, and stays until it is released; None if it has to be waited for.

        Args:
            model: its name, or an alias.
            router: the only one on which it may be, None for any.
        """
        if not self._decides():
            return None
        now = self._now()
        lease = self._admission.grant_loaded(model, now, only=router)
        if lease is None and (name := self._where.name_of(model, only=router)) != model:
            lease = self._admission.grant_loaded(name, now, only=router)
        if lease is None:
            return None
        owner, endpoint = self._routers[lease.router], self._endpoint_of(lease)
        if endpoint is None or not owner.is_serving or lease.model in owner.shelf.offer.withheld:
            self._release(lease)
            return None
        return endpoint

    async def acquire(self, model: str, *, router: str | None = None, within_s: float = math.inf) -> Endpoint:
        """The address of a model that stays until it is released; it is loaded if need be. Waits.

        Args:
            model: its name, or an alias.
            router: the only one on which it may be, None for any.
            within_s: how long it is waited for at most.

        Raises:
            ModelNotFoundError: no router may have it.
            RouterNotReadyError: those that may are stopped or failed, or decide over their loads themselves.
            DemandRefusedError: it is not to be had now, or not within that time.
            ModelLoadError: its process was lost.
        """
        began = self._now()
        lease = await self._acquire(model, router, within_s)
        try:
            endpoint = await self._await_endpoint(lease)
        except BaseException:
            self._release(lease)
            raise
        waited_s = self._now() - began
        slot = self._admission.slot(lease.router, lease.model)
        has_loaded = slot is not None and slot.resident.loaded_at > began
        load_s = min(slot.resident.reload_cost_s, waited_s) if slot is not None and has_loaded else 0.0
        return replace(endpoint, waited_s=waited_s, load_s=load_s)

    def release(self, endpoint: Endpoint, *, has_answered: bool = False, has_failed: bool = False) -> None:
        """What was acquired is not used any more; a second time that means nothing.

        Args:
            endpoint: what was acquired.
            has_answered: whether the model has done what it was had for. One that crashes again and again and never
                does is left alone for a while.
            has_failed: whether it has answered that it could not, for a reason of its own. One that does nothing else
                is looked after.
        """
        self._release(endpoint.lease, has_answered=has_answered, has_failed=has_failed)

    def is_there(self, endpoint: Endpoint) -> bool:
        """Whether the process of an earlier lease still is the one that serves its model, as far as is known."""
        now = self._endpoint_of(endpoint.lease)
        return now is not None and now.port == endpoint.port

    def is_kept(self, endpoint: Endpoint) -> bool:
        """Whether the process that was promised has not ended, as far as is known."""
        return self._admission.is_kept(endpoint.lease)

    async def has_ended(self, endpoint: Endpoint) -> bool:
        """Whether the process that was promised has ended; to be asked when its connection broke. Waits.

        Who watches the process knows that within milliseconds after its end, and its router says "loaded" for longer.
        """
        router = self._routers.get(endpoint.router)
        if router is not None:
            with anyio.move_on_after(LOST_S):
                await router.wait_until(lambda: not self.is_kept(endpoint))
        return not self.is_kept(endpoint)

    async def have(self, model: str, *, router: str | None = None, goes_on: bool = True) -> bool:
        """Have a model loaded because a person wants it; returns whether it was not yet. Waits; raises as `acquire`.

        That it has failed before does not count: the person may have mended it.

        Args:
            model: its name, or an alias.
            router: the only one on which it may be, None for any.
            goes_on: whether it is loaded all the same if this is cancelled.
        """
        name = self._where.name_of(model, only=router)
        self._forgive(name)
        was_there = self._where.is_loaded(name, router)
        if not goes_on:
            self._release(await self._acquire(name, router))
            return not was_there
        ticket = Ticket(Operation(Kind.LOAD, name))
        self._start_soon(self._have, ticket, router)
        try:
            await ticket.wait()
        finally:
            ticket.finish()
        return not was_there

    async def _have(self, ticket: Ticket, router: str | None) -> None:
        name = ticket.operation.model
        wish = anyio.CancelScope()
        self._wishes.setdefault(name, set()).add(wish)
        try:
            with wish:
                self._release(await self._acquire(name, router))
                ticket.finish()
        except LlamavisorError as error:
            ticket.finish(error)
        finally:
            self._wishes[name].discard(wish)
            if not self._wishes[name]:
                del self._wishes[name]
        ticket.finish(ModelLoadError(f"model {name}: its load was cancelled by an unload"))

    def withdraw(self, model: str) -> None:
        """A person wants a model unloaded: who had wished for it to be loaded is told so, and does not wish it again.

        Args:
            model: its name, or an alias.
        """
        for wish in self._wishes.get(self._where.name_of(model), ()):
            wish.cancel()

    def ask(self, name: str, candidates: Sequence[Candidate], answer: Answer, *, only: str | None = None) -> int:
        """Put a demand into the queue; `answer` is called once, perhaps before this returns. Returns its number."""
        now = self._now()
        number, actions = self._admission.ask(name, candidates, now, only=only)
        self._waiters.add(number, name, answer)
        self._carry_out(actions)
        return number

    async def _acquire(self, model: str, router: str | None, within_s: float = math.inf) -> Lease:
        if not self._decides():
            raise RouterNotReadyError(
                'routers decide themselves what they load with serve = "router"', hint="ask the router for the model"
            )
        name = self._where.name_of(model, only=router)
        await self._appraise(name, router)
        outcome: list[Lease | Rejection] = []
        decided = anyio.Event()

        def answer(given: Lease | Rejection) -> None:
            outcome.append(given)
            decided.set()

        number = self.ask(name, self._where.candidates(name, only=router), answer, only=router)
        try:
            with anyio.move_on_after(within_s) as scope:
                await decided.wait()
            if scope.cancelled_caught and not outcome:
                self._carry_out(self._admission.time_out(number, self._now()))
        except BaseException:
            self._waiters.remove(number)
            for given in outcome:
                if isinstance(given, Lease):
                    self._release(given)
            if not outcome:
                self._carry_out(self._admission.give_up(number, self._now()))
            raise
        given = outcome[0]
        if isinstance(given, Rejection):
            if given.refusal is not None and given.refusal.reason is Reason.NO_ROUTER:
                self._where.candidates(name, only=router)  # raises with the reason: stopped, failed, or not there
            raise refusal(given)
        return given

    async def _appraise(self, name: str, router: str | None) -> None:
        """See that it is known what the model would take; who waits for that counts among those who wait."""
        if self._appraising + self._admission.waiting >= self._admission.limits.max_waiting:
            detail = f"{self._appraising + self._admission.waiting} others wait"
            raise refusal(Rejection(Why.QUEUE_FULL, name, detail, QUEUE_RETRY_S))
        self._appraising += 1
        try:
            with anyio.move_on_after(APPRAISE_S):
                await self._where.appraise(name, only=router)
        finally:
            self._appraising -= 1

    async def _await_endpoint(self, lease: Lease) -> Endpoint:
        router = self._routers.get(lease.router)
        if router is not None:

            def is_decided() -> bool:
                return self._endpoint_of(lease) is not None or not self._admission.is_kept(lease)

            with anyio.move_on_after(PORT_S):
                await router.wait_until(is_decided)
        endpoint = self._endpoint_of(lease)
        if endpoint is None or not self._admission.is_kept(lease):  # else it is the port of its next life
            raise ModelLoadError(f"model {lease.model}: its process was lost", hint="ask again")
        return endpoint

    def _endpoint_of(self, lease: Lease) -> Endpoint | None:
        router = self._routers.get(lease.router)
        model = router.table.get(lease.model) if router is not None else None
        if router is None or model is None or model.port is None:
            return None
        return Endpoint(lease, "127.0.0.1", model.port, router.settings.api_key)

    def _release(self, lease: Lease, *, has_answered: bool = False, has_failed: bool = False) -> None:
        now = self._now()
        self._carry_out(self._admission.release(lease, now, has_answered=has_answered, has_failed=has_failed))
