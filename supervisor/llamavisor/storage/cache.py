"""One repository in a cache of the Hugging Face hub: its revisions, and which of them refer to which blobs.

Its layout is that of `catalog.hub`: what a revision holds are links into `blobs`, which several revisions may share.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from llamavisor.catalog.hub import SNAPSHOTS, ranked, repository
from llamavisor.storage.anchor import Anchor, Thing

BLOBS = "blobs"
REFS = "refs"
NOT_THERE = ".no_exist"
"""Where a cache notes which files a revision does not have."""
_REF_BYTES = 256


class Place(NamedTuple):
    """Where a file lies in a cache.

    Attributes:
        repository: the folder `models--USER--REPO`, relative to the models folder.
        revision: the name of the folder in its `snapshots`.
        inside: the path of the file in that.
    """

    repository: str
    revision: str
    inside: str


def place_of(rel: str) -> Place | None:
    """Where a file lies in a cache, by its path; None if it does not lie in one."""
    parts = rel.split("/")
    for at, name in enumerate(parts[:-3]):
        if repository(name) is not None and parts[at + 1] == SNAPSHOTS:
            return Place("/".join(parts[: at + 1]), parts[at + 2], "/".join(parts[at + 3 :]))
    return None


def repository_of(rel: str) -> str | None:
    """The repository in whose folder something lies, by its path; None if it lies in none."""
    parts = rel.split("/")
    found = next((at for at, name in enumerate(parts[:-1]) if repository(name) is not None), None)
    return None if found is None else "/".join(parts[: found + 1])


def is_note(rel: str) -> bool:
    """Whether a file is what a cache notes for itself, by its path."""
    repo = repository_of(rel)
    return repo is not None and rel[len(repo) + 1 :].partition("/")[0] in {REFS, NOT_THERE}


class Repository:
    """What one repository's folder holds, as of when this is made. Blocking.

    Args:
        anchor: the models folder.
        rel: the path of `models--USER--REPO` in it.

    Attributes:
        revisions: what each holds.
        blobs: by name.
        first: the name of the one that counts, empty without one.
    """

    def __init__(self, anchor: Anchor, rel: str) -> None:
        self.rel = rel
        self._anchor = anchor
        shelf = f"{rel}/{SNAPSHOTS}"
        self.revisions = {name: tuple(anchor.walk(f"{shelf}/{name}")) for name in anchor.names(shelf)}
        self.first = next(iter(ranked(f"{anchor.path}/{rel}", self.revisions)), "")
        self.blobs = {posixpath.basename(thing.rel): thing for thing in anchor.walk(f"{rel}/{BLOBS}")}

    def __repr__(self) -> str:
        return f"<Repository {self.rel!r}: {len(self.revisions)} revisions, {len(self.blobs)} blobs>"

    def folder_of(self, revision: str) -> str:
        """The path of a revision."""
        return f"{self.rel}/{SNAPSHOTS}/{revision}"

    def same(self, inside: str) -> list[Thing]:
        """One file in all revisions that have it."""
        paths = {f"{self.folder_of(revision)}/{inside}" for revision in self.revisions}
        return [thing for things in self.revisions.values() for thing in things if thing.rel in paths]

    def blob_of(self, thing: Thing) -> Thing | None:
        """The blob to which a link leads; None for what is no link, or leads elsewhere."""
        if not stat.S_ISLNK(thing.status.st_mode):
            return None
        try:
            target = self._anchor.target(thing.rel)
        except OSError:
            return None
        leads_to = os.path.normpath(posixpath.join(posixpath.dirname(thing.rel), target))
        folder, name = posixpath.split(leads_to)
        return self.blobs.get(name) if folder == f"{self.rel}/{BLOBS}" else None

    def only_of(self, things: Sequence[Thing]) -> list[Thing]:
        """The blobs to which nothing leads but these links."""
        leaving = {thing.rel for thing in things}
        others = [thing for each in self.revisions.values() for thing in each if thing.rel not in leaving]
        kept = {blob.rel for thing in others if (blob := self.blob_of(thing)) is not None}
        found = {blob.rel: blob for thing in things if (blob := self.blob_of(thing)) is not None}
        return [blob for rel, blob in found.items() if rel not in kept]


def close_up(anchor: Anchor, places: Iterable[Place]) -> None:
    """Remove the folders that held these files and hold nothing now; of a revision that has gone all memory.

    A ref to a revision that is not there would make the cache look damaged.
    """
    known = set(places)
    for place in known:
        shelf = f"{place.repository}/{SNAPSHOTS}"
        folder = f"{shelf}/{place.revision}/{place.inside}".rpartition("/")[0]
        while folder != shelf and anchor.remove_if_empty(folder):
            folder = folder.rpartition("/")[0]
    for rel, revision in {(place.repository, place.revision) for place in known}:
        if revision not in anchor.names(f"{rel}/{SNAPSHOTS}"):
            _forget(anchor, rel, revision)
    for rel in {place.repository for place in known}:
        if not any(anchor.walk(rel)):  # nothing is left but folders
            with suppress(FileNotFoundError):
                anchor.clear(rel)


def _forget(anchor: Anchor, rel: str, revision: str) -> None:
    for thing in anchor.walk(f"{rel}/{REFS}"):
        if _read(anchor, thing) == revision:
            anchor.unlink(thing.rel, thing.identity)
    with suppress(FileNotFoundError, NotADirectoryError):
        anchor.clear(f"{rel}/{NOT_THERE}/{revision}")


def _read(anchor: Anchor, thing: Thing) -> str:
    """The revision that a ref names, empty when it is none."""
    if not stat.S_ISREG(thing.status.st_mode):
        return ""
    fd = anchor.open(thing.rel)
    try:
        return os.fsdecode(os.pread(fd, _REF_BYTES, 0).strip())
    finally:
        os.close(fd)
