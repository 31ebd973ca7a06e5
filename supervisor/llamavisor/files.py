"""Files that are put in their place in one step. All of it blocks, and raises OSError."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_RENAMEAT2 = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` at `path` in one step that survives a power failure; the file is its owner's alone.

    Raises:
        OSError: it could not be done; the old file is as it was, and no draft is left.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def put_new(source: Path, target: Path) -> None:
    """Gives a file another name that nobody else has.

    Who is killed amid it leaves no file of that name that is not whole, but for an empty one on a file system that
    knows neither links nor renameat2(2).

    Raises:
        FileExistsError: somebody has it; that one stays.
        OSError: it could not be done; nothing has that name.
    """
    try:
        os.link(source, target)  # a rename would replace what is there
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        _rename_new(source, target)
    else:
        source.unlink()


def _rename_new(source: Path, target: Path) -> None:
    """By renameat2(2), for which Python has no name: FAT and the shares of Windows know no links, but that."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = errno.ENOSYS
    if hasattr(libc, "renameat2"):
        names = os.fsencode(source), os.fsencode(target)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
    if number not in _NO_RENAMEAT2:
        raise OSError(number, os.strerror(number), str(target))
    _rename_touched(source, target)


def _rename_touched(source: Path, target: Path) -> None:
    target.touch(exist_ok=False)  # that the name is ours a rename would not find out
    try:
        source.replace(target)
    except OSError:
        with suppress(OSError):
            target.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Has a power failure find the names in a folder as they are now, on file systems that know such a thing."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)
