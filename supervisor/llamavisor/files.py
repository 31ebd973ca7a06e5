"""Files that are put in their place in one step. All of it blocks, and raises OSError."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


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

    Raises:
        FileExistsError: somebody has it; that one stays.
    """
    try:
        os.link(source, target)  # a rename would replace what is there
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        target.touch(exist_ok=False)  # that the name is ours a rename would not find out
        source.replace(target)
    else:
        source.unlink()


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
