"""What may be cleaned away of a models folder without losing a model, and how: staging leftovers and old revisions."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from llamavisor.catalog import Entry, EntryState
from llamavisor.storage.account import Leftover, Old, old_revisions, staged
from llamavisor.storage.anchor import Anchor, Thing
from llamavisor.storage.cache import close_up, place_of

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


def clean(root: str, entries: Iterable[Entry], *, revisions: bool, is_dry: bool, now: float) -> Cleaned:
    """Remove staging leftovers that are old and that nobody writes, and if wanted old revisions. Blocking.

    Args:
        root: the absolute path of the models folder.
        entries: the models that are known there.
        revisions: whether revisions in caches of the hub go that no model needs any more.
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
        units: list[Leftover | Old] = list(staged(things))
        units += old_revisions(anchor, known, things) if revisions else ()
        for unit in units:
            own = _things(unit, things)
            if now - unit.changed_at < OLD_S or any(is_held(anchor, thing) for thing in own):
                continue
            try:
                if not is_dry:
                    _remove(anchor, unit, own)
            except OSError as exc:
                problems.append(f"{unit.rel}: {exc.strerror or exc}")
                continue
            gone.append(unit if isinstance(unit, Leftover) else unit.told())
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


def _things(unit: Leftover | Old, things: Iterable[Thing]) -> list[Thing]:
    if isinstance(unit, Old):
        return [*unit.things, *unit.blobs]
    return [thing for thing in things if thing.rel == unit.rel or thing.rel.startswith(f"{unit.rel}/")]


def _remove(anchor: Anchor, unit: Leftover | Old, own: Iterable[Thing]) -> None:
    if isinstance(unit, Leftover):
        anchor.clear(unit.rel)
        return
    for thing in own:
        anchor.unlink(thing.rel, thing.identity)
    close_up(anchor, [place for thing in unit.things if (place := place_of(thing.rel)) is not None])
