"""Finds who serves a model that somebody names. A file that has only just come is looked for, and waited for."""

from __future__ import annotations

import json
from collections.abc import Iterable

import anyio

from llamavisor.catalog import Entry, EntryState
from llamavisor.errors import LlamavisorError, ModelNotFoundError
from llamavisor.fleet import Fleet
from llamavisor.folder import Folder
from llamavisor.router import Router
from llamavisor.rules import ModelRule, matching
from llamavisor.sections import specify
from llamavisor.states import HAS_CHILD, RouterState

LOOK_S = 1.0
"""How long a look at a folder may keep somebody waiting who asks for a model that is not known."""
_DOWN = frozenset({RouterState.STOPPED, RouterState.FAILED})


class Search:
    """The search for the router to ask for one model.

    Args:
        fleet: the routers and folders.
        rules: the tables of single models, in the order of the configuration.
        name: the model's name, or an alias.
        router: name of the only router that is asked, None for any.

    Raises:
        RouterNotFoundError: there is no such router.
    """

    def __init__(self, fleet: Fleet, rules: tuple[ModelRule, ...], name: str, *, router: str | None = None) -> None:
        self._fleet = fleet
        self._rules = rules
        self._name = name
        self._only = fleet[router].name if router is not None else None

    def __repr__(self) -> str:
        return f"<Search for {self._name!r} on {self._only or 'any router'}>"

    def now(self) -> Router:
        """The router to ask, as things are.

        Raises:
            ModelNotFoundError: there is none, and why.
        """
        router = self._find()
        if router is None:
            raise ModelNotFoundError(self.awaited(), hint="try again, or load it with `wait`")
        return router

    async def wait(self) -> Router:
        """The router to ask; a model that is not there yet is looked for, one that is being written is waited for.

        Raises:
            ModelNotFoundError: there is none, and waiting does not help.
            RouterNotFoundError: the only router that was asked has gone meanwhile.
        """
        if not self._is_found():
            await self._look()
        if not self._is_over():
            async with anyio.create_task_group() as group:
                for router in self._routers():
                    group.start_soon(self._watch, router, group.cancel_scope)
        return self.now()

    def awaited(self) -> str:
        """What keeps the model from being loaded now, as far as that passes by itself."""
        entry = next((entry for router in self._routers() if (entry := self._entry(router)) is not None), None)
        if entry is None or entry.state is EntryState.READY:
            return f"model {self._name}: its router is yet to be told of it"
        return f"model {self._name} is {entry.state.value}: {entry.reason}"

    def name_on(self, router: Router) -> str:
        """What that router calls the model: an alias leads to its name."""
        told = router.shelf.name_of(self._name)
        if router.table.get(told) is None and (entry := self._entry(router)) is not None:
            return entry.name
        return told

    def _listed(self, routers: Iterable[Router]) -> str | None:
        """The name by which one of these routers lists it, None if none does."""
        return next((name for router in routers if router.table.get(name := self.name_on(router)) is not None), None)

    def _routers(self) -> list[Router]:
        return list(self._fleet) if self._only is None else [self._fleet[self._only]]

    def _is_found(self) -> bool:
        """Whether somebody can be asked, and the model's file is not just being written once more."""
        try:
            router = self._find()
        except LlamavisorError:
            return False
        if router is None:
            return False
        model, entry = router.table.get(self.name_on(router)), self._entry(router)
        is_held = model is not None and model.state in HAS_CHILD
        return is_held or entry is None or entry.state is not EntryState.SETTLING

    def _is_over(self) -> bool:
        """Whether there is nothing to wait for: it is found, or cannot be."""
        try:
            self._find()
        except LlamavisorError:
            return True
        return self._is_found()

    async def _watch(self, router: Router, scope: anyio.CancelScope) -> None:
        # A router looks every second at the least, and what happens in its folder wakes it when it is to be told.
        await router.wait_until(self._is_over)
        scope.cancel()

    async def _look(self) -> None:
        places = {router.settings.models_dir for router in self._routers()}
        async with anyio.create_task_group() as group:
            for folder in self._fleet.folders:
                if folder.path in places:
                    group.start_soon(_look_at, folder)

    def _find(self) -> Router | None:
        """The router to ask, None as long as there may soon be one.

        There are four cases: a router lists it; it is on its way to one; a router that may come up has yet to say what
        it lists; nobody will serve it.

        Raises:
            ModelNotFoundError: in the last case, with the reason.
        """
        routers = self._routers()
        if (listed := self._listed(routers)) is not None:
            return self._fleet.holder_of(listed, router=self._only)
        obstacles = [self._obstacle(router) for router in routers if router.is_serving]
        if None in obstacles:
            return None
        may_come_up = any(not router.is_serving and router.state not in _DOWN for router in routers)
        known = [each for each in obstacles if each is not None and each[0]]
        if known and not may_come_up:
            raise max(known, key=lambda each: each[0])[1]
        if self._only is not None and obstacles:
            raise self._not_there(self._only)
        return self._fleet.holder_of(self._name, router=self._only)

    def _obstacle(self, router: Router) -> tuple[int, ModelNotFoundError] | None:
        """Why a router that serves does not list the model, None if it soon may; with how much that explains."""
        entry = self._entry(router)
        if entry is None:
            return 0, self._not_there(router.name)
        if specify(entry, self._rules, router=router.name) is None:
            return 1, self._barred(entry, router)
        wanted, withheld = router.shelf.wanted.get(entry.name), router.shelf.offer.withheld.get(entry.name)
        if wanted is not None and withheld is not None and withheld.spec == wanted:
            text = f"model {entry.name} is withheld from router {router.name}: {withheld.reason}"
            return 2, ModelNotFoundError(text)
        if wanted is not None or entry.state in {EntryState.READY, EntryState.SETTLING}:
            return None
        return 2, ModelNotFoundError(f"model {entry.name} is {entry.state.value}: {entry.reason}", hint=entry.path)

    def _barred(self, entry: Entry, router: Router) -> ModelNotFoundError:
        rule = next(rule for rule in reversed(matching(self._rules, entry.name)) if rule.settings.router is not None)
        allowed = rule.settings.router or ()
        whom = f"router {router.name}" if allowed or self._only else "every router"
        text = f"model {entry.name}: router = {json.dumps(allowed)} in {rule.source} keeps it from {whom}"
        return ModelNotFoundError(text)

    def _not_there(self, router: str) -> ModelNotFoundError:
        others = [each.name for each in self._fleet if self._listed([each]) is not None]
        hint = f"router {others[0]} has it" if others else "see `llamavisor models`"
        return ModelNotFoundError(f"no model {self._name!r} on router {router}", hint=hint)

    def _entry(self, router: Router) -> Entry | None:
        """What the catalog of a router's folder knows of the model."""
        folder = next((each for each in self._fleet.folders if each.path == router.settings.models_dir), None)
        if folder is None:
            return None
        entries = folder.catalog.entries
        written = [rule.name for rule in self._rules if rule.name and self._name in rule.settings.aliases]
        for name in (self._name, router.shelf.name_of(self._name), *written):
            if name in entries:
                return entries[name]
        return next((entry for entry in folder.catalog if self._name in entry.aliases), None)


async def _look_at(folder: Folder) -> None:
    await folder.look(within_s=LOOK_S)
