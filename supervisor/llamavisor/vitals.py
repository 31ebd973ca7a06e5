"""What the kernel tells of a process that works, whether or not it answers; see proc(5)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llamavisor import procfs

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a process has done since it was started.

    Attributes:
        cpu_s: seconds of CPU that all its threads have taken.
        major_faults: pages that it had to wait for: it reads its file in.
        moved_bytes: bytes that it has read and written, sockets left out; 0 where the kernel does not tell.
        is_stopped: whether it is stopped at this moment, by a signal or by a debugger.
    """

    cpu_s: float
    major_faults: int
    moved_bytes: int
    is_stopped: bool = False


def read_vitals(pid: int) -> Vitals | None:
    """What `pid` has done so far, None when there is no such process. Quick: the kernel keeps these numbers."""
    known = procfs.stat(pid)
    if known is None or known.is_zombie:
        return None
    return Vitals(
        cpu_s=known.cpu_ticks / _TICKS_PER_S,
        major_faults=known.major_faults,
        moved_bytes=procfs.moved_bytes(pid),
        is_stopped=known.state in "Tt",
    )
