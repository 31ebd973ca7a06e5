"""Who takes the disk of a models folder: its models, and all that is none.

Whatever a look at the disk finds belongs to the model whose content it is, by device and inode; a link takes nothing.
What then belongs to nobody is told by what it seems to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from llamavisor.catalog import Entry, EntryState, ModelFile
from llamavisor.catalog.disk import Disk, disk_of
from llamavisor.hub.staging import NAME as PULLS
from llamavisor.hub.staging import Holding, Staging
from llamavisor.quantizer import STAGING as DRAFTS
from llamavisor.storage.anchor import Anchor, Thing
from llamavisor.storage.cache import Repository, is_note, place_of, repository_of

LEFTOVERS_MAX = 1000
"""Of more leftovers than these the smallest are not told one by one."""

_PARTIAL = (".partial", ".part", ".incomplete", ".aria2", ".crdownload", ".download", ".tmp")
"""How the names of files end that a download has not finished."""
_BROKEN = frozenset({EntryState.INVALID, EntryState.INCOMPLETE})


class Kind(Enum):
    """What something on the disk seems to be that is no model."""

    PULL = "pull"
    """What has come of a pull that is under way, or was left and can be taken up again."""
    STAGING = "staging"
    """What llamavisor was making, and nobody wants any more."""
    PARTIAL = "partial"
    """A download of somebody else that has not ended."""
    REVISION = "revision"
    """What only revisions of a repository hold, in a cache of the hub, that are not used any more."""
    BROKEN = "broken"
    """A model that cannot be used."""
    OTHER = "other"
    """Anything else."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a model.

    Attributes:
        path: absolute.
        size_bytes: of its content.
        shared_with: other models that use it.
        is_outside: whether its content does not lie in the folder: a link leads to it.
    """

    path: str
    size_bytes: int
    shared_with: tuple[str, ...] = ()
    is_outside: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """What one model takes.

    Attributes:
        model: its name.
        state: of its files.
        files: its own, then its projector and its draft.
    """

    model: str
    state: EntryState
    files: tuple[Item, ...]

    @property
    def size_bytes(self) -> int:
        """What would be free without it: without what others use, or does not lie in the folder."""
        return sum(item.size_bytes for item in self.files if not item.shared_with and not item.is_outside)


@dataclass(frozen=True, slots=True)
class Leftover:
    """What lies in the folder and belongs to no model.

    Attributes:
        kind: what it seems to be.
        rel: its path, relative to the models folder.
        size_bytes: what it takes.
        changed_at: Unix seconds of the last change of anything in it.
        reason: what is wrong with it; empty if nothing is known to be.
        model: the name under which it can be removed, for what is broken; what it is going to be called, for a pull.
        pull: the id of a pull.
        is_under_way: whether somebody wants that now.
    """

    kind: Kind
    rel: str
    size_bytes: int
    changed_at: float
    reason: str = ""
    model: str = ""
    pull: str = ""
    is_under_way: bool = False

    @classmethod
    def of(cls, holding: Holding) -> Leftover:
        """What the folder of the pulls holds."""
        return cls(
            Kind.PULL if holding.key else Kind.STAGING,
            holding.rel,
            holding.size_bytes,
            holding.changed_at,
            model=holding.model,
            pull=holding.key,
            is_under_way=holding.is_under_way,
        )


@dataclass(frozen=True, slots=True)
class Account:
    """The whole folder.

    Attributes:
        folder: its absolute path.
        disk: what it lies on, None if that does not tell.
        models: the largest first.
        leftovers: likewise.
        models_bytes: what models take, each content once.
        leftover_bytes: what is left over takes, also what was too little to be told.
        problem: why none of this is known; empty when it is.
    """

    folder: str
    disk: Disk | None
    models: tuple[Share, ...]
    leftovers: tuple[Leftover, ...]
    models_bytes: int
    leftover_bytes: int
    problem: str = ""

    @classmethod
    def unknown(cls, folder: str, problem: str) -> Account:
        """That of a folder that cannot be looked at."""
        return cls(folder, None, (), (), 0, 0, problem)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is cleaned away as a whole, or not at all.

    Attributes:
        kind: what it is.
        rel: its path, relative to the models folder.
        things: its files and links.
    """

    kind: Kind
    rel: str
    things: tuple[Thing, ...]

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return sum(thing.size_bytes for thing in self.things)

    @property
    def changed_at(self) -> float:
        """Unix seconds of the last change of any of that."""
        return max((thing.status.st_ctime for thing in self.things), default=0.0)

    def told(self) -> Leftover:
        """What people see of it."""
        return Leftover(self.kind, self.rel, self.size_bytes, self.changed_at)


