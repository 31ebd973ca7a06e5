"""Ended processes that were left to us and that nobody waits for.

Who adopts orphans has to reap them. What routers leave is found with them (`process`), but process 1 of a container
also gets what people start in it beside us, as `docker exec` does.
"""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from contextlib import suppress

import anyio

from llamavisor import procfs

LOOK_S = 300.0
"""Far longer than we leave anything unreaped that we have started: its exit status is not to be taken from us."""


async def reap_orphans() -> None:
    """Look for ended orphans now and then, for ever."""
    ended: AbstractSet[procfs.Identity] = frozenset()
    while True:
        await anyio.sleep(LOOK_S)
        ended = reap(ended)


def reap(before: AbstractSet[procfs.Identity]) -> AbstractSet[procfs.Identity]:
    """Reap those children that had ended at the last look already.

    Args:
        before: what the last look returned.

    Returns:
        Those that have ended since: if nobody wants them by the next look, nobody ever will.
    """
    ended = {child for pid in procfs.children(os.getpid()) if (child := _ended(pid)) is not None}
    for orphan in ended & before:
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, orphan.pid, os.WEXITED | os.WNOHANG)
    return ended - before


def _ended(pid: int) -> procfs.Identity | None:
    stat = procfs.stat(pid)
    return procfs.Identity(pid, stat.start_ticks, procfs.boot_id()) if stat is not None and stat.is_zombie else None
