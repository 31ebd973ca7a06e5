"""How the files of one model leave the disk: which they are, decided first, then one after the other.

The plan is made from what the catalog says and holds it against the disk; nothing is removed that is not, by device and
inode, what was planned. A link is removed, and what it leads to stays; in a cache of the hub the blob goes with its
last link.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.errors import FilesChangedError, LlamavisorError, NotRemovableError
from llamavisor.storage.anchor import Anchor, Identity, Thing, identity_of
from llamavisor.storage.cache import Repository, close_up, place_of, repository_of

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_LINKED = frozenset({errno.ELOOP, errno.ENOTDIR})
_OTHER = frozenset({errno.ENOENT, errno.ESTALE})


@dataclass(frozen=True, slots=True)
class Doomed:
    """A file or a link that is to be removed.

    Attributes:
        rel: its path, relative to the models folder.
        size_bytes: what that frees; nothing for a link.
        identity: which one it is.
        is_link: whether it is a symlink.
    """

    rel: str
    size_bytes: int
    identity: Identity
    is_link: bool

    @classmethod
    def of(cls, thing: Thing) -> Doomed:
        """What was found."""
        status = thing.status
        frees = status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0
        return cls(thing.rel, frees, thing.identity, stat.S_ISLNK(status.st_mode))


@dataclass(frozen=True, slots=True)
class Removal:
    """What the removal of a model takes away.

    Attributes:
        model: its name.
        folder: the models folder.
        files: in the order in which they go.
        kept: absolute paths of its projector and draft that stay, because others use them.
        obstacles: why it is not done unless it is forced.
    """

    model: str
    folder: str
    files: tuple[Doomed, ...]
    kept: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """What it frees."""
        return sum(file.size_bytes for file in self.files)

    @property
    def token(self) -> str:
        """The same for the same files: who has agreed to a plan says with it which one."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.identity} ".encode() + os.fsencode(file.rel) + b"\0")
        return digest.hexdigest()[:32]

    def paths(self) -> list[str]:
        """Absolute, in the order in which they go."""
        return [f"{self.folder.rstrip('/')}/{file.rel}" for file in self.files]


def plan(root: str, entry: Entry, others: Iterable[Entry], needed: Collection[str] = ()) -> Removal:
    """What is to be removed so that a model is gone. Blocking; changes nothing.

    Args:
        root: the absolute path of the models folder.
        entry: the model.
        others: all other models of the folder.
        needed: paths of files that a configuration names for others.

    Raises:
        NotRemovableError: part of it is no file, or does not lie in the folder.
        FilesChangedError: the disk is not as the catalog says.
    """
    used = _used([each for each in others if each.state is not EntryState.GONE])
    companions = [file for file in (entry.projector, entry.draft) if file is not None]
    kept = [file for file in companions if _key(file) in used or file.path in needed]
    doomed: dict[str, Doomed] = {}
    with Anchor(root) as anchor:
        for file in (*entry.files, *(file for file in companions if file not in kept)):
            for thing in _things(anchor, root, entry.name, file, used):
                doomed.setdefault(thing.rel, Doomed.of(thing))
    return Removal(entry.name, root, tuple(doomed.values()), tuple(file.path for file in kept))


def carry_out(removal: Removal) -> None:
    """Remove what was planned, then the folders that held it and hold nothing now. Blocking.

    Raises:
        FilesChangedError: something is not what was planned any more; then nothing is removed, as a rule.
        NotRemovableError: the disk, or its rights, do not allow it. It says what had gone before.
    """
    gone: list[str] = []
    rel = ""
    try:
        with Anchor(removal.folder) as anchor:
            for file in removal.files:
                rel = file.rel
                if identity_of(anchor.look(rel)) != file.identity:
                    raise _changed(removal.model, rel)
            for file in removal.files:
                rel = file.rel
                anchor.unlink(rel, file.identity)
                gone.append(rel)
            _remove_folders(anchor, removal)
    except OSError as exc:
        raise _failure(removal.model, rel, exc, gone) from exc


def _things(anchor: Anchor, root: str, model: str, file: ModelFile, used: Collection[tuple[int, int]]) -> list[Thing]:
    """What has to go for one file: it, or in a cache of the hub its links in all revisions, and their blobs."""
    rel = _rel(root, model, file.path)
    try:
        status = anchor.look(rel)
        meant = {_content(status)}
        if stat.S_ISLNK(status.st_mode):
            with suppress(OSError):  # one that leads nowhere is removed as well
                meant.add(_content(anchor.look_through(rel)))
        elif not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise NotRemovableError(f"model {model}: {file.path} is {what}", hint="remove it by hand")
        if file.id not in meant:
            raise _changed(model, rel)
        place = place_of(rel)
        if place is None:
            return [Thing(rel, status)]
        repository = Repository(anchor, place.repository)
    except OSError as exc:
        raise _failure(model, rel, exc) from exc
    same = repository.same(place.inside)
    blobs = repository.only_of(same)
    return [*same, *(blob for blob in blobs if blob.key not in used)]


def _rel(root: str, model: str, path: str) -> str:
    before = f"{root.rstrip('/')}/"
    if not path.startswith(before):
        raise NotRemovableError(f"model {model}: {path} does not lie in {root}", hint="remove it by hand")
    return path[len(before) :]


def _used(others: Iterable[Entry]) -> set[tuple[int, int]]:
    files = (file for each in others for file in (*each.files, each.projector, each.draft) if file is not None)
    return {_key(file) for file in files}


def _content(status: os.stat_result) -> FileId:
    return FileId(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _key(file: ModelFile) -> tuple[int, int]:
    return file.id.device, file.id.inode


def _remove_folders(anchor: Anchor, removal: Removal) -> None:
    """The folders of its files if they hold nothing now."""
    places = {file.rel: place_of(file.rel) for file in removal.files}
    folders = {rel.rpartition("/")[0] for rel, place in places.items() if place is None}
    for folder in sorted(folders - {""}, key=lambda each: -each.count("/")):
        if repository_of(folder) is None:
            anchor.remove_if_empty(folder)
    close_up(anchor, (place for place in places.values() if place is not None))


def _changed(model: str, rel: str) -> FilesChangedError:
    return FilesChangedError(f"model {model}: {rel} is another file than a moment ago", hint="look again")


def _failure(model: str, path: str, exc: OSError, gone: Sequence[str] = ()) -> LlamavisorError:
    """Why a file was not removed. `gone` are those that were, before it."""
    before = f"; gone before it: {', '.join(gone)}" if gone else ""
    if exc.errno in _OTHER and not gone:
        return _changed(model, path)
    if exc.errno in _LINKED:
        text = f"model {model}: {path} is reached through a link to another folder{before}"
        return NotRemovableError(text, hint="remove it there, or remove that link")
    hint = "let the user of this daemon write to its folder" if exc.errno in _DENIED else ""
    return NotRemovableError(f"model {model}: cannot remove {path}: {exc.strerror or exc}{before}", hint=hint)
