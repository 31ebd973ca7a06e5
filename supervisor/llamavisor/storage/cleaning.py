"""What may be cleaned away of a models folder without losing a model, and how: what is staged, and old revisions."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llamavisor.catalog import Entry, EntryState
from llamavisor.hub import HubError
from llamavisor.hub.staging import Staging
from llamavisor.storage.account import Leftover, drafts, old_revisions
from llamavisor.storage.anchor import Anchor, Thing
from llamavisor.storage.cache import Place, close_up, place_of, repository_of

OLD_S = 86400.0
"""What has changed since is left alone: a download may be taken up again, a revision has just been replaced."""

_F_SETSIG = 10  # asm-generic/fcntl.h; the fcntl module has no name for it


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was cleaned away, or would be.

    Attributes:
        folder: the models folder.
        gone: what it is about.
        problems: what could not be removed, and why, one line for each.
    """

    folder: str
    gone: tuple[Leftover, ...]
    problems: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """What that frees."""
        return sum(each.size_bytes for each in self.gone)


def clean(root: str, entries: Iterable[Entry], *, keep_revisions: bool, is_dry: bool, now: float) -> Cleaned:
    """Remove what is staged, old and written by nobody, and old revisions. Blocking.

    A pull that was left goes as well, and what came of it: the same pull begins anew.

    Args:
        root: the absolute path of the models folder.
        entries: the models that are known there.
        keep_revisions: whether revisions in caches of the hub stay that no model needs any more.
        is_dry: whether nothing is removed.
        now: Unix seconds.

    Raises:
        OSError: the folder itself cannot be opened.
    """
    gone: list[Leftover] = []
    problems: list[str] = []
    with Anchor(root) as anchor:
        things = list(anchor.walk())
        known = [entry for entry in entries if entry.state is not EntryState.GONE]
        units = [*drafts(things), *(() if keep_revisions else old_revisions(anchor, known, things))]
        for unit in units:
            if now - unit.changed_at < OLD_S or any(is_held(anchor, thing) for thing in unit.things):
                continue
            try:
                if not is_dry:
                    _remove(anchor, unit.things)
            except OSError as exc:
                problems.append(f"{unit.rel}: {exc.strerror or exc}")
                continue
            gone.append(unit.told())
    try:
        gone += map(Leftover.of, Staging(Path(root)).clean(now - OLD_S, is_dry=is_dry))
    except (HubError, OSError) as exc:
        problems.append(str(exc))
    return Cleaned(root, tuple(gone), tuple(problems))


def is_held(anchor: Anchor, thing: Thing) -> bool:
    """Whether somebody has locked a file, or has it open to write to it.

    The kernel gives nobody a lease on a file that is open for writing. Where it gives none at all (a network mount,
    another's file) the age alone must do.
    """
    if not stat.S_ISREG(thing.status.st_mode):
        return False
    try:
        fd = anchor.open(thing.rel)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)  # who opens it meanwhile has SIGIO sent to us, which would kill
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        return exc.errno == errno.EAGAIN
    finally:
        os.close(fd)
    return False


def _remove(anchor: Anchor, own: Iterable[Thing]) -> None:
    folders: set[str] = set()
    places: list[Place] = []
    for thing in own:
        anchor.unlink(thing.rel, thing.identity)
        place = place_of(thing.rel)
        places += [place] if place is not None else []
        folder = thing.rel.rpartition("/")[0] if repository_of(thing.rel) is None else ""
        while folder:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    for folder in sorted(folders, key=lambda each: -each.count("/")):
        anchor.remove_if_empty(folder)
    close_up(anchor, places)
