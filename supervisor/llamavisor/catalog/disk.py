"""How much room there is on the disk that a models folder lies on."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of a folder.

    Attributes:
        total_bytes: what it holds when it is full.
        free_bytes: what who is not root may still write.
    """

    total_bytes: int
    free_bytes: int


def disk_of(folder: str) -> Disk | None:
    """The disk of a folder; None if it does not tell, as some file systems of the network do not.

    Blocking: a folder on a server that does not answer takes for ever.
    """
    try:
        told = os.statvfs(folder)
    except OSError:
        return None
    return Disk(told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize) if told.f_blocks else None
