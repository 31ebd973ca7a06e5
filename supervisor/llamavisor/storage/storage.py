"""The models folders of a fleet as a person tidies them: what takes the disk, and what leaves it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import anyio

from llamavisor.catalog import Entry, EntryState
from llamavisor.catalog.guard import AGAIN_S
from llamavisor.errors import (
    FilesChangedError,
    ModelAmbiguousError,
    ModelInUseError,
    ModelNotFoundError,
    NotRemovableError,
)
from llamavisor.events import Bus, ModelDeleted, StorageCleaned
from llamavisor.folder import Folder
from llamavisor.memory import Memory
from llamavisor.models import Model
from llamavisor.router import Router
from llamavisor.rules import ModelRule, split_scale
from llamavisor.states import HAS_CHILD
from llamavisor.storage.account import Account, account
from llamavisor.storage.cleaning import Cleaned, clean
from llamavisor.storage.desk import Desk
from llamavisor.storage.removal import Removal, carry_out, plan

LOOK_S = 10.0
"""How long a look at a folder may take, before something is removed and after that."""
UNLOADS_MAX = 3
"""A model that clients ask for again and again is unloaded so often before its removal is given up."""

_R = TypeVar("_R")


class Storage:
    """What a fleet's folders hold.

    Args:
        routers: those of the fleet, by name; the fleet changes them.
        folders: the folders of the fleet; likewise.
        memory: knows what is used and pinned.
        rules: the option tables of single models, as they are now.
        unload: has a router unload a model when its last answer has ended.
        bus: where the events go.
        wall: Unix seconds.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        folders: Sequence[Folder],
        *,
        memory: Memory,
        rules: Callable[[], Sequence[ModelRule]],
        unload: Callable[[Router, str], Awaitable[bool]],
        bus: Bus,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._routers = routers
        self._folders = folders
        self._memory = memory
        self._rules = rules
        self._unload = unload
        self._bus = bus
        self._wall = wall
        self._desks: dict[str, Desk] = {}  # also of folders that have gone: what hangs there still does

    def __repr__(self) -> str:
        return f"<Storage {', '.join(str(folder.path) for folder in self._folders)}>"

    def models(self) -> tuple[Entry, ...]:
        """All models of all folders, by name, with their files and headers; also those that cannot be used."""
        return tuple(
            sorted((entry for folder in self._folders for entry in folder.catalog), key=lambda each: each.name)
        )

    def model(self, name: str, *, folder: str | None = None) -> Entry:
        """What is known of a model's files.

        Args:
            name: its name, or an alias.
            folder: the models folder, if several have a model of that name.

        Raises:
            ModelNotFoundError: there is no such model, or it is gone.
            ModelAmbiguousError: several folders have it.
        """
        return self._find(name, folder)[1]

    async def remove(
        self,
        model: str,
        *,
        folder: str | None = None,
        unload: bool = False,
        force: bool = False,
        is_dry: bool = False,
        token: str | None = None,
    ) -> Removal:
        """Remove all files of a model: parts, its projector and draft if no other model uses them, and its folder.

        If it is unloaded first, that waits for the answers that are on their way; who is cancelled before that is done
        has removed nothing.

        Args:
            model: its name, or an alias.
            folder: the models folder, if several have a model of that name.
            unload: whether it goes although it is in memory or in use: it is unloaded first.
            force: whether it goes whatever is in the way: also while it is pinned, settling, or named by a table.
            is_dry: whether nothing is done, and only told.
            token: of the plan that somebody has agreed to; only that is carried out.

        Returns:
            What was removed, or would be.

        Raises:
            ModelNotFoundError: there is no such model, or it is gone already.
            ModelAmbiguousError: several folders have it.
            ModelInUseError: something is in the way that nobody has said to overcome.
            FilesChangedError: its files are not those any more that were looked at or agreed upon.
            NotRemovableError: they lie outside of the folder, the rights or the disk do not allow it, or it hangs.
            LlamavisorError: it could not be unloaded.
        """
        place, entry = self._find(model, folder)
        await self._look(place)
        place, entry = self._find(model, folder)
        removal = await self._plan(place, entry, unload=unload)
        if is_dry:
            return removal
        _check(removal, token, force=force)
        for _ in range(UNLOADS_MAX if unload or force else 0):
            if not (holders := list(self._holders(place, entry.name))):
                break
            for router, _ in holders:
                await self._unload(router, entry.name)
        async with self._desk(place).turn():
            place, entry = self._find(entry.name, str(place.path))
            removal = await self._plan(place, entry, unload=unload)
            _check(removal, token, force=force)
            if list(self._holders(place, entry.name)):
                raise ModelInUseError(f"model {entry.name} was loaded again meanwhile", hint="try again")
            with anyio.CancelScope(shield=True):  # what has begun is told, whoever has gone meanwhile
                await self._desk(place).remove(carry_out, removal)
                paths, freed = tuple(removal.paths()), removal.size_bytes
                self._bus.publish(ModelDeleted(folder=removal.folder, model=entry.name, files=paths, freed_bytes=freed))
                await place.look(within_s=LOOK_S)
                if place.catalog.stale:  # a folder that has lost its last model is doubted once
                    await anyio.sleep(AGAIN_S)
                    await place.look(within_s=LOOK_S)
        return removal

    async def accounts(self) -> list[Account]:
        """Who takes the disk, folder by folder. Of one that cannot be looked at it is told why."""
        return await self._of_each(self._account)

    async def clean(self, *, keep_revisions: bool = False, is_dry: bool = False) -> list[Cleaned]:
        """Remove what nobody wants or writes: what is staged, pulls left more than a day ago, and old revisions.

        Args:
            keep_revisions: whether revisions in caches of the hub stay that no model needs.
            is_dry: whether nothing is done, and only told.
        """
        return await self._of_each(partial(self._clean, keep_revisions=keep_revisions, is_dry=is_dry))

    async def _of_each(self, work: Callable[[Folder], Awaitable[_R]]) -> list[_R]:
        """Something for every folder, for all at once: one that hangs keeps the others from nothing."""
        folders = list(self._folders)
        done: dict[int, _R] = {}

        async def put(at: int) -> None:
            done[at] = await work(folders[at])

        async with anyio.create_task_group() as group:
            for at in range(len(folders)):
                group.start_soon(put, at)
        return [done[at] for at in range(len(folders))]

    async def _account(self, folder: Folder) -> Account:
        root = str(folder.path)
        try:
            await self._look(folder, may_be_stale=True)
            return await self._desk(folder).ask(account, root, list(folder.catalog))
        except NotRemovableError as error:
            return Account.unknown(root, str(error))

    async def _clean(self, folder: Folder, *, keep_revisions: bool, is_dry: bool) -> Cleaned:
        root, desk = str(folder.path), self._desk(folder)
        try:
            await self._look(folder)
            work = partial(
                clean, root, list(folder.catalog), keep_revisions=keep_revisions, is_dry=is_dry, now=self._wall()
            )
            if is_dry:
                return await desk.ask(work)
            async with desk.turn():
                with anyio.CancelScope(shield=True):  # what has begun is told, whoever has gone meanwhile
                    cleaned = await desk.remove(work)
                    if cleaned.gone:
                        gone = tuple(each.rel for each in cleaned.gone)
                        self._bus.publish(StorageCleaned(folder=root, gone=gone, freed_bytes=cleaned.size_bytes))
                return cleaned
        except NotRemovableError as error:
            return Cleaned(root, (), (str(error),))

    def _find(self, model: str, folder: str | None) -> tuple[Folder, Entry]:
        found: dict[str, tuple[Folder, Entry]] = {}
        for each in self._folders:
            entry = self._entry(each, model)
            if entry is not None and folder in (None, str(each.path)):
                found.setdefault(str(each.path), (each, entry))
        if not found:
            where = f" in {folder}" if folder is not None else ""
            raise ModelNotFoundError(f"no model {model!r}{where}", hint="see `llamavisor models`")
        if len(found) > 1:
            text = f"model {model} is in several folders: {', '.join(found)}"
            raise ModelAmbiguousError(text, hint="name one with --folder")
        place, entry = next(iter(found.values()))
        if entry.state is EntryState.GONE:
            raise ModelNotFoundError(f"model {entry.name}: its files are gone already")
        return place, entry

    def _entry(self, folder: Folder, word: str) -> Entry | None:
        """A name goes before what a table calls a model besides, and that before an alias by its place."""
        entries = folder.catalog.entries
        names = [word, self._memory.scheduler.where.name_of(word)]
        for name in names:
            if name in entries:
                return entries[name]
        return next((entry for entry in folder.catalog if word in entry.aliases), None)

    def _desk(self, folder: Folder) -> Desk:
        path = str(folder.path)
        return self._desks.setdefault(path, Desk(path))

    async def _look(self, folder: Folder, *, may_be_stale: bool = False) -> None:
        """See the folder as it is now: what is removed must be what is there. One that hangs costs no thread of ours.

        Raises:
            NotRemovableError: that cannot be seen.
        """
        has_looked = await folder.look(within_s=LOOK_S)
        if not has_looked or (folder.catalog.stale and not may_be_stale):
            why = folder.catalog.stale or f"does not answer within {LOOK_S:.0f} s"
            raise NotRemovableError(f"folder {folder.path}: {why}", hint="nothing was removed")

    async def _plan(self, folder: Folder, entry: Entry, *, unload: bool) -> Removal:
        others = [each for each in folder.catalog if each.name != entry.name]
        needed = dict(_named_files(self._rules(), entry.name))
        removal = await self._desk(folder).ask(plan, str(folder.path), entry, others, needed.keys())
        obstacles = [] if unload else list(self._uses(folder, entry.name))
        obstacles += self._objections(entry)
        obstacles += [f"the file {path} that {needed[path]} names" for path in removal.paths() if path in needed]
        return replace(removal, obstacles=tuple(obstacles))

    def _uses(self, folder: Folder, name: str) -> Iterator[str]:
        """Why a model is not removed unless it is unloaded first."""
        for router, model in self._holders(folder, name):
            is_used = self._memory.scheduler.is_used(router.name, name)
            yield f"{'in use' if is_used else model.state.value} on router {router.name}"

    def _objections(self, entry: Entry) -> Iterator[str]:
        """Why a model is not removed unless that is forced."""
        if self._memory.scheduler.is_pinned(entry.name):
            yield "pinned"
        if entry.state is EntryState.SETTLING:
            yield f"settling: {entry.reason}"

    def _holders(self, folder: Folder, name: str) -> Iterator[tuple[Router, Model]]:
        for router in self._routers.values():
            model = router.table.get(name)
            if router.settings.models_dir == folder.path and model is not None and model.state in HAS_CHILD:
                yield router, model


def _check(removal: Removal, token: str | None, *, force: bool) -> None:
    """Whether a plan may be carried out."""
    if token not in {None, removal.token}:
        raise FilesChangedError(f"model {removal.model}: its files are others than a moment ago", hint="look again")
    if removal.obstacles and not force:
        text = f"model {removal.model} is not removed: it is {', '.join(removal.obstacles)}"
        raise ModelInUseError(text, hint="--force removes it all the same, unloaded first when its answers have ended")


def _named_files(rules: Iterable[ModelRule], model: str) -> Iterator[tuple[str, str]]:
    """Paths of files that tables name for other models, each with what names it."""
    for rule in rules:
        if rule.name == model:
            continue
        settings = rule.settings
        adapters = (split_scale(each)[0] for each in settings.lora or ())
        for path in (settings.mmproj, settings.draft, *adapters):
            if isinstance(path, str):
                yield path, rule.source
