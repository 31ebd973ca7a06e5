"""The folder in which models become whole, on the disk and in the sight of all daemons that share a models folder.

`.llamavisor-pull` lies in the models folder, so that a rename leads out of it; the catalog looks into no folder whose
name begins with a dot. In it are

    KEY.json         what a pull brings, and whether it is under way: it is taken up again by that
    KEY.lock         held by who works on it
    KEY/             its files, each of them whole and verified
    files/ID         a file that is whole, as long as a pull that wants it is not done
    files/ID.part    the beginning of one; files/ID.etag is what the server calls its content
    files/ID.lock    held by who fetches it

KEY and ID follow from what is wanted. What has such a name and is not mentioned by any KEY.json is litter; nothing
else in there is ever touched, and no file as long as there is a KEY.json that cannot be read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from llamavisor.catalog.disk import disk_of
from llamavisor.files import replace_file
from llamavisor.hub.failure import HubError, Why, on_disk
from llamavisor.hub.flock import FileLock
from llamavisor.hub.listing import RemoteFile
from llamavisor.hub.part import Part, size_of
from llamavisor.hub.record import Record

NAME = ".llamavisor-pull"
SPARE_BYTES = 64 * 1024 * 1024
"""So much of the disk is left free: others live on it, too."""

_JSON = ".json"
_FILES = "files"
_SUFFIXES = ("", ".part", ".etag")
_OF_PULL = re.compile(r"([^.].*-[0-9a-f]{16})(?:\.json|\.lock)?", re.DOTALL)
_OF_FILE = re.compile(r"([0-9a-f]{32}-[0-9]+)(?:\.part|\.etag|\.lock)?")
_MAX_RECORD_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Holding:
    """What one pull keeps in the folder, or what nobody wants any more.

    Attributes:
        rel: where, relative to the models folder.
        model: what the model is going to be called; empty for what nobody wants.
        key: the id of the pull; likewise. A pull without a model cannot be read.
        size_bytes: what it takes of the disk; what two pulls want counts for the first of them.
        changed_at: Unix seconds of the last change of anything of it.
        is_under_way: whether somebody wants it now.
    """

    rel: str
    model: str
    key: str
    size_bytes: int
    changed_at: float
    is_under_way: bool


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What the folder says of pulls.

    Attributes:
        records: of those that can be read.
        unread: the keys of those that cannot, for whatever reason.
    """

    records: list[Record] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)


