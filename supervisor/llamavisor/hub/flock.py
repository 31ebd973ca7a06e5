"""Locks by which all daemons that share a models folder take turns; the kernel frees those of whoever dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio

from llamavisor.hub.failure import on_disk
from llamavisor.lock import is_at
from llamavisor.threads import Threads, surely

LOOK_EVERY_S = 0.25
"""How often a lock that another holds is tried: flock(2) tells nobody when it is free."""


class FileLock:
    """PATH.lock, which is there as long as somebody holds it.

    Args:
        path: what it is about.
    """

    def __init__(self, path: Path) -> None:
        self._lock = path.with_name(f"{path.name}.lock")
        self._fd: int | None = None

    def __repr__(self) -> str:
        return f"<FileLock {self._lock.name}{' held' if self._fd is not None else ''}>"

    def take(self) -> bool:
        """Takes it if it is free; whether it was. Blocking.

        Raises:
            HubError: the file cannot be made.
        """
        with on_disk(self._lock):
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(self._lock, os.fstat(fd)):  # else whoever held it has removed it
                    self._fd = fd
            except BlockingIOError:
                pass
            finally:
                if self._fd is None:
                    os.close(fd)
        return self._fd is not None

    def give_back(self) -> None:
        """Gives it back. Blocking."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with suppress(OSError):
                self._lock.unlink()
            os.close(fd)

    @contextmanager
    def tried(self) -> Iterator[bool]:
        """Holds it if it is free; tells whether. Blocking.

        Raises:
            HubError: the file cannot be made.
        """
        is_ours = self.take()
        try:
            yield is_ours
        finally:
            self.give_back()

    @asynccontextmanager
    async def held(
        self, threads: Threads, *, waits: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[None]:
        """Waits for it, and holds it.

        Args:
            threads: in which the disk is touched.
            waits: called again and again while another holds it.

        Raises:
            HubError: the file cannot be made.
        """
        try:
            while not await threads.run(self.take):
                if waits is not None:
                    await waits()
                await anyio.sleep(LOOK_EVERY_S)
            yield
        finally:
            if self._fd is not None:
                await surely(self.give_back)
