"""What a router has been asked to do with its models: one operation at a time, and who waits for what.

Loads, unloads and reloads of one router must never overlap (a reload between the two halves of a load leaves a model
without a name behind). An operation covers only the HTTP call; whether its goal is reached is read from the table.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import anyio

from llamavisor.errors import LlamavisorError, ModelLoadError
from llamavisor.events import UnloadReason
from llamavisor.models import ModelTable
from llamavisor.states import HAS_CHILD, RESIDENT, ModelState


class Kind(Enum):
    """What can be asked of a router."""

    LOAD = "load"
    UNLOAD = "unload"
    RELOAD = "reload"  # have it read its folder and its preset again


@dataclass(frozen=True, slots=True)
class Operation:
    """One call to the router.

    Attributes:
        kind: what is asked for.
        model: for which model; empty for a reload.
        if_idle: of an unload: whether it is to be done only if the model turns out to answer nobody.
        reason: of an unload: what it is for.
    """

    kind: Kind
    model: str = ""
    if_idle: bool = False
    reason: UnloadReason = field(default=UnloadReason.REQUESTED, compare=False)


@dataclass(eq=False, slots=True)
class Ticket:
    """Somebody's wish, until it is fulfilled or cannot be.

    Attributes:
        changed: whether anything had to be done for it.
    """

    operation: Operation
    changed: bool = False
    error: LlamavisorError | None = None
    _done: anyio.Event = field(default_factory=anyio.Event, repr=False)

    @property
    def is_done(self) -> bool:
        """Whether it was fulfilled or refused."""
        return self._done.is_set()

    def finish(self, error: LlamavisorError | None = None) -> None:
        """Fulfil it, or refuse it with the reason; only the first time counts."""
        if not self.is_done:
            self.error = error
            self._done.set()

    async def wait(self) -> bool:
        """Wait until the wish is fulfilled; returns whether anything had to be done.

        Raises:
            LlamavisorError: it was refused.
        """
        await self._done.wait()
        if self.error is not None:
            raise self.error
        return self.changed


class Operations:
    """The queue of one router's operations and the tickets that wait for them. Written by the router's owner alone."""

    def __init__(self) -> None:
        self.current: Operation | None = None
        self._queue: deque[Operation] = deque()
        self._tickets: list[Ticket] = []

    def __repr__(self) -> str:
        return f"<Operations current={self.current} queued={len(self._queue)} tickets={len(self._tickets)}>"

    def ask(self, ticket: Ticket, table: ModelTable) -> None:
        """Take a wish in, and queue the operation that it needs, unless one is under way already."""
        operation = ticket.operation
        self._tickets.append(ticket)
        if operation.kind is Kind.UNLOAD:
            self._withdraw_loads(operation.model)
        if not _is_needed(operation, table):
            return
        ticket.changed = True
        if not self.is_pending(operation):
            self._queue.append(operation)

    def _withdraw_loads(self, model: str) -> None:
        """An unload is asked for: loads of the same model that have not begun are not begun."""
        load = Operation(Kind.LOAD, model)
        if load in self._queue:
            self._queue.remove(load)
            self.refuse(load, ModelLoadError(f"model {model}: unloaded before it was loaded"))

    def take(self, table: ModelTable) -> Operation | None:
        """Begin the next operation that can begin now; None while one is under way, or if there is none.

        A model that is still leaving cannot be loaded yet; what comes after it in the queue can.
        """
        if self.current is not None:
            return None
        for operation in self._queue:
            model = table.get(operation.model)
            if operation.kind is Kind.LOAD and model is not None and model.state is ModelState.UNLOADING:
                continue
            self._queue.remove(operation)
            self.current = operation
            return operation
        return None

    def settle(self, table: ModelTable) -> None:
        """Drop what has become needless (a client was faster), and finish each ticket whose goal is reached or lost."""
        self._queue = deque(operation for operation in self._queue if _is_needed(operation, table))
        for ticket in self._tickets:
            operation = ticket.operation
            if ticket.is_done or operation.kind is Kind.RELOAD:  # a reload ends with its call
                continue
            model = table.get(operation.model)
            state = _state(operation.model, table)
            if operation.kind is Kind.UNLOAD:
                if state not in HAS_CHILD:
                    ticket.finish()
                elif _is_needed(operation, table) and not self.is_pending(operation):
                    self._queue.append(operation)  # a client had it loaded again before the last call returned
            elif state in RESIDENT:
                ticket.finish()
            elif state not in HAS_CHILD and not self.is_pending(operation):
                reason = (model.error if model else None) or "unloaded before it was loaded"
                hint = "see `llamavisor logs`"
                ticket.finish(ModelLoadError(f"model {operation.model}: {reason}", hint=hint))
        self._tickets = [ticket for ticket in self._tickets if not ticket.is_done]

    def end(self, error: LlamavisorError | None) -> None:
        """The current operation's call has returned."""
        operation, self.current = self.current, None
        if operation is not None and (error is not None or operation.kind is Kind.RELOAD):
            self.refuse(operation, error)

    def refuse(self, operation: Operation, error: LlamavisorError | None) -> None:
        """Finish all tickets for `operation`."""
        for ticket in self._tickets:
            if ticket.operation == operation:
                ticket.finish(error)

    def queued_loads(self) -> set[str]:
        """The models whose load is yet to begin."""
        return {operation.model for operation in self._queue if operation.kind is Kind.LOAD}

    def drop_reloads(self) -> None:
        """The router has ended: the next start reads everything, so whoever waits for a reload has it."""
        reload = Operation(Kind.RELOAD)
        while reload in self._queue:
            self._queue.remove(reload)
        self.refuse(reload, None)

    def refuse_loads(self, error: LlamavisorError) -> None:
        """Loads that have not begun are not begun: tell who waits for them."""
        for name in self.queued_loads():
            load = Operation(Kind.LOAD, name)
            self._queue.remove(load)
            self.refuse(load, error)

    def refuse_all(self, error: LlamavisorError) -> None:
        """The router will not serve for now: forget the queue, and tell everybody who waits."""
        self._queue.clear()
        self.current = None
        for ticket in self._tickets:
            ticket.finish(error)
        self._tickets.clear()

    def is_pending(self, operation: Operation) -> bool:
        """Whether the operation is under way, or waits for its turn."""
        return operation == self.current or operation in self._queue


def _is_needed(operation: Operation, table: ModelTable) -> bool:
    """Whether a call to the router would change anything about the model."""
    state = _state(operation.model, table)
    match operation.kind:
        case Kind.LOAD:
            return state not in RESIDENT | {ModelState.LOADING}
        case Kind.UNLOAD:
            return state in HAS_CHILD and state is not ModelState.UNLOADING
        case Kind.RELOAD:
            return True


def _state(model: str, table: ModelTable) -> ModelState:
    known = table.get(model)
    return ModelState.UNLOADED if known is None else known.state
