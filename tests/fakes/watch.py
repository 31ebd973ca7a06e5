"""A folder watch without a folder: it finds what the test puts into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel

from llamavisor.catalog.entry import Entry
from llamavisor.watch import Afresh, Found, Looked, News
from llamavisor.watch.watcher import INTERVAL_S


class FakeWatch:
    """Stands in for `llamavisor.watch.FolderWatch`, on virtual time too; `test_watch_contract` holds it to that.

    Attributes:
        entries: what is in the folder. The next look finds the difference.
        looks: how many there have been.
        is_hanging: whether looks do not end, as on a dead network mount.
    """

    def __init__(
        self,
        root: Path = Path("/models"),
        *,
        link_dirs: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.root = root
        self.link_dirs = tuple(link_dirs)
        self.pid: int | None = None
        self.entries: dict[str, Entry] = {}
        self.looks = 0
        self.is_hanging = False
        self._told: dict[str, Entry] | None = None
        self._tell: Callable[[News], None] | None = None
        self._interval_s = interval_s

    def __repr__(self) -> str:
        return f"<FakeWatch {self.root} {len(self.entries)} entries>"

    async def run(self, tell: Callable[[News], None]) -> None:
        """Look at once and at every interval, until cancelled."""
        self._tell, self._told = tell, None
        try:
            while True:
                if not self.is_hanging:
                    self.look()
                await anyio.sleep(self._interval_s)
        finally:
            self._tell = None

    async def rescan(self, *, within_s: float = 10.0) -> bool:
        """Look at once; while it hangs or does not run, wait in vain."""
        if self._tell is None or self.is_hanging:
            with anyio.move_on_after(within_s):
                while self._tell is None or self.is_hanging:
                    await anyio.sleep(min(within_s, 0.01))
        await anyio.lowlevel.checkpoint()
        if self._tell is None or self.is_hanging:
            return False
        self.look()
        return True

    def put(self, *entries: Entry) -> None:
        """Put entries in, or others in the place of those of the same names, and look."""
        self.entries |= {entry.name: entry for entry in entries}
        self.look()

    def remove(self, *names: str) -> None:
        """Take entries away, and look."""
        for name in names:
            del self.entries[name]
        self.look()

    def look(self, *, problem: str = "") -> None:
        """Tell what has changed, or nothing but a problem; without a `run` nobody hears it."""
        if self._tell is None:
            return
        self.looks += 1
        if self._told is None:
            self.push(Afresh())
            self._told = {}
        if not problem:
            changed = tuple(entry for name, entry in self.entries.items() if self._told.get(name) != entry)
            removed = tuple(name for name in self._told if name not in self.entries)
            if changed:
                self.push(Found(changed=changed))
            if removed:
                self.push(Found(removed=removed))
            self._told = dict(self.entries)
        self.push(Looked(file_count=len(self.entries), problem=problem))

    def push(self, *news: News) -> None:
        """Tell these news, whatever they are."""
        assert self._tell is not None, "nobody listens: run() first"
        for each in news:
            self._tell(each)
