"""What is known of one models folder: the daemon's copy of what the worker sees, and what is to be told of it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace

from llamavisor.catalog.disk import Disk
from llamavisor.catalog.entry import Entry, EntryState
from llamavisor.events import (
    EntryChanged,
    EntryNoted,
    Event,
    FolderBack,
    FolderLooked,
    FolderStale,
    Warned,
    WatcherChanged,
    WatcherFailed,
)
from llamavisor.watch import Afresh, Found, Looked, ModeChanged, News, Silent, WorkerDied

TOLD_MAX = 20
"""How many entries of one look are told one by one: ten thousand broken files would bury everything else."""


class Catalog:
    """The entries of one folder. A pure table: `hear` takes news in and returns the events that follow.

    Args:
        folder: the folder, for the events.

    Attributes:
        entries: all models by name, those that have gone included until they are forgotten.
        stale: why the entries may not be what is there now; empty when they are.
        has_looked: whether the folder has ever been seen.
        disk: what it lies on, as of the last look; None when that is not known.
        mode: how changes are noticed: "inotify" or "polling"; empty before that is known.
        mode_reason: why it is polling.
        watcher_errors: how often the kernel's hints or the worker have failed.
    """

    def __init__(self, folder: str) -> None:
        self.entries: dict[str, Entry] = {}
        self.stale = ""
        self.has_looked = False
        self.disk: Disk | None = None
        self.mode = ""
        self.mode_reason = ""
        self.watcher_errors = 0
        self._folder = folder
        self._deaths = 0
        self._hint_errors = 0
        self._unmentioned: set[str] | None = None  # in the first look of a worker: what it has not named yet
        self._is_doubted = False  # such a look has named nothing at all, once
        self._told = 0
        self._untold = 0

    def __repr__(self) -> str:
        return f"<Catalog {self._folder} {len(self.entries)} entries {self.stale}>"

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def removed_by(self, news: News) -> tuple[str, ...]:
        """Which models are not there any more, says this news, which `hear` is yet to take in."""
        if isinstance(news, Found):
            return news.removed
        if isinstance(news, Looked) and not news.problem and self._unmentioned and not self._is_doubtful():
            return tuple(name for name in self._unmentioned if self.entries[name].state is not EntryState.GONE)
        return ()

    def hear(self, news: News) -> list[Event]:
        """Take over what the worker has seen."""
        match news:
            case Afresh():
                self._unmentioned = set(self.entries)
                return []
            case Found(changed, removed):
                return [*self._change(changed), *self._remove(removed)]
            case Looked():
                return self._end_look(news)
            case Silent(since_s):
                return self._be_stale(f"does not answer for {since_s:.0f} s")
            case ModeChanged(mode, reason, errors):
                return self._change_mode(mode, reason, errors)
            case WorkerDied(reason, retry_in_s):
                self._deaths += 1
                self.watcher_errors = self._deaths + self._hint_errors
                text = f"the process that looks at it ended ({reason}); another one follows in {retry_in_s:.0f} s"
                return [WatcherFailed(folder=self._folder, reason=text)]

    def forget_gone(self, held: AbstractSet[str]) -> None:
        """Drop what has gone, except for the models that are `held` in memory."""
        gone = [entry.name for entry in self if entry.state is EntryState.GONE and entry.name not in held]
        for name in gone:
            del self.entries[name]

    def _change(self, changed: tuple[Entry, ...]) -> list[Event]:
        happened: list[Event] = []
        for entry in changed:
            known = self.entries.get(entry.name)
            self.entries[entry.name] = entry
            if self._unmentioned is not None:
                self._unmentioned.discard(entry.name)
            # That a whole file is there is told when a router can serve it.
            is_news = entry.state is not EntryState.READY if known is None else entry.state is not known.state
            if is_news:
                happened += self._tell(
                    EntryChanged(folder=self._folder, model=entry.name, state=entry.state, reason=entry.reason)
                )
            for note in entry.notes:
                if known is None or note not in known.notes:
                    happened += self._tell(EntryNoted(folder=self._folder, model=entry.name, text=note))
        return happened

    def _remove(self, removed: tuple[str, ...]) -> list[Event]:
        happened: list[Event] = []
        for name in removed:
            entry = self.entries.get(name)
            if entry is not None and entry.state is not EntryState.GONE:
                self.entries[name] = replace(entry, state=EntryState.GONE, reason="its file is gone")
                happened += self._tell(EntryChanged(folder=self._folder, model=name, state=EntryState.GONE))
        return happened

    def _tell(self, event: Event) -> list[Event]:
        self._told += 1
        if self._told <= TOLD_MAX:
            return [event]
        self._untold += 1
        return []

    def _is_doubtful(self) -> bool:
        """Whether a fresh worker sees nothing of a folder that had something: an empty mount looks like that."""
        return bool(self.entries) and self._unmentioned == self.entries.keys() and not self._is_doubted

    def _end_look(self, look: Looked) -> list[Event]:
        happened: list[Event] = []
        if self._untold:
            text = f"{self._untold} more models changed; see `llamavisor models`"
            happened.append(Warned(subject=f"folder {self._folder}", text=text))
        self._told = self._untold = 0
        self.disk = look.disk
        problem = look.problem
        if not problem and self._is_doubtful():
            self._is_doubted = True
            problem = "nothing is there any more; looking again before that is believed"
        if problem:
            return [*happened, *self._be_stale(problem)]
        happened += self._remove(self.removed_by(look))
        self._unmentioned, self._is_doubted, self.has_looked = None, False, True
        if self.stale:
            self.stale = ""
            happened.append(FolderBack(folder=self._folder))
        return [
            *happened,
            FolderLooked(
                folder=self._folder,
                duration_s=look.duration_s,
                file_count=look.file_count,
                headers_read=look.headers_read,
            ),
        ]

    def _be_stale(self, reason: str) -> list[Event]:
        if self.stale == reason:
            return []
        was_stale, self.stale = bool(self.stale), reason
        return [] if was_stale else [FolderStale(folder=self._folder, reason=reason)]

    def _change_mode(self, mode: str, reason: str, errors: int) -> list[Event]:
        failed, self._hint_errors = errors > self._hint_errors, errors
        self.watcher_errors = self._deaths + self._hint_errors
        was, self.mode, self.mode_reason = self.mode, mode, reason
        if mode != was:
            return [WatcherChanged(folder=self._folder, mode=mode, reason=reason if mode != "inotify" else "")]
        return [WatcherFailed(folder=self._folder, reason=reason)] if failed and reason else []
