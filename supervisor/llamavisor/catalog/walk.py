"""The tree of a models folder: which files in it call themselves GGUF files, and what else is to be told of it.

Nothing is opened here but folders. Every file costs one stat, and nothing that lies in the tree stops the walk: what
cannot be a model's file though it is called so is an `Oddity`.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llamavisor.catalog.entry import FileId
from llamavisor.catalog.hub import SNAPSHOTS, Snapshot, ranked, repository
from llamavisor.catalog.revisions import superseded

SUFFIX = ".gguf"
"""What a file calls itself; in any case."""
MAX_DEPTH = 8
"""Folders below the models folder that are looked into: a snapshot in a nested cache of the hub is the fifth."""
MAX_FILES = 100_000
"""More files are not looked at. The largest collections known have a few thousand."""
MAX_FOLDERS = 20_000
"""More folders are not looked into."""

_CONTROL_SUFFIX = ".aria2"
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG})
"""A folder or file that says so is there, and is not for us."""
_VANISHED = frozenset({errno.ENOENT, errno.ENOTDIR})
"""It was there a moment ago. Every other error says nothing about what is there: the disk or the server is ill."""
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Found(NamedTuple):
    """A regular file that calls itself a GGUF file.

    Attributes:
        path: absolute.
        rel: relative to the models folder.
        device: st_dev.
        inode: st_ino.
        size: bytes.
        mtime_ns: of its content.
        ctime_ns: of anything about it; a rename counts.
        is_link: whether it, or a folder above it, is a symlink.
        is_downloading: whether the control file of a downloader lies beside it.
        snapshot: of the hub's cache in which it lies, None elsewhere.
    """

    path: str
    rel: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    is_link: bool = False
    is_downloading: bool = False
    snapshot: Snapshot | None = None

    @property
    def where(self) -> str:
        """`rel`, in the hub's cache without the revision."""
        return self.rel if self.snapshot is None else self.snapshot.where(self.rel)


class Oddity(NamedTuple):
    """What calls itself a GGUF file and is none, or a folder that cannot be looked into.

    Attributes:
        path: absolute.
        rel: relative to the models folder; empty for that folder itself.
        reason: what is wrong with it, and what to do.
        id: as far as it is known.
        changed_at: Unix seconds, 0 when it is not known.
        is_folder: whether all that is below is meant.
    """

    path: str
    rel: str
    reason: str
    id: FileId
    changed_at: float = 0.0
    is_folder: bool = False


@dataclass(slots=True)
class Tree:
    """What one walk found.

    Attributes:
        problem: why the models folder itself cannot be looked at, without its path; then nothing else is to be
            believed.
        files: by their paths.
        oddities: by their paths.
        devices: st_dev of every folder, by its path.
        unreachable: folders and files of which nothing is known now, because the disk or server does not answer, and
            what it says.
        linked: folders that links lead to or into: what changes there changes what is found here.
    """

    problem: str = ""
    files: dict[str, Found] = field(default_factory=dict)
    oddities: dict[str, Oddity] = field(default_factory=dict)
    devices: dict[str, int] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)
    linked: set[str] = field(default_factory=set)

    def supersede(self) -> None:
        """Drop the files that a better revision of their repository has as well."""
        cached = [(path, found.rel, found.snapshot) for path, found in self.files.items() if found.snapshot is not None]
        for path in superseded(cached):
            del self.files[path]


class _Folder(NamedTuple):
    """A folder to be looked into. They are ordered: what is reached without a link first, then what is less deep."""

    is_link: bool
    depth: int
    rel: str
    path: str
    snapshot: Snapshot | None = None


class _Target(NamedTuple):
    """What a link led to.

    Attributes:
        device: st_dev.
        inode: st_ino.
        forbidden: its path, if that is outside of all allowed folders; else empty.
        home: the folder it lies in, if that is allowed and outside of the models folder; else empty.
    """

    device: int
    inode: int
    forbidden: str
    home: str


