"""Reading the header of a GGUF file from the disk, or from wherever else bytes can be read."""

from __future__ import annotations

import os
import stat

from llamavisor.gguf.container import printable, walk
from llamavisor.gguf.cursor import GgufError, ReadAt
from llamavisor.gguf.header import TEXTS, WANTED, Header, describe

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Header:
    """Reads the header of a file. Blocking, 25 to 50 ms for a large vocabulary: call it in a worker process.

    Symlinks are followed. Nothing but a regular file is opened. The file is never mapped: one that is cut off meanwhile
    gives an error instead of a signal.

    Raises:
        GgufError: it is no regular file, or not a GGUF file that llama.cpp reads.
        OSError: it cannot be found, opened or read.
    """
    name = printable(os.fsdecode(path))
    _refuse_irregular(os.stat(path), name)  # noqa: PTH116 (a Path takes no bytes)
    fd = os.open(path, _FLAGS)
    try:
        return read_fd(fd, name)
    finally:
        os.close(fd)


def read_fd(fd: int, name: str = "") -> Header:
    """Reads the header of an open file, as `read` does; its position is neither used nor moved.

    Args:
        fd: descriptor of a file that is open for reading.
        name: the file, as it is to be called in errors.
    """
    status = os.fstat(fd)
    _refuse_irregular(status, name)
    try:
        return parse(lambda offset, length: os.pread(fd, length, offset), status.st_size)
    except GgufError as exc:
        raise exc.named(name) from None


def parse(read_at: ReadAt, size: int) -> Header:
    """Reads the header of a file that `read_at` gives the bytes of, such as one on the other side of HTTP.

    It asks for rising offsets, for at most 256 KiB at a time and at most 256 MiB beyond all, and never for a byte twice
    except the few that lie across the end of a piece.

    Args:
        read_at: given an offset and a length, returns that many bytes, or fewer, none only at the end of the file.
        size: of the whole file in bytes.

    Raises:
        GgufError: it is not a GGUF file that llama.cpp reads.
    """
    return describe(walk(read_at, size, WANTED, TEXTS), size)


def _refuse_irregular(status: os.stat_result, name: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((kind for matches, kind in _KINDS if matches(status.st_mode)), "no regular file")
    raise GgufError(f"this is {kind}, not a file", 0, name=name)
