"""Models in memory that are not what their files and tables say any more: brought up to date when they are idle."""

from __future__ import annotations

from collections.abc import Callable

from llamavisor.events import Event, ModelStale
from llamavisor.models import ModelTable
from llamavisor.operations import Kind, Operation, Operations, Ticket
from llamavisor.settings import OnOverwrite
from llamavisor.shelf import Shelf
from llamavisor.states import HAS_CHILD, Change

RETRY_S = 5.0
"""After so long a model that could not be unloaded for a change is tried again."""
REMEDIES = {
    "reload": "it is loaded again as soon as it is idle",
    "unload": "it is unloaded as soon as it is idle",
    "keep": "it serves until it is unloaded",
    "wait": "it serves until its file is fit to be loaded again",
}
"""What is done about a change, as a person reads it."""


def remedy(change: Change, on_overwrite: OnOverwrite, *, is_fit: bool) -> str:
    """What is done about a change, a key of `REMEDIES`.

    Args:
        change: what has happened to the model.
        on_overwrite: what is done when its file was overwritten in place.
        is_fit: whether it can be loaded as it is now.
    """
    wanted = on_overwrite if change is Change.OVERWRITTEN else "unload" if change is Change.MOVED else "reload"
    if change is Change.GONE:
        return "keep"
    return "wait" if wanted == "reload" and not is_fit else wanted


class Refresh:
    """Brings the models of one router up to date. Used by the router's owner alone.

    Args:
        router: name of the router, for the events.
        table: what is known of its models.
        shelf: what they should be.
        operations: what is asked of the router.
        publish: where events go.
        retire: has a stale model unloaded once it is idle.
        want: has a model loaded.
        is_full: whether one more model would push another out.

    Attributes:
        on_overwrite: what is done about a model whose file was overwritten in place.
    """

    def __init__(
        self,
        router: str,
        table: ModelTable,
        shelf: Shelf,
        operations: Operations,
        *,
        publish: Callable[[Event], None],
        retire: Callable[[str], None],
        want: Callable[[Ticket], None],
        is_full: Callable[[], bool],
    ) -> None:
        self.on_overwrite: OnOverwrite = "reload"
        self._router = router
        self._table = table
        self._shelf = shelf
        self._operations = operations
        self._publish = publish
        self._retire = retire
        self._want = want
        self._is_full = is_full
        self._under_way: set[str] = set()  # unloaded because they were stale, to be loaded again when told anew
        self._put_off: dict[str, float] = {}  # until when a model is let be, because it could not be unloaded
        self._told: dict[str, Change] = {}

    def __repr__(self) -> str:
        return f"<Refresh of {self._router}: {sorted(self._under_way)}>"

    def _remedy(self, name: str, change: Change) -> str:
        return remedy(change, self.on_overwrite, is_fit=name in self._shelf.wanted)

    def tell(self) -> None:
        """Say which models have become stale since the last time."""
        stale = dict(self._shelf.stale(self._table))
        for name, change in stale.items():
            if self._told.get(name) is not change:
                then = REMEDIES[self._remedy(name, change)]
                self._publish(ModelStale(router=self._router, model=name, change=change, then=then))
        self._told = stale
        self._put_off = {name: until for name, until in self._put_off.items() if name in stale}

    def forget(self) -> None:
        """The process has ended: the next one is told everything."""
        self._under_way.clear()

    def put_off(self, name: str, *, now: float) -> None:
        """A model was not unloaded after all: somebody was being answered, or it could not have come back."""
        self._put_off[name] = now + RETRY_S

    def advance(self, *, now: float, is_closed: bool) -> None:
        """Unload what is stale and idle; load again what was unloaded for that, once the router was told of it.

        Args:
            now: monotonic seconds.
            is_closed: whether no model may be loaded: then none is unloaded for this either.
        """
        for name, change in () if is_closed else self._shelf.stale(self._table):
            then = self._remedy(name, change)
            unload = Operation(Kind.UNLOAD, name, if_idle=True)
            if then not in {"reload", "unload"} or self._operations.is_pending(unload):
                continue
            if self._table.is_idle(name, now=now) and now >= self._put_off.get(name, 0.0):
                if then == "reload":
                    self._under_way.add(name)
                self.put_off(name, now=now)  # also when it turns out to be used after all
                self._retire(name)
        for name in sorted(self._under_way):
            model = self._table.get(name)
            if name not in self._shelf.wanted or model is None:
                self._under_way.discard(name)
            elif model.state not in HAS_CHILD and not self._shelf.is_pending(name):
                self._under_way.discard(name)
                if not self._is_full():  # what a client has asked for meanwhile is not pushed out
                    self._want(Ticket(Operation(Kind.LOAD, name)))