def account(root: str, entries: Iterable[Entry]) -> Account:
    """Who takes the disk of a models folder. Blocking; what cannot be looked into is left out.

    Args:
        root: its absolute path.
        entries: the models that are known there.

    Raises:
        OSError: the folder itself cannot be opened.
    """
    known = [entry for entry in entries if entry.state is not EntryState.GONE]
    with Anchor(root) as anchor:
        found: dict[tuple[int, int], Thing] = {}
        for thing in anchor.walk():
            found.setdefault(thing.key, thing)
        old = list(old_revisions(anchor, known, found.values()))
    usable = [entry for entry in known if entry.state not in _BROKEN]
    users = _users(usable)
    taken = {_key(file): found.pop(_key(file)) for entry in usable for file in _files(entry) if _key(file) in found}
    shares = [_share(entry, users, taken) for entry in usable]
    leftovers = [_broken(root, entry, found) for entry in known if entry.state in _BROKEN]
    pulled = [thing for thing in found.values() if top_of(thing) == PULLS]
    units = [*old, *drafts(found.values())]
    in_units = {thing.rel for thing in pulled} | {thing.rel for unit in units for thing in unit.things}
    leftovers += _others(thing for thing in found.values() if thing.rel not in in_units)
    leftovers += [unit.told() for unit in units if unit.size_bytes]
    leftovers += _pulled(root, pulled, taken.keys())
    leftovers.sort(key=lambda each: (-each.size_bytes, each.rel))
    return Account(
        root,
        disk_of(root),
        tuple(sorted(shares, key=lambda each: (-each.size_bytes, each.model))),
        tuple(leftovers[:LEFTOVERS_MAX]),
        sum(thing.size_bytes for thing in taken.values()),
        sum(each.size_bytes for each in leftovers),
    )


def old_revisions(anchor: Anchor, entries: Iterable[Entry], things: Iterable[Thing]) -> Iterator[Unit]:
    """The revisions in caches of the hub that no model has a file of, and that are not the one that counts.

    Args:
        anchor: the models folder.
        entries: the models that are known there.
        things: all that lies in it.
    """
    files = [file for entry in entries for file in _files(entry)]
    keys = {_key(file) for file in files}
    rels = [file.path[len(anchor.path.rstrip("/")) + 1 :] for file in files]
    used = {(place.repository, place.revision) for rel in rels if (place := place_of(rel)) is not None}
    for rel in sorted({repo for thing in things if (repo := repository_of(thing.rel)) is not None}):
        repository = Repository(anchor, rel)
        old = [name for name in repository.revisions if (rel, name) not in used and name != repository.first]
        leaving = [thing for name in old for thing in repository.revisions[name]]
        blobs = {blob.rel: blob for blob in repository.only_of(leaving) if blob.key not in keys}
        for name in old:
            own = repository.revisions[name]
            mine = [blob for thing in own if (blob := repository.blob_of(thing)) is not None]
            own = (*own, *(blobs.pop(blob.rel) for blob in mine if blob.rel in blobs))
            yield Unit(Kind.REVISION, repository.folder_of(name), own)


def _files(entry: Entry) -> list[ModelFile]:
    return [file for file in (*entry.files, entry.projector, entry.draft) if file is not None]


def _key(file: ModelFile) -> tuple[int, int]:
    return file.id.device, file.id.inode


def _users(entries: Iterable[Entry]) -> Mapping[tuple[int, int], list[str]]:
    users: dict[tuple[int, int], list[str]] = {}
    for entry in entries:
        for key in {_key(file) for file in _files(entry)}:
            users.setdefault(key, []).append(entry.name)
    return users


def _share(entry: Entry, users: Mapping[tuple[int, int], list[str]], found: Mapping[tuple[int, int], Thing]) -> Share:
    items = []
    for file in _files(entry):
        others = tuple(name for name in users[_key(file)] if name != entry.name)
        items.append(Item(file.path, file.id.size, others, _key(file) not in found))
    return Share(entry.name, entry.state, tuple(items))


def _broken(root: str, entry: Entry, found: dict[tuple[int, int], Thing]) -> Leftover:
    """A model that cannot be used. What it has in common with one that can is that one's."""
    own = [found.pop(_key(file)) for file in entry.files if _key(file) in found]
    size = sum(thing.size_bytes for thing in own)
    rel = entry.path[len(root.rstrip("/")) + 1 :]
    return Leftover(Kind.BROKEN, rel, size, entry.changed_at, entry.reason, entry.name)


def top_of(thing: Thing) -> str:
    """The folder at the top of the models folder in which something lies; empty if that is the models folder itself."""
    return thing.rel.partition("/")[0] if "/" in thing.rel else ""


def drafts(things: Iterable[Thing]) -> Iterator[Unit]:
    """What is being quantized, or was when that was killed."""
    units: dict[str, list[Thing]] = {}
    for thing in things:
        if (top := top_of(thing)).startswith(DRAFTS):
            units.setdefault(top, []).append(thing)
    for rel, own in units.items():
        yield Unit(Kind.STAGING, rel, tuple(own))


def _pulled(root: str, things: Sequence[Thing], counted: Iterable[tuple[int, int]]) -> Iterator[Leftover]:
    """What pulls hold, and what else lies in their folder."""
    told = [Leftover.of(holding) for holding in Staging(Path(root)).holdings(counted)]
    yield from told
    rest = sum(thing.size_bytes for thing in things) - sum(each.size_bytes for each in told)
    if rest > 0:
        yield Leftover(Kind.OTHER, PULLS, rest, max(thing.status.st_ctime for thing in things))


def _others(rest: Iterable[Thing]) -> Iterator[Leftover]:
    for thing in rest:
        if thing.size_bytes and not is_note(thing.rel):
            kind = Kind.PARTIAL if thing.rel.endswith(_PARTIAL) else Kind.OTHER
            yield Leftover(kind, thing.rel, thing.size_bytes, thing.status.st_ctime)
