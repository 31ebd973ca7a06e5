"""The kernel's hints that something in a folder has changed.

watchfiles does the listening (inotify). What it does not do, and what is done here:

- It follows symlinks while it descends: a link to `/` takes every inotify watch of the user, and all threads of this
  process stand still meanwhile. So it is given folders one by one, found by a bounded walk that follows no link; and
  of those behind links the ones that the look has found, which goes only where it may.
- Told to ignore folders that may not be read, it ignores the limit of inotify watches too (watchfiles 1.3) and is
  silently deaf. So only folders that can be read are given to it, and nothing is ignored.
- It dies on a name that is not UTF-8. It is armed anew then, which is a matter of milliseconds, and nobody is told:
  the name itself is, as a model that cannot be served.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import IntEnum

from watchfiles import Change
from watchfiles._rust_notify import RustNotify

from llamavisor.catalog.walk import MAX_DEPTH

STEP_MS = 20
"""How often watchfiles looks for events of the kernel; a hint comes 20 to 40 ms after the change."""
MAX_FOLDERS = 4096
"""Folders that are watched. In more than that the rescan has to find what changes: each takes memory in the kernel."""

_UNDECODABLE = "Unable to decode path"
"""How watchfiles begins what it says of a name that is not UTF-8."""

FolderId = tuple[int, int]
"""st_dev and st_ino: a folder that was made anew is another one, and must be watched anew."""


class Hint(IntEnum):
    """How much has changed; the larger one stands for both."""

    NOTHING = 0
    CONTENT = 1
    """A file was written to, which goes on for as long as somebody copies."""
    NAMES = 2
    """Something has come or gone, or was not seen."""
    FOLDERS = 3
    """A folder that is listened to has gone, and what is in its place now may have its very number: listen anew."""


class Hints:
    """Listens to the folders that it is given, in a thread that does nothing else.

    Used from one thread. `wakeup` is a descriptor that becomes readable when `take` has something.
    """

    def __init__(self) -> None:
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._folders: dict[str, FolderId] = {}
        self._stop: threading.Event | None = None
        self._since = 0.0
        self._heard: deque[tuple[threading.Event, Hint, str]] = deque()

    def __repr__(self) -> str:
        state = f"listening to {len(self._folders)} folders" if self.is_listening else "deaf"
        return f"<Hints {state}>"

    @property
    def is_listening(self) -> bool:
        """Whether changes are noticed, as far as is known."""
        return self._stop is not None

    def covers(self, folders: Mapping[str, FolderId], *, within_s: float) -> bool:
        """Whether it listens to these very folders, and began to less than `within_s` seconds ago."""
        return self.is_listening and self._folders == folders and time.monotonic() - self._since < within_s

    def listen(self, folders: Mapping[str, FolderId]) -> None:
        """Listen to these folders and no others.

        Raises:
            FileNotFoundError: one of them has just gone.
            OSError: the kernel does not do it; a limit, mostly.
        """
        self.stop()
        try:
            notify = RustNotify(list(folders), False, False, 0, False, False)
        except OSError:
            raise
        except RuntimeError as exc:  # its own WatchfilesRustInternalError, for EMFILE among others
            raise OSError(str(exc)) from exc
        self._folders = dict(folders)
        self._stop = threading.Event()
        self._since = time.monotonic()
        # A daemon thread: it is told to stop and sees that within 20 ms, but nobody waits for it.
        run = threading.Thread(target=_Listener(self, notify, self._stop, frozenset(folders)).run, daemon=True)
        run.start()

    def stop(self) -> None:
        """Listen to nothing."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None
        self._folders = {}

    def take(self) -> tuple[Hint, str]:
        """What was heard since the last call, and why nothing more will be heard, empty if all is well."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.wakeup)
        strongest, failure = Hint.NOTHING, ""
        while self._heard:
            whose, hint, error = self._heard.popleft()
            strongest = max(strongest, hint)
            if error and whose is self._stop:
                failure = error
                self.stop()
        return strongest, failure

    def tell(self, whose: threading.Event, hint: Hint, error: str = "") -> None:
        """Called by the thread: `whose` tells the one that listens from one that has been replaced."""
        self._heard.append((whose, hint, error))
        os.eventfd_write(self.wakeup, 1)


class _Listener:
    """What the thread does."""

    def __init__(self, hints: Hints, notify: RustNotify, stop: threading.Event, folders: frozenset[str]) -> None:
        self._hints = hints
        self._notify = notify
        self._stop = stop
        self._folders = folders

    def run(self) -> None:
        """Pass on what is heard until told to stop, or deaf."""
        try:
            while not self._stop.is_set():
                changes = self._notify.watch(1, STEP_MS, 0, self._stop)
                if isinstance(changes, set):
                    self._hints.tell(self._stop, self._weigh(changes))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is deaf now and must say so)
            self._hints.tell(self._stop, Hint.NAMES, str(error) or type(error).__name__)
        finally:
            self._notify.close()

    def _weigh(self, changes: set[tuple[int, str]]) -> Hint:
        if any(change == Change.deleted and path in self._folders for change, path in changes):
            return Hint.FOLDERS
        return Hint.CONTENT if all(change == Change.modified for change, _ in changes) else Hint.NAMES


def find_folders(root: str) -> dict[str, FolderId]:
    """The folders to listen to: `root` and what is in it that can be read, the upper ones first; no links.

    Empty when there is no root. Names that are not UTF-8 are left out, as are those that begin with a dot.
    """
    found: dict[str, FolderId] = {}
    level = [root]
    for _ in range(MAX_DEPTH + 1):
        below: list[str] = []
        for folder in level:
            if len(found) >= MAX_FOLDERS:
                return found
            with suppress(OSError):  # gone, or not to be read
                inside = _folders_in(folder)
                found[folder] = identify(folder)
                below += inside
        level = below
    return found


def add_linked(folders: Mapping[str, FolderId], linked: Iterable[str]) -> dict[str, FolderId]:
    """`folders` with those of `linked` that are there and are not among them, as many as may be listened to."""
    found, known = dict(folders), set(folders.values())
    for folder in linked:
        if len(found) >= MAX_FOLDERS:
            break
        if folder in found or not _is_utf8(folder):
            continue
        with suppress(OSError):  # gone
            if (which := identify(folder)) not in known:
                known.add(which)
                found[folder] = which
    return found


def is_about_name(failure: str) -> bool:
    """Whether it was nothing but a name that is not UTF-8 that made it deaf."""
    return failure.startswith(_UNDECODABLE)


def _folders_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
    return [os.path.join(folder, name) for name in sorted(names) if _is_utf8(name)]  # noqa: PTH118 (surrogates, speed)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def identify(folder: str) -> FolderId:
    """Which folder this path leads to now.

    Raises:
        OSError: to none.
    """
    known = os.stat(folder)  # noqa: PTH116
    return known.st_dev, known.st_ino
