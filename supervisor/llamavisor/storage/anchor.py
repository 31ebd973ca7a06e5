"""A folder by its descriptor: what is below it is reached from there, folder by folder, and never through a link.

Paths can lead elsewhere between a look and a deed, because somebody swaps a folder for a link. A descriptor cannot. All
paths here are relative to the folder; bytes that are not UTF-8 are surrogates in them, as `os.fsdecode` makes them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Self

MAX_DEPTH = 32
"""Folders below one another that are looked into. Nobody's models lie deeper."""
MAX_THINGS = 500_000
"""So many files and links are looked at, and no more."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


Identity = tuple[int, int, int]
"""Which thing it is: its device and inode, and its ctime, for the next file may get the inode of one that has gone."""


class Thing(NamedTuple):
    """A file, a link or whatever else is no folder.

    Attributes:
        rel: its path.
        status: of itself, not of what a link leads to.
    """

    rel: str
    status: os.stat_result

    @property
    def identity(self) -> Identity:
        """Which one it is."""
        return identity_of(self.status)

    @property
    def key(self) -> tuple[int, int]:
        """Device and inode: the content, whatever leads to it."""
        return self.status.st_dev, self.status.st_ino

    @property
    def size_bytes(self) -> int:
        """What it takes of the disk, nothing for a link. Of a file with holes only what was written."""
        if not stat.S_ISREG(self.status.st_mode):
            return 0
        return min(self.status.st_size, self.status.st_blocks * 512)


class Anchor:
    """An open folder, to be used in a `with` block. All methods block, and raise OSError.

    Args:
        path: the folder; it may itself be a link, for who configured it has said so.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __repr__(self) -> str:
        return f"<Anchor {self.path!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    @contextmanager
    def folder(self, rel: str) -> Iterator[int]:
        """The descriptor of a folder below; "" for this one.

        Raises:
            OSError: it is not there, or a link or `..` is on the way: ELOOP or ENOTDIR.
        """
        names = rel.split("/") if rel else []
        for name in names:
            _check(name)
        fd = os.dup(self._fd)
        try:
            for name in names:
                below = os.open(name, _FOLDER, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _parent(self, rel: str) -> Iterator[tuple[int, str]]:
        above, _, name = rel.rpartition("/")
        _check(name)
        with self.folder(above) as fd:
            yield fd, name

    def look(self, rel: str) -> os.stat_result:
        """What is there itself, be it a link."""
        with self._parent(rel) as (fd, name):
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def look_through(self, rel: str) -> os.stat_result:
        """What a link leads to, wherever that is; what is there itself if it is no link."""
        with self._parent(rel) as (fd, name):
            return os.stat(name, dir_fd=fd)

    def target(self, rel: str) -> str:
        """What is written in a link."""
        with self._parent(rel) as (fd, name):
            return os.readlink(name, dir_fd=fd)

    def open(self, rel: str) -> int:
        """A descriptor that reads a file, which is no link; it does not wait for the other end of a FIFO."""
        with self._parent(rel) as (fd, name):
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=fd)

    def unlink(self, rel: str, identity: Identity) -> None:
        """Remove a file or a link, if it still is that one. A link's target stays.

        Raises:
            OSError: ESTALE if it is another one.
        """
        with self._parent(rel) as (fd, name):
            if identity_of(os.stat(name, dir_fd=fd, follow_symlinks=False)) != identity:
                raise OSError(errno.ESTALE, "it is another file than a moment ago", rel)
            os.unlink(name, dir_fd=fd)

    def remove_if_empty(self, rel: str) -> bool:
        """Remove a folder that holds nothing; whether it was removed."""
        try:
            with self._parent(rel) as (fd, name):
                os.rmdir(name, dir_fd=fd)
        except OSError as exc:
            if exc.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EBUSY}:
                return False
            raise
        return True

    def names(self, rel: str = "") -> list[str]:
        """What is in a folder, by name; nothing if there is no such folder."""
        try:
            with self.folder(rel) as fd:
                return sorted(os.listdir(fd))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, rel: str = "") -> Iterator[Thing]:
        """Everything below a folder that is no folder. What cannot be looked into is left out."""
        left = MAX_THINGS
        queue = [(rel, 0)]
        while queue:
            at, depth = queue.pop()
            try:
                with self.folder(at) as fd:
                    inside = [(name, os.stat(name, dir_fd=fd, follow_symlinks=False)) for name in _listed(fd)]
            except OSError:  # it has gone meanwhile, or is not for us
                continue
            before = f"{at}/" if at else ""
            for name, status in inside:
                if stat.S_ISDIR(status.st_mode):
                    if depth < MAX_DEPTH:
                        queue.append((before + name, depth + 1))
                    continue
                if not left:
                    return
                left -= 1
                yield Thing(before + name, status)

    def clear(self, rel: str) -> list[Thing]:
        """Remove a file or link, or a folder with all that is in it; returns what was removed."""
        status = self.look(rel)
        things = list(self.walk(rel)) if stat.S_ISDIR(status.st_mode) else [Thing(rel, status)]
        for thing in things:
            self.unlink(thing.rel, thing.identity)
        if stat.S_ISDIR(status.st_mode):
            for folder in sorted(self._folders(rel), key=lambda each: -each.count("/")):
                self.remove_if_empty(folder)
        return things

    def _folders(self, rel: str) -> Iterator[str]:
        queue = [rel]
        while queue:
            at = queue.pop()
            yield at
            with self.folder(at) as fd:
                inside = [(name, os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode) for name in _listed(fd)]
            queue += [f"{at}/{name}" for name, mode in inside if stat.S_ISDIR(mode)]


def identity_of(status: os.stat_result) -> Identity:
    """Which thing a status is of."""
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _check(name: str) -> None:
    if name in {"", ".", ".."}:
        raise OSError(errno.ELOOP, "it is no path below the folder", name)


def _listed(fd: int) -> list[str]:
    return sorted(os.listdir(fd))
