"""Which models were in memory, so that they are there again after the daemon itself has died."""

from __future__ import annotations

from llamavisor import events as ev
from llamavisor.states import RouterState

MAX_ROUTERS = 1000
MAX_MODELS = 1000
"""More than any machine holds at once."""


class Residents:
    """A section of the ledger: the models of each router, the most recently loaded first.

    A model is resident from its load until it leaves, whatever for; but its router's end, and the daemon's, leave it
    wanted. What crashes is wanted again once it was loaded again: it may be what ends everything. One that is not there
    when the daemon starts, because its folder comes late, stays wanted for the next start.

    Args:
        bus: tells what is loaded and what leaves.
    """

    name = "residents"

    def __init__(self, bus: ev.Bus) -> None:
        self._models: dict[str, list[str]] = {}
        self._changes = 0
        self._is_over = False  # the daemon ends: what leaves from now on is wanted again
        bus.listen(self._hear, hears_frequent=False)

    def __repr__(self) -> str:
        return f"<Residents {self._models}>"

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._changes

    def of(self, router: str) -> tuple[str, ...]:
        """The models that are to be in the memory of that router, the most recently loaded first."""
        return tuple(self._models.get(router, ()))

    def _hear(self, published: ev.Published) -> None:
        if self._is_over:
            return
        match published.event:
            case ev.DaemonStopping():
                self._is_over = True
            case ev.ModelLoaded(router=router, model=model, is_again=True) if model in self.of(router):
                pass
            case ev.ModelLoaded(router=router, model=model):
                others = [name for name in self.of(router) if name != model]
                self._put(router, [model, *others])
            case ev.ModelUnloaded(reason=ev.UnloadReason.ROUTER):
                pass
            case ev.ModelUnloaded(router=router, model=model) | ev.ModelLoadFailed(router=router, model=model):
                self._put(router, [name for name in self.of(router) if name != model])
            case ev.ModelRemoved(router=router, model=model):
                self._put(router, [name for name in self.of(router) if name != model])
            case ev.RouterStateChanged(router=router, new=RouterState.STOPPED):
                self._put(router, [])

    def _put(self, router: str, models: list[str]) -> None:
        if models == self._models.get(router, []):
            return
        self._changes += 1
        if models:
            self._models[router] = models[:MAX_MODELS]
        else:
            del self._models[router]

    def load(self, raw: object, now: float) -> str:  # noqa: ARG002 (ledger.Section)
        """Takes over what the file says, router by router."""
        if not isinstance(raw, dict):
            return "it is no table, and was left out"
        good = {
            name: [model for model in models[:MAX_MODELS] if isinstance(model, str)]
            for name, models in list(raw.items())[:MAX_ROUTERS]
            if isinstance(name, str) and isinstance(models, list)
        }
        self._models = {name: models for name, models in good.items() if models}
        lost = len(raw) - len(good)
        return f"{lost} damaged entries were left out" if lost else ""

    def dump(self) -> object:
        """What the file is to say."""
        return {name: list(models) for name, models in list(self._models.items())}
