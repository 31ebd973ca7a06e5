"""What is told of a models folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from llamavisor.catalog.disk import Disk
from llamavisor.catalog.entry import Entry


@dataclass(frozen=True, slots=True)
class Afresh:
    """The look that follows tells all that there is, not a difference: what it does not name by `Looked` is not there.

    Told before the first look of every worker. A new worker does not remember what the last one knew, so it cannot
    doubt an empty folder either; whoever keeps the catalog can.
    """


@dataclass(frozen=True, slots=True)
class Found:
    """A part of what a look found; `Looked` follows.

    Attributes:
        changed: entries that are new or not what they were.
        removed: names of those that have gone.
    """

    changed: tuple[Entry, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Looked:
    """A look has ended, and all that it found has been told. Ends `Silent`.

    Attributes:
        duration_s: how long it took.
        file_count: model files that were seen.
        headers_read: how many headers had to be read because they were not known.
        problem: why the folder could not be looked at, or is not believed yet; nothing was told then. Empty if all is
            well.
        disk: what the folder lies on, None when that is not known.
    """

    duration_s: float = 0.0
    file_count: int = 0
    headers_read: int = 0
    problem: str = ""
    disk: Disk | None = None


@dataclass(frozen=True, slots=True)
class Silent:
    """A look is overdue: the folder does not answer, and what is known of it may be out of date. Told once.

    Attributes:
        since_s: for how many seconds it has been overdue.
    """

    since_s: float


@dataclass(frozen=True, slots=True)
class ModeChanged:
    """How changes are noticed is not what it was, or a watcher has failed once more.

    Attributes:
        mode: "inotify", or "polling" where the kernel does not tell.
        reason: why it is polling, or what failed last; empty when nothing ever did.
        errors: how often a watcher has failed since the daemon began. A name that is not UTF-8 makes one fail too.
    """

    mode: str
    reason: str
    errors: int


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The process that looks at the folder ended or could not be started; what is known stays as it is.

    Attributes:
        reason: how it ended.
        retry_in_s: when the next one is started.
    """

    reason: str
    retry_in_s: float


News: TypeAlias = Afresh | Found | Looked | Silent | ModeChanged | WorkerDied