class Walker:
    """Walks one models folder again and again.

    Args:
        root: the absolute path of the models folder.
        link_dirs: folders outside that links may lead into.
    """

    def __init__(self, root: str, link_dirs: Sequence[str] = ()) -> None:
        self._root = root
        self._link_dirs = tuple(link_dirs)
        self._targets: dict[str, _Target] = {}
        self._allowed: tuple[str, ...] = ()
        self._older: list[str] = []  # revisions that only stand in for what another lacks

    def __repr__(self) -> str:
        return f"<Walker {self._root!r}>"

    def walk(self) -> Tree:
        """Looks at the whole tree once. Blocking; it raises nothing for what it finds."""
        tree = Tree()
        self._older.clear()
        try:
            self._allowed = tuple(_as_prefix(os.path.realpath(path)) for path in (self._root, *self._link_dirs))
            self._walk(tree)
        except OSError as exc:
            tree.problem = _root_problem(exc)
        else:
            tree.supersede()
            if self._older:  # nobody is told of what is broken in a revision that is not used
                older = tuple(self._older)
                tree.oddities = {p: oddity for p, oddity in tree.oddities.items() if not f"{p}/".startswith(older)}
            self._targets = {
                path: target for path, target in self._targets.items() if path in tree.files or path in tree.oddities
            }
        return tree

    def _walk(self, tree: Tree) -> None:
        queue = [_Folder(False, 0, "", self._root, None)]
        visited: set[tuple[int, int]] = set()
        while queue:
            folder = heapq.heappop(queue)
            try:
                status = os.stat(folder.path)  # noqa: PTH116 (quick, and names may be no UTF-8)
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(folder.path) as entries:
                    inside = list(entries)
            except OSError as exc:
                if not folder.depth:
                    raise
                self._refuse_folder(tree, folder, exc)
                continue
            tree.devices[folder.path] = status.st_dev
            if folder.is_link:
                tree.linked.add(folder.path)
            if len(visited) > MAX_FOLDERS:
                self._stop(tree, f"it holds more than {MAX_FOLDERS} folders, and the others are not looked at")
                return
            below = list(self._look_into(tree, folder, inside))
            if len(tree.files) + len(tree.oddities) > MAX_FILES:
                self._stop(tree, f"it holds more than {MAX_FILES} model files, and the others are not looked at")
                return
            for sub in self._choose(folder, below):
                heapq.heappush(queue, sub)

    def _look_into(self, tree: Tree, folder: _Folder, inside: Sequence[os.DirEntry[str]]) -> Iterator[_Folder]:
        """Adds the files of a folder to the tree; yields the folders in it."""
        controls = {entry.name for entry in inside if entry.name.endswith(_CONTROL_SUFFIX)}
        before = f"{folder.rel}/" if folder.rel else ""
        room = MAX_FILES + 1 - len(tree.files) - len(tree.oddities)
        if len(inside) > room:  # what is left out must not depend on the order in which the disk lists them
            inside = sorted(inside, key=lambda entry: entry.name)
        for entry in inside:
            name = entry.name
            if name.startswith("."):
                continue
            calls_itself = name[-len(SUFFIX) :].lower() == SUFFIX
            path, rel = entry.path, before + name
            try:
                is_link = entry.is_symlink()
                if not is_link and entry.is_dir(follow_symlinks=False):
                    yield self._sub(folder, rel, path, is_link=folder.is_link)
                    continue
                if not calls_itself and not is_link:
                    continue
                status = entry.stat()
            except OSError as exc:
                if calls_itself or exc.errno not in _REFUSED | _VANISHED:
                    self._refuse_file(tree, entry, rel, exc, is_top=not folder.depth)
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            outside = ""
            if is_link and (is_folder or calls_itself):
                *_, outside, home = self._follow(path, status)
                if home and not is_folder:
                    tree.linked.add(home)
            if outside:
                told = f"a link to {_quoted(outside)}, outside of the models folder; "
                told += f"allow it with link_dirs = [{_quoted(outside if is_folder else _parent(outside))}]"
                tree.oddities[path] = _odd(path, rel, told, status, is_folder=is_folder)
            elif is_folder:
                yield self._sub(folder, rel, path, is_link=True)
            elif calls_itself and not stat.S_ISREG(status.st_mode):
                kind = next((kind for matches, kind in _KINDS if matches(status.st_mode)), "no regular file")
                tree.oddities[path] = _odd(path, rel, f"this is {kind}, not a file", status)
            elif calls_itself:
                tree.files[path] = Found(
                    path,
                    rel,
                    status.st_dev,
                    status.st_ino,
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    is_link or folder.is_link,
                    bool(controls) and name + _CONTROL_SUFFIX in controls,
                    folder.snapshot,
                )
            else:
                continue
            room -= 1
            if room <= 0:
                return

    def _sub(self, folder: _Folder, rel: str, path: str, *, is_link: bool) -> _Folder:
        snapshot = folder.snapshot
        if snapshot is None and _name(folder.path) == SNAPSHOTS:
            name = repository(_name(_parent(folder.path)))
            snapshot = Snapshot(name, rel) if name else None
        return _Folder(is_link, folder.depth + 1, rel, path, snapshot)

    def _choose(self, folder: _Folder, below: list[_Folder]) -> list[_Folder]:
        """Which folders in it are looked into: a repository's revisions in the order in which they count."""
        if folder.depth >= MAX_DEPTH:
            return []
        if folder.snapshot is None and below and below[0].snapshot is not None:
            names = {_name(sub.path): sub for sub in below}
            revisions = [names[name] for name in ranked(_parent(folder.path), names)]
            self._older += [f"{sub.path}/" for sub in revisions[1:]]
            return [
                sub._replace(snapshot=sub.snapshot and sub.snapshot._replace(rank=rank))
                for rank, sub in enumerate(revisions)
            ]
        return below

    def _follow(self, path: str, status: os.stat_result) -> _Target:
        """Where a link leads.

        The way of a link costs a call for each folder on it, so it is only followed when the link leads to something
        else than it did before.
        """
        device, inode = status.st_dev, status.st_ino
        known = self._targets.get(path)
        if known is None or known[:2] != (device, inode):
            real = os.path.realpath(path)
            inside = [_as_prefix(real).startswith(prefix) for prefix in self._allowed]
            home = _parent(real) if any(inside) and not inside[0] else ""
            known = self._targets[path] = _Target(device, inode, "" if any(inside) else real, home)
        return known

    def _refuse_folder(self, tree: Tree, folder: _Folder, exc: OSError) -> None:
        if exc.errno in _VANISHED:
            return
        reason = f"this folder cannot be looked into: {exc.strerror}"
        if exc.errno in _REFUSED:
            reason += "; let the user of this daemon read and enter it, or move it away"
        else:
            tree.unreachable[folder.path] = exc.strerror or str(exc)
            reason += "; what was known of it is kept"
        tree.oddities[folder.path] = Oddity(folder.path, folder.rel, reason, FileId(0, 0, 0, 0), is_folder=True)

    def _refuse_file(self, tree: Tree, entry: os.DirEntry[str], rel: str, exc: OSError, *, is_top: bool) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
            is_link = stat.S_ISLNK(status.st_mode)
        except OSError as own:
            exc, status, is_link = own, None, False
        if is_link and exc.errno in _VANISHED | {errno.ELOOP}:
            target = _quoted(_readlink(entry.path))
            reason = f"a link to {target}, which does not exist" if exc.errno != errno.ELOOP else "a link to itself"
        elif exc.errno in _VANISHED:
            return
        elif exc.errno in _REFUSED:
            reason = f"it cannot be looked at: {exc.strerror}; let the user of this daemon enter its folder"
        elif is_top and not is_link:
            raise exc
        else:
            tree.unreachable[entry.path] = exc.strerror or str(exc)
            return
        tree.oddities[entry.path] = _odd(entry.path, rel, reason, status)

    def _stop(self, tree: Tree, reason: str) -> None:
        tree.oddities[self._root] = Oddity(self._root, "", reason, FileId(0, 0, 0, 0), is_folder=True)


