"""What is read of one file: its header, and the two places where a copy that is under way shows."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from llamavisor import gguf
from llamavisor.catalog.walk import Found
from llamavisor.gguf import GgufError, Header

TAIL_BYTES = 4096
"""So much of the last tensor is looked at: a copy that took its room beforehand has zeros there until it ends."""

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a file's content says.

    Attributes:
        header: None when it cannot be read.
        problem: why it cannot.
        is_partial: whether a file that is being written may look like this.
        is_refused: whether the system refused it, which the content has nothing to do with.
        is_passing: whether the next look may find otherwise though nothing changed: an ill disk, or a race lost.
        hole: the first byte that was never written, before the end of the last tensor.
        has_zero_tail: whether the last tensor ends in zeros.
    """

    header: Header | None = None
    problem: str = ""
    is_partial: bool = False
    is_refused: bool = False
    is_passing: bool = False
    hole: int | None = None
    has_zero_tail: bool = False


def read(found: Found) -> Reading:
    """Reads a file that was found. Blocking; it raises nothing for what the file is or holds.

    The path is opened only if it still leads to a regular file, and without waiting for a writer.
    """
    try:
        fd = os.open(found.path, _FLAGS)
    except OSError as exc:
        return _refused(exc)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino, status.st_size) != (found.device, found.inode, found.size):
            return Reading(problem="it changed while it was looked at", is_partial=True, is_passing=True)
        # First: on ext4 a block that was reserved and never written is no hole any more once it was read.
        hole = _find_hole(fd)
        header = gguf.read_fd(fd)
        if status.st_size < header.min_file_bytes:
            return Reading(header=header)
        if hole is not None and hole >= header.min_file_bytes:
            hole = None
        return Reading(header=header, hole=hole, has_zero_tail=_has_zero_tail(fd, header))
    except GgufError as exc:
        reason = f"{exc.reason} (byte {exc.offset})"
        return Reading(problem=f"{reason}. {exc.hint}" if exc.hint else reason, is_partial=exc.is_partial)
    except OSError as exc:
        return _refused(exc)
    finally:
        os.close(fd)


def can_open(found: Found) -> bool:
    """Whether a file that was read before can be opened still, after something about it changed but its content."""
    try:
        os.close(os.open(found.path, _FLAGS))
    except OSError:
        return False
    return True


def _refused(exc: OSError) -> Reading:
    problem, is_lasting = f"it cannot be read: {exc.strerror or exc}", exc.errno in _LASTING
    if is_lasting:
        problem += "; let the user of this daemon read it"
    return Reading(problem=problem, is_refused=True, is_passing=not is_lasting)


def _find_hole(fd: int) -> int | None:
    """The first hole, the end of the file if there is none. Blocks that were reserved and never written are holes."""
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:  # the file is empty, or its file system cannot tell
        return None


def _has_zero_tail(fd: int, header: Header) -> bool:
    count = min(TAIL_BYTES, header.last_tensor_bytes)
    return count > 0 and not any(os.pread(fd, count, header.min_file_bytes - count))
