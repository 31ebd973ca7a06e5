"""The pulls into all models folders of a fleet: each folder has its own, gone on with after a restart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from llamavisor.events import Bus
from llamavisor.hub import Hub, HubError, Pull, Pulls, Record, Why

OPEN_S = 3.0
"""How long somebody waits for a folder to be looked at; one on a server that is away does not answer."""


@dataclass(frozen=True, slots=True)
class _Folder:
    pulls: Pulls
    opened: anyio.Event = field(default_factory=anyio.Event)


class Downloads:
    """All pulls of a fleet. Used from one event loop, while it runs.

    Args:
        hub: where models come from.
        bus: where events go.
    """

    def __init__(self, hub: Hub, bus: Bus) -> None:
        self.hub = hub
        self._bus = bus
        self._folders: dict[Path, _Folder] = {}
        self._tasks: TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Downloads into {sorted(map(str, self._folders))}>"

    async def run(self, models_dirs: Collection[Path]) -> None:
        """Go on with what was under way in these folders, and take what comes, until cancelled.

        What is under way then is gone on with by the next one.
        """
        try:
            async with anyio.create_task_group() as self._tasks:
                for models_dir in models_dirs:
                    self._begin(models_dir)
                await anyio.sleep_forever()
        finally:
            self._tasks = None

    async def into(self, models_dir: Path) -> Pulls:
        """The pulls into a models folder; what was under way there is gone on with.

        Raises:
            HubError: the folder does not answer, or the daemon ends.
        """
        folder = self._begin(models_dir)
        with anyio.move_on_after(OPEN_S):
            await folder.opened.wait()
            return folder.pulls
        raise HubError(f"{models_dir} does not answer", why=Why.DISK)

    async def known(
        self, models_dirs: Collection[Path], key: str | None = None
    ) -> tuple[list[tuple[Path, Pull | Record]], list[HubError]]:
        """The pulls of all folders, those first that only the disk knows of; and why folders tell less than they have.

        Args:
            models_dirs: the folders that are meant; those that were meant before and have pulls are, too.
            key: only those of this id. Of one that is under way no disk is asked, however often somebody asks for it.
        """
        if key is not None and (here := self._here(key)):
            return list(here), []
        paused: list[tuple[Path, Record]] = []

        async def ask(pulls: Pulls) -> None:
            paused.extend((pulls.models_dir, record) for record in await pulls.paused() if key in {None, record.key})

        refusals = await self._each({*models_dirs, *self._folders}, ask)
        here = self._here(key)
        known = {(folder, pull.id) for folder, pull in here}
        fresh = [(folder, record) for folder, record in paused if (folder, record.key) not in known]
        return [*sorted(fresh, key=lambda each: each[0]), *here], refusals

    def _here(self, key: str | None) -> list[tuple[Path, Pull]]:
        """What is in memory."""
        found = ((folder.pulls.models_dir, pull) for folder in self._folders.values() for pull in folder.pulls.all)
        return [(folder, pull) for folder, pull in found if key == pull.id or (key is None and not pull.is_gone)]

    async def cancel(self, key: str, models_dirs: Collection[Path], *, drop: bool = False) -> bool:
        """End a pull wherever it goes; whether what came was removed.

        Args:
            key: its id.
            models_dirs: the folders that are meant; those that were meant before and have pulls are, too.
            drop: whether what came is removed.

        Raises:
            HubError: there is none of that name, or its disk does not let go of it.
        """
        holders = [path for path, each in self._folders.items() if any(key == pull.id for pull in each.pulls.under_way)]
        folders = holders or {*models_dirs, *self._folders}
        dropped: list[bool] = []

        async def cancel(pulls: Pulls) -> None:
            dropped.append(await pulls.cancel(key, drop=drop))

        refusals = await self._each(folders, cancel)
        if not dropped:
            raise min(refusals, key=lambda each: each.why is Why.NO_PULL)
        return any(dropped)

    async def _each(self, models_dirs: Collection[Path], ask: Callable[[Pulls], Awaitable[None]]) -> list[HubError]:
        """Asks all folders at once; what those say that cannot do it."""
        refusals: list[HubError] = []

        async def ask_one(models_dir: Path) -> None:
            try:
                await ask(await self.into(models_dir))
            except HubError as exc:
                refusals.append(exc)

        async with anyio.create_task_group() as asking:
            for models_dir in models_dirs:
                asking.start_soon(ask_one, models_dir)
        return refusals

    def _begin(self, models_dir: Path) -> _Folder:
        folder = self._folders.get(models_dir)
        if folder is None:
            if self._tasks is None:
                raise HubError("llamavisor takes no pulls now", why=Why.NOT_NOW, hint="Ask again in a moment.")
            folder = self._folders[models_dir] = _Folder(Pulls(self.hub, models_dir, self._bus))
            self._tasks.start_soon(self._keep_open, folder)
        return folder

    @staticmethod
    async def _keep_open(folder: _Folder) -> None:
        async with folder.pulls.opened():
            folder.opened.set()
            await anyio.sleep_forever()
