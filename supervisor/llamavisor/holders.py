"""Which router to ask for a model, and why there may be none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamavisor.catalog import EntryState
from llamavisor.errors import ModelNotFoundError
from llamavisor.folder import Folder
from llamavisor.router import Router
from llamavisor.states import HAS_CHILD, RouterState

_NOTHING_WRONG = frozenset({EntryState.READY, EntryState.GONE})
"""The states of models whose files are in order, or are there no more."""


class Holders:
    """Who has which model.

    Args:
        routers: by their names, as they are at any time.
        folders: where their models are, likewise.
    """

    def __init__(self, routers: Mapping[str, Router], folders: Sequence[Folder]) -> None:
        self._routers = routers
        self._folders = folders

    def __repr__(self) -> str:
        return f"<Holders {', '.join(self._routers)}>"

    def of(self, model: str) -> Router:
        """The router to ask for `model`.

        There are three cases: the one on which the model is loaded or loading; the one that lists it and holds the
        fewest models; while no list is known yet, the first that may come up.

        Raises:
            ModelNotFoundError: no router lists it.
        """
        routers = list(self._routers.values())
        listing = [each for each in routers if each.table.get(each.shelf.name_of(model)) is not None]
        for each in listing:
            known = each.table.get(each.shelf.name_of(model))
            if known is not None and known.state in HAS_CHILD:
                return each
        if listing:
            return min(listing, key=_reluctance)
        for each in routers:
            if not each.is_serving and each.state not in {RouterState.STOPPED, RouterState.FAILED}:
                return each
        if len(routers) == 1 and not routers[0].is_serving:
            return routers[0]  # it knows best why
        raise self._not_there(model)

    def why_missing(self, model: str) -> str:
        """Why nobody serves a model of that name although there are files of it; "" if there are none."""
        for folder in self._folders:
            entry = folder.catalog.entries.get(model)
            if entry is not None and entry.state not in _NOTHING_WRONG:
                return f"is {entry.state.value}: {entry.reason}"
        for router in self._routers.values():
            withheld = router.shelf.offer.withheld.get(model)
            if withheld is not None:
                return f"is withheld from router {router.name}: {withheld.reason}"
        return ""

    def _not_there(self, model: str) -> ModelNotFoundError:
        """Nobody serves `model`: there is no such thing, or its files cannot be used."""
        why = self.why_missing(model)
        if not why:
            return ModelNotFoundError(f"no model {model!r}", hint="see `llamavisor models`")
        entries = (folder.catalog.entries.get(model) for folder in self._folders)
        path = next((entry.path for entry in entries if entry is not None and entry.state not in _NOTHING_WRONG), "")
        return ModelNotFoundError(f"model {model} {why}", hint=path)


def _reluctance(router: Router) -> tuple[bool, bool, int]:
    """How little a router is suited for one more model: the least goes first."""
    return router.state is not RouterState.READY, not router.is_serving, len(router.table.residents())