class Staging:
    """The folder. All that touches the disk blocks.

    Args:
        models_dir: the models folder that it lies in.
    """

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir
        self.path = models_dir / NAME
        self._files = self.path / _FILES

    def __repr__(self) -> str:
        return f"<Staging {self.path}>"

    def prepare(self) -> None:
        """Makes the folder.

        Raises:
            HubError: it cannot be made, or what is there is something else.
        """
        with on_disk(self.models_dir):
            self.models_dir.stat()
            for folder in (self.path, self._files):
                with suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
        if not self._is_ours():
            text = f"{self.path} is no folder for what is pulled here: it is a link, or somebody else's"
            raise HubError(text, why=Why.DISK, hint="Move it away.")

    def part_of(self, record: Record, file: RemoteFile) -> Part:
        """Where a file becomes whole: one place for one content, else for one file of one commit."""
        where = f"{record.repository}\0{record.commit}\0{file.path}"
        named = file.digest or hashlib.sha256(where.encode(errors="surrogateescape")).hexdigest()
        return Part(self._files / f"{named[:32]}-{file.size}")

    def folder_of(self, record: Record) -> Path:
        """Where the whole files of a pull are put together."""
        return self.path / record.key

    def lock_of(self, key: str) -> FileLock:
        """Held by who works on a pull."""
        return FileLock(self.path / key)

    def write(self, record: Record) -> None:
        """Remembers a pull.

        Raises:
            HubError: the disk does not take it.
        """
        self.prepare()
        with on_disk(self.path), _only_writer(self.path):
            replace_file(self._json(record.key), record.model_dump_json().encode())

    def forget(self, key: str) -> None:
        """Remembers a pull no longer.

        Raises:
            HubError: the disk does not let it go.
        """
        with on_disk(self.path):
            self._json(key).unlink(missing_ok=True)

    def pause(self, record: Record, failure: HubError | None = None) -> None:
        """Remembers that nobody wants a pull now; one that another daemon works on is that one's.

        Args:
            record: which.
            failure: why, if it was not a person who has cancelled it.

        Raises:
            HubError: the disk does not take it.
        """
        told = {"why": failure.why.value, "reason": str(failure)} if failure is not None else {}
        left = record.model_copy(update={"is_under_way": False, **told})
        with self.lock_of(record.key).tried() as is_ours:
            if not is_ours:
                return
            try:
                self.write(left)
            except HubError as exc:
                if exc.why is not Why.NO_SPACE:
                    raise
                with on_disk(self.path):
                    _write_over(self._json(record.key), left.model_dump_json().encode())

    def drop(self, key: str, *, is_wanted: bool = False) -> bool:
        """Forgets a pull and removes what came of it; whether it did. One that another daemon works on is that one's.

        Args:
            key: which.
            is_wanted: whether one goes that is remembered as under way: by who had it so.

        Raises:
            HubError: the disk does not let it go.
        """
        with self.lock_of(key).tried() as is_ours:
            goes = is_ours and (is_wanted or not self._is_under_way(key))
            if goes:
                self.forget(key)
        if goes:
            self.sweep()
        return goes

    def records(self) -> list[Record]:
        """All pulls that are remembered; what is no record of ours is left alone."""
        with suppress(OSError):
            return self._remembered().records
        return []

    def sweep(self, *, done: str = "") -> None:
        """Removes what no pull that is remembered wants, but what somebody works on.

        Args:
            done: the key of a pull that has all its files in its folder, and wants nothing else any more.
        """
        for path in self._litter(done):
            with suppress(HubError, OSError), FileLock(path).tried() as is_ours:
                if is_ours and path in self._litter(done):  # a pull may have come meanwhile
                    _remove(path)

    def holdings(self, counted: Iterable[tuple[int, int]] = ()) -> list[Holding]:
        """What is in the folder, pull by pull, what nobody wants, and what cannot be read.

        Args:
            counted: device and inode of what somebody else takes already, so that it is counted once.
        """
        seen = set(counted)
        found, remembered = [], _Remembered()
        with on_disk(self.path), suppress(FileNotFoundError):
            remembered = self._remembered()
        for record in remembered.records:
            parts = (self.part_of(record, file).whole for file in record.files)
            size, changed_at = self._weigh([self.path / record.key, *parts], seen)
            is_under_way, rel = record.is_under_way, f"{NAME}/{record.key}"
            found.append(Holding(rel, record.name, record.key, size, changed_at, is_under_way))
        for key in sorted(remembered.unread):
            size, changed_at = self._weigh([self.path / key], seen)
            found.append(Holding(f"{NAME}/{key}", "", key, size, changed_at, is_under_way=False))
        for path in sorted(self._litter()):
            size, changed_at = self._weigh([path], seen)
            found.append(Holding(str(path.relative_to(self.models_dir)), "", "", size, changed_at, is_under_way=False))
        return found

    def clean(self, before: float, *, is_dry: bool) -> list[Holding]:
        """Gives up pulls that nobody wants now, and removes what nobody wants any more.

        Args:
            before: only pulls that have not changed since then; Unix seconds.
            is_dry: whether nothing is removed.

        Returns:
            What has gone, or would.
        """
        old = [each for each in self.holdings() if not each.key or (not each.is_under_way and each.changed_at < before)]
        if is_dry:
            return old
        for each in old:
            if each.key:
                self.drop(each.key)
        self.sweep()
        left = {each.rel for each in self.holdings()}
        return [each for each in old if each.rel not in left]

    def free_bytes(self) -> int | None:
        """What the disk has to spare, None if it does not tell."""
        disk = disk_of(str(self.models_dir))
        return None if disk is None else max(0, disk.free_bytes - SPARE_BYTES)

    def missing_bytes(self, records: Iterable[Record]) -> int:
        """How much of some pulls is still to come; what several want comes once."""
        missing: dict[Path, int] = {}
        for record in records:
            for file in record.files:
                part = self.part_of(record, file)
                here = max(0, *map(size_of, (self.folder_of(record) / file.name, part.whole, part.partial)))
                missing[part.whole] = min(missing.get(part.whole, file.size), file.size - min(here, file.size))
        return sum(missing.values())

    def _json(self, key: str) -> Path:
        return self.path / f"{key}{_JSON}"

    def _is_ours(self) -> bool:
        """Whether the folder is one, and ours: what is in it is believed, and removed."""
        try:
            owners = self._owners()
            known = [folder.lstat() for folder in (self.path, self._files)]
        except OSError:
            return False
        return all(stat.S_ISDIR(status.st_mode) and status.st_uid in owners for status in known)

    def _owners(self) -> set[int]:
        """Whose files are ours: some file systems make all files one user's."""
        return {os.geteuid(), self.models_dir.stat().st_uid}

    def _remembered(self) -> _Remembered:
        """What the folder says of pulls.

        Raises:
            OSError: it says nothing, which is not to say that there are none.
        """
        if not self._is_ours():
            raise FileNotFoundError(errno.ENOENT, "it is no folder of ours", str(self.path))
        found = _Remembered()
        for name in sorted(os.listdir(self.path)):
            if name.endswith(_JSON) and _OF_PULL.fullmatch(name):
                key = name.removesuffix(_JSON)
                try:
                    found.records.append(self._read(key))
                except FileNotFoundError:
                    continue
                except (OSError, ValidationError, ValueError):
                    found.unread.add(key)
        return found

    def _read(self, key: str) -> Record:
        fd = os.open(self._json(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_uid not in self._owners():
                raise ValueError("somebody else has written it")
            record = Record.model_validate_json(file.read(_MAX_RECORD_BYTES))
        if record.key != key:
            raise ValueError("it is of another pull")
        return record

    def _is_under_way(self, key: str) -> bool:
        try:
            return self._read(key).is_under_way
        except (OSError, ValidationError, ValueError):
            return False

    def _litter(self, done: str = "") -> set[Path]:
        """What nobody mentions, without suffixes: keys, and files below `files`.

        As long as there is a pull that cannot be read, nobody knows which files it wants.
        """
        try:
            remembered = self._remembered()
        except OSError:
            return set()
        wanted = {self.path / record.key for record in remembered.records}
        wanted |= {self.path / key for key in remembered.unread}
        wanted |= {
            self.part_of(record, file).whole
            for record in remembered.records
            if record.key != done
            for file in record.files
        }
        places = [(self.path, _OF_PULL)] + ([(self._files, _OF_FILE)] if not remembered.unread else [])
        found: set[Path] = set()
        for folder, shape in places:
            with suppress(OSError):
                named = (shape.fullmatch(name) for name in os.listdir(folder) if not name.endswith(_JSON))
                found |= {folder / each[1] for each in named if each}
        return found - wanted

    def _weigh(self, paths: Iterable[Path], seen: set[tuple[int, int]]) -> tuple[int, float]:
        """The bytes of these, with all their suffixes, and when they were changed. What was seen before is nothing."""
        size, changed_at = 0, 0.0
        for path in paths:
            for status in _files_of(path):
                if (status.st_dev, status.st_ino) not in seen:
                    size += status.st_size
                changed_at = max(changed_at, status.st_ctime)
                seen.add((status.st_dev, status.st_ino))
        return size, changed_at


def _files_of(path: Path) -> Iterator[os.stat_result]:
    """What goes by this name and is there: a folder's files, a file, what belongs to it."""
    for suffix in (*_SUFFIXES, _JSON):
        file = path.with_name(path.name + suffix)
        with suppress(OSError):
            status = file.lstat()
            if stat.S_ISDIR(status.st_mode):
                yield from (inside.lstat() for inside in file.iterdir())
            else:
                yield status


def _remove(path: Path) -> None:
    """Removes what goes by this name: files, and a folder of files. No link is followed; other folders stay."""
    for suffix in _SUFFIXES:
        file = path.with_name(path.name + suffix)
        try:
            is_folder = stat.S_ISDIR(file.lstat().st_mode)
        except FileNotFoundError:
            continue
        if is_folder:
            for inside in file.iterdir():
                inside.unlink()
            file.rmdir()
        else:
            file.unlink()


def _write_over(path: Path, data: bytes) -> None:
    """Writes where a file has its place on a full disk. One that a power failure tears cannot be read, and stays."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Two daemons write no record at the same time, which takes milliseconds."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
