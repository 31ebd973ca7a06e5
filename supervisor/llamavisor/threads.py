"""Work in threads, of which a machine that is short of processes gives none for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

RETRY_S = 0.1

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")


async def run_in_thread(work: Callable[[*_Ts], _R], *args: *_Ts, abandon_on_cancel: bool = False) -> _R:
    """Do `work` in a thread. If none can be started, one that is at work is waited for, or a better time.

    Threads count as processes do against RLIMIT_NPROC and a cgroup's pids.max, and the want of one ends no daemon.

    Args:
        work: what blocks.
        args: its arguments.
        abandon_on_cancel: whether a caller who is cancelled leaves it to itself.
    """
    has_begun = False

    def begin(*args: *_Ts) -> _R:
        nonlocal has_begun
        has_begun = True
        return work(*args)

    while True:
        try:
            return await anyio.to_thread.run_sync(begin, *args, abandon_on_cancel=abandon_on_cancel)
        except RuntimeError:  # "can't start new thread": Python has no error of its own for that
            if has_begun:
                raise
        await anyio.sleep(RETRY_S)
