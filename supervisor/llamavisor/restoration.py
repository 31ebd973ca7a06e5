"""After a router's process has ended: what was resident is loaded again in the next one, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anyio

from llamavisor.events import Event, RouterRecovered
from llamavisor.operations import Kind, Operation, Ticket


class Restoration:
    """What is still to be loaded again on one router. Used by the router's owner alone.

    Args:
        router: name of the router, for the events.
        publish: where events go.
        want: has a model loaded.
        is_full: whether one more model would push another out.
        is_pinned: whether a model is to stay in memory: such are loaded first.
    """

    def __init__(
        self,
        router: str,
        *,
        publish: Callable[[Event], None],
        want: Callable[[Ticket], None],
        is_full: Callable[[], bool],
        is_pinned: Callable[[str], bool],
    ) -> None:
        self._router = router
        self._publish = publish
        self._want = want
        self._is_full = is_full
        self._is_pinned = is_pinned
        self._has_served = False  # a process of it has come up since it was last wanted up
        self._ended_at: float | None = None  # when the process ended whose models are being loaded again
        self._names: list[str] = []  # resident before, still to be loaded again
        self._tickets: dict[str, Ticket] = {}

    def __repr__(self) -> str:
        return f"<Restoration of {self._router}: {self._names}>"

    @property
    def is_under_way(self) -> bool:
        """Whether the process that runs, or the next one, is to have again what another one had."""
        return self._ended_at is not None

    def is_of(self, name: str) -> bool:
        """Whether the load of this model that is under way is one of ours."""
        return name in self._tickets

    def came_up(self) -> None:
        """The router serves."""
        self._has_served = True

    def recall(self, models: Iterable[str]) -> None:
        """An earlier daemon had these in memory, the next process is to have them too."""
        self._names = list(dict.fromkeys(models))
        self._ended_at, self._has_served = anyio.current_time(), True

    def went_down(self, residents: Iterable[str], *, keeps: bool) -> None:
        """The process has ended.

        Args:
            residents: the models that it had, in the order in which they are to be loaded again.
            keeps: whether they are wanted again.
        """
        wanted = dict.fromkeys([*residents, *self._names])
        self._names = sorted(wanted, key=lambda name: not self._is_pinned(name)) if keeps else []
        self._tickets.clear()
        self._ended_at = (self._ended_at or anyio.current_time()) if keeps and self._has_served else None

    def forget(self) -> None:
        """The router is stopped: the next start begins with nothing."""
        self._names.clear()
        self._ended_at = None
        self._has_served = False

    def leave_out(self, name: str) -> bool:
        """Somebody wants this model unloaded; whether it would have been loaded again."""
        if name not in self._names:
            return False
        self._names.remove(name)
        return True

    def advance(self) -> None:
        """Load the next one; say so when all is done. Called while the router serves and may load."""
        if self._ended_at is None or any(not ticket.is_done for ticket in self._tickets.values()):
            return
        kept_out: list[str] = []
        while self._names:
            if self._is_full():  # what somebody has asked for meanwhile, or a lower models_max, leaves no room
                kept_out, self._names = self._names, []
                break
            name = self._names.pop(0)
            ticket = Ticket(Operation(Kind.LOAD, name))
            self._tickets[name] = ticket
            self._want(ticket)
            if not ticket.is_done:
                return
        loaded = tuple(name for name, ticket in self._tickets.items() if ticket.error is None)
        missing = (*(name for name, ticket in self._tickets.items() if ticket.error is not None), *kept_out)
        seconds = anyio.current_time() - self._ended_at
        self._ended_at = None
        self._tickets.clear()
        self._publish(RouterRecovered(router=self._router, models=loaded, missing=missing, seconds=seconds))
