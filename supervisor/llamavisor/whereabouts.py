"""Where a model may be: which routers serve it, what it would take there, and what they may take."""

from __future__ import annotations

from collections.abc import Mapping

import anyio

from llamavisor.admission import Admission
from llamavisor.appraisals import Appraisals
from llamavisor.capacity import Capacity
from llamavisor.errors import ModelNotFoundError, RouterNotReadyError
from llamavisor.placement import Candidate
from llamavisor.router import Router
from llamavisor.slots import Stage
from llamavisor.states import RouterState

_DOWN = frozenset({RouterState.STOPPED, RouterState.FAILED})


class Whereabouts:
    """What is known of that over all routers. It changes nothing.

    Args:
        routers: those of the fleet, by name; the fleet changes them.
        admission: the table of what is resident.
        capacity: what routers may take.
        appraisals: what models take.
    """

    def __init__(
        self, routers: Mapping[str, Router], admission: Admission, capacity: Capacity, appraisals: Appraisals
    ) -> None:
        self._routers = routers
        self._admission = admission
        self._capacity = capacity
        self._appraisals = appraisals

    def __repr__(self) -> str:
        return f"<Whereabouts on {', '.join(self._routers)}>"

    def name_of(self, word: str, *, only: str | None = None) -> str:
        """The name of the model that a client calls `word`: a name on any router goes before an alias on another."""
        routers = [router for router in self._routers.values() if only is None or only == router.name]
        for router in routers:
            if word in router.shelf.wanted:
                return word
        return next((name for router in routers if (name := router.shelf.name_of(word)) != word), word)

    def is_loaded(self, name: str, router: str | None = None) -> bool:
        """Whether the model can be used at once, on that router or, of None, on any."""
        return any(
            slot.resident.name == name and slot.stage is Stage.LOADED and router in (None, slot.resident.router)
            for slot in self._admission.slots()
        )

    def candidates(self, name: str, *, only: str | None = None, first: str | None = None) -> list[Candidate]:
        """Where a model may be, as things are.

        Args:
            name: the model.
            only: the only router that comes into question, None for any.
            first: the router that is preferred among equals.

        Raises:
            ModelNotFoundError: no router may have it.
            RouterNotReadyError: those that may are stopped or failed.
        """
        found: list[Candidate] = []
        down: Router | None = None
        for router in self._routers.values():
            shelf, table = router.shelf, router.table
            is_listed = table.get(name) is not None
            is_known = (name in shelf.wanted or is_listed) and name not in shelf.offer.withheld
            if not is_known or only not in (None, router.name):
                continue
            if router.state in _DOWN:
                down = router
                continue
            key = router.name, name
            is_here = self._admission.slot(*key) is not None
            may_load = is_listed and self._appraisals.is_known(router, name)
            found.append(
                Candidate(
                    router.name,
                    self._capacity.budget(router),
                    self._appraisals.expected(key),
                    is_ready=router.is_serving and (is_here or may_load),
                    is_open=not router.is_closed,
                )
            )
        if not found and down is not None:
            reason = f": {down.reason}" if down.reason else ""
            hint = down.hint or f"llamavisor start {down.name}"
            raise RouterNotReadyError(f"router {down.name} is {down.state.value}{reason}", hint=hint)
        if not found:
            raise ModelNotFoundError(f"no model {name!r}", hint="see `llamavisor models`")
        return sorted(found, key=lambda each: each.router != first)

    async def appraise(self, name: str, *, only: str | None = None) -> None:
        """See that what a model would take is known wherever it may be loaded; at once where it need not be."""
        if self.is_loaded(name, only):
            return
        due = [
            router
            for router in self._routers.values()
            if router.is_serving and only in (None, router.name) and not self._appraisals.is_known(router, name)
        ]
        if due:
            async with anyio.create_task_group() as group:
                for router in due:
                    group.start_soon(self._appraisals.appraise, router, name)
