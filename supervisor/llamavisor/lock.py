"""A lock on a file, by which one process at a time has a state folder or a socket."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from llamavisor.errors import LlamavisorError


class AlreadyRunningError(LlamavisorError):
    """Raised when another daemon holds the lock of the same socket or state folder."""

    code = "already_running"


class Lock:
    """A lock that the kernel releases however its holder ends. Close it to release it.

    Raises:
        AlreadyRunningError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            hint = "use that one, or give this one a --socket and a --state-dir of its own"
            raise AlreadyRunningError(f"already running, pid {holder} (lock {path})", hint=hint) from None
        with suppress(OSError):  # a full disk: the lock holds, whoever it may name
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode("ascii"), 0)

    def __repr__(self) -> str:
        return f"<Lock {self.path}>"

    @property
    def is_in_place(self) -> bool:
        """Whether whoever locks that path meets this lock."""
        return is_at(self.path, os.fstat(self._fd))

    def close(self) -> None:
        """Release it. The file stays: removing it would let two processes hold two files of one name."""
        os.close(self._fd)


def is_at(path: Path, file: os.stat_result) -> bool:
    """Whether `path` is that file itself, not a link to it."""
    try:
        return os.path.samestat(path.lstat(), file)
    except OSError:
        return False
