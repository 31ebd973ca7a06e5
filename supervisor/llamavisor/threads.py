"""Work in threads, of which a machine that is short of processes gives none for a while."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

RETRY_S = 0.1
SURELY_S = 5.0
"""How long the end of something is waited for."""

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")


async def run_in_thread(
    work: Callable[[*_Ts], _R],
    *args: *_Ts,
    abandon_on_cancel: bool = False,
    limiter: anyio.CapacityLimiter | None = None,
) -> _R:
    """Do `work` in a thread. If none can be started, one that is at work is waited for, or a better time.

    Threads count as processes do against RLIMIT_NPROC and a cgroup's pids.max, and the want of one ends no daemon.

    Args:
        work: what blocks.
        args: its arguments.
        abandon_on_cancel: whether a caller who is cancelled leaves it to itself.
        limiter: how many threads there may be; None for the limit that all share who name none.
    """
    has_begun = False

    def begin(*args: *_Ts) -> _R:
        nonlocal has_begun
        has_begun = True
        return work(*args)

    while True:
        try:
            return await anyio.to_thread.run_sync(begin, *args, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
        except RuntimeError:  # "can't start new thread": Python has no error of its own for that
            if has_begun:
                raise
        await anyio.sleep(RETRY_S)


async def surely(work: Callable[[], None]) -> None:
    """Do what ends something, such as to close a file, in a thread of its own, whoever is cancelled.

    It is left to itself after a while: a disk that hangs keeps nobody, and once it answers it is done all the same.
    """
    with anyio.move_on_after(SURELY_S, shield=True):
        await run_in_thread(work, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


class Threads:
    """A few threads for one thing that may hang, such as a folder on a server: these are all that it ever takes.

    Args:
        most: so many of them. One that was left to itself counts until it ends.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._places: set[object] = set()  # filled by the event loop alone, and left by whoever ends: each one step

    def __repr__(self) -> str:
        return f"<Threads {self.at_work} of {self._most}>"

    @property
    def at_work(self) -> int:
        """How many there are now, also of those that were left to themselves."""
        return len(self._places)

    async def run(self, work: Callable[[*_Ts], _R], *args: *_Ts, abandon_on_cancel: bool = False) -> _R:
        """Do `work` in one of them, as `run_in_thread` does; who waits for a free one can always be cancelled."""
        place, claim = object(), threading.Lock()

        def begin() -> _R:
            if not claim.acquire(blocking=False):
                raise RuntimeError("whoever wanted it has gone before it began")
            try:
                return work(*args)
            finally:
                self._places.discard(place)

        while self.at_work >= self._most:
            await anyio.sleep(RETRY_S)
        self._places.add(place)
        try:
            unlimited = anyio.CapacityLimiter(math.inf)
            return await run_in_thread(begin, abandon_on_cancel=abandon_on_cancel, limiter=unlimited)
        finally:
            if claim.acquire(blocking=False):
                self._places.discard(place)