def changed_at(ctime_ns: int) -> float:
    """When a file was last changed, in Unix seconds.

    Whatever changes a file sets its ctime, and nobody but the kernel does. Its mtime is what somebody says: of a copy
    it is the original's, and it may be in the future.
    """
    return ctime_ns / 1e9


def _root_problem(exc: OSError) -> str:
    """What is told of the models folder itself, behind its path."""
    if exc.errno == errno.ENOENT:
        return "does not exist"
    if exc.errno == errno.ENOTDIR:
        return "is not a folder"
    who = f" (uid {os.geteuid()})" if exc.errno in {errno.EACCES, errno.EPERM} else ""
    return f"cannot be read: {exc.strerror or exc}{who}"


def _odd(path: str, rel: str, reason: str, status: os.stat_result | None, *, is_folder: bool = False) -> Oddity:
    if status is None:
        return Oddity(path, rel, reason, FileId(0, 0, 0, 0), is_folder=is_folder)
    # Invariant: a folder's own times are no part of it, or it would be news whenever something in it changes.
    size, mtime_ns, ctime_ns = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    if is_folder:
        size = mtime_ns = ctime_ns = 0
    key = FileId(status.st_dev, status.st_ino, size, mtime_ns)
    return Oddity(path, rel, reason, key, changed_at(ctime_ns), is_folder)


def _as_prefix(path: str) -> str:
    """`path` so that only what is in it begins with it."""
    return path.rstrip("/") + "/"


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _readlink(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 (names may be no UTF-8)
    except OSError:
        return "?"


def _quoted(path: str) -> str:
    return f'"{path}"'
