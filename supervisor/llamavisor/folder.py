"""One models folder under watch: its catalog, kept up to date, and who is told when it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

import anyio

from llamavisor.catalog import Entry
from llamavisor.catalog.catalog import Catalog
from llamavisor.events import Bus
from llamavisor.watch import Found, Looked, News


class Watch(Protocol):
    """Sees what is in a folder; `watch.FolderWatch` is the real one."""

    async def run(self, tell: Callable[[News], None]) -> None:
        """Watch until cancelled."""

    async def rescan(self, *, within_s: float = 10.0) -> bool:
        """Look now; whether what was found has been told in time."""
        ...


class Listener(Protocol):
    """Who is told of changes in a folder; it must not wait."""

    def update(self, changed: Iterable[Entry], removed: Iterable[str]) -> None:
        """Take a part of what a look has found."""

    def settle(self) -> None:
        """The look has ended."""


class Folder:
    """A models folder.

    Args:
        path: the folder.
        link_dirs: folders outside of it to which symlinks in it may lead.
        watch: sees what is in it.
        held: names of the models that are in memory, and not to be forgotten when their files have gone.
        bus: where its events go.

    Attributes:
        answered: set once anything is known of it, be it that it is missing.
        is_late: whether the last look that somebody waited for has not come to an end yet.
    """

    def __init__(
        self, path: Path, link_dirs: Sequence[Path], *, watch: Watch, held: Callable[[], AbstractSet[str]], bus: Bus
    ) -> None:
        self.path = path
        self.link_dirs = tuple(link_dirs)
        self.catalog = Catalog(str(path))
        self.answered = anyio.Event()
        self.is_late = False
        self.listeners: list[Listener] = []
        self.scope = anyio.CancelScope()
        self._watch = watch
        self._held = held
        self._bus = bus
        self._is_dirty = False

    def __repr__(self) -> str:
        return f"<Folder {self.path} {self.catalog!r}>"

    async def run(self) -> None:
        """Keep the catalog up to date until cancelled, or until `scope` is."""
        with self.scope:
            await self._watch.run(self._hear)

    async def look(self, *, within_s: float) -> bool:
        """Have the folder looked at now; whether that came to an end in time."""
        has_looked = await self._watch.rescan(within_s=within_s)
        self.is_late = not has_looked
        return has_looked

    def _hear(self, news: News) -> None:
        removed = self.catalog.removed_by(news)
        for event in self.catalog.hear(news):
            self._bus.publish(event)
        changed = news.changed if isinstance(news, Found) else ()
        if changed or removed:
            self._is_dirty = True
            for listener in self.listeners:
                listener.update(changed, removed)
        if isinstance(news, Looked):
            self.is_late = False
            if self._is_dirty or not self.answered.is_set():
                for listener in self.listeners:
                    listener.settle()
            self._is_dirty = False
            self.catalog.forget_gone(self._held())
        if self.catalog.has_looked or self.catalog.stale:
            self.answered.set()
