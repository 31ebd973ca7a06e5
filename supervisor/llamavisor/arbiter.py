"""Who has the last word on the models of a router, beside its owner."""

from __future__ import annotations

from typing import Protocol

from llamavisor.operations import Ticket


class Arbiter(Protocol):
    """What the owner of a router asks of whoever sees all routers; `scheduler.Scheduler` is the real one.

    Nothing here waits. A router without one has nothing pinned, and decides over its loads by itself.
    """

    @property
    def decides(self) -> bool:
        """Whether every load is the arbiter's decision; else routers load what they are asked to."""
        ...

    def demand(self, router: str, ticket: Ticket) -> None:
        """Have a model loaded on that router when there is room, and finish the ticket then; or refuse it."""
        ...

    def dismiss(self, router: str, model: str) -> None:
        """Have a model unloaded as soon as nobody uses it: what it should be has changed."""
        ...

    def lose(self, router: str, model: str) -> None:
        """Promise the model to nobody any more: its process hangs, and is being ended whomever it answers."""
        ...

    def clear(self, router: str, model: str) -> None:
        """The model was suspected, was tried, and works."""
        ...

    def make_way(self, router: str) -> None:
        """That router loads nothing until it is restarted: have its models leave if somebody has waited for long."""
        ...

    def is_pinned(self, model: str) -> bool:
        """Whether a person wants the model to stay in memory."""
        ...

    def is_used(self, router: str, model: str | None = None) -> bool:
        """Whether somebody was promised that a model stays, or, of None, any model of that router."""
        ...

    def was_killed_for_memory(self) -> bool:
        """Whether the kernel has, a moment ago, killed a process of ours for want of memory."""
        ...
