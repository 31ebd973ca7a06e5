"""Where all work on the disk of one models folder is done: what hangs there keeps nobody else, and ends.

A folder on a dead server hangs whoever touches it, in the kernel, where nothing can be cancelled. So it has a few
threads of its own, which are left to themselves after some time, and a removal that hangs is followed by no other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple

import anyio

from llamavisor.errors import NotRemovableError
from llamavisor.threads import Threads

READERS_MAX = 3
"""So many look at one folder at a time; each may hang."""
READ_S = 45.0
"""How long a look at every file of a folder may take; one on a server takes long.

Less than clients of the gateway wait for a removal: they would be told that the model is in use.
"""
TURN_S = 30.0
"""How long one removal waits for another."""
DEED_S = 30.0
"""How long a removal is waited for. Large files take seconds each on some disks.

The end of the daemon waits a second or two at most: of a removal that is at work then, files may be left.
"""

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")


class Desk:
    """The work on one folder.

    Args:
        path: its absolute path.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._readers = Threads(READERS_MAX)
        self._remover = Threads(1)
        self._turn = anyio.Lock()  # two at once would plan over each other's files

    def __repr__(self) -> str:
        return f"<Desk {self.path} {self._readers!r}>"

    async def ask(self, work: Callable[[*_Ts], _R], *args: *_Ts) -> _R:
        """Do what blocks and changes nothing.

        Raises:
            NotRemovableError: the folder cannot be opened, or does not answer in time.
        """
        return await self._do(self._readers, READ_S, "it can be looked at again when its disk answers", work, *args)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Nobody else removes anything from the folder meanwhile.

        Raises:
            NotRemovableError: another removal does not end.
        """
        text = f"folder {self.path}: another removal there does not end"
        with anyio.move_on_after(TURN_S) as scope:
            await self._turn.acquire()
        if scope.cancelled_caught:
            raise NotRemovableError(text, hint="try again later")
        try:
            if self._remover.at_work:  # it was left to itself
                raise NotRemovableError(text, hint="its disk does not answer")
            yield
        finally:
            self._turn.release()

    async def remove(self, work: Callable[[*_Ts], _R], *args: *_Ts) -> _R:
        """Do what blocks and removes something, within one's `turn`.

        Raises:
            NotRemovableError: likewise. What has begun goes on when the disk answers.
        """
        return await self._do(
            self._remover, DEED_S, "it goes on when the disk answers; see `llamavisor du`", work, *args
        )

    async def _do(self, threads: Threads, within_s: float, hint: str, work: Callable[[*_Ts], _R], *args: *_Ts) -> _R:
        try:
            with anyio.move_on_after(within_s):
                return await threads.run(work, *args, abandon_on_cancel=True)
        except OSError as exc:
            raise NotRemovableError(f"folder {self.path} cannot be looked at: {exc.strerror or exc}") from exc
        raise NotRemovableError(f"folder {self.path} does not answer within {within_s:.0f} s", hint=hint)
