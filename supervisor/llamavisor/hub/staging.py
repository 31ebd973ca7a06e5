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
else in there is ever touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llamavisor.catalog.disk import disk_of
from llamavisor.hub.failure import HubError, Why, on_disk
from llamavisor.hub.flock import FileLock
from llamavisor.hub.listing import RemoteFile
from llamavisor.hub.record import Record
from llamavisor.ledger import replace_file

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
        key: the id of the pull; likewise.
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


class Part:
    """Where one file becomes whole.

    Attributes:
        whole: the file, once it is whole and verified.
        partial: its beginning.
        etag: what the server calls the content that it is the beginning of.
    """

    def __init__(self, whole: Path) -> None:
        self.whole = whole
        self.partial = whole.with_name(f"{whole.name}.part")
        self.etag = whole.with_name(f"{whole.name}.etag")

    def __repr__(self) -> str:
        return f"<Part {self.whole.name}>"

    def read_etag(self) -> str:
        """Of what is here; empty when that is not known. Blocking."""
        try:
            return self.etag.read_text(encoding="latin-1")[:1000]
        except OSError:
            return ""


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
        if not self._is_there():
            text = f"{self.path} is no folder for what is pulled: it is a link, or something else"
            raise HubError(text, why=Why.DISK, hint="Move it away.")

    def part_of(self, record: Record, file: RemoteFile) -> Part:
        """Where a file becomes whole: one place for one content, else for one file of one commit."""
        where = f"{record.repository}\0{record.commit}\0{file.path}"
        named = file.digest or hashlib.sha256(where.encode(errors="surrogateescape")).hexdigest()
        return Part(self._files / f"{named[:32]}-{file.size}")

    def folder_of(self, record: Record) -> Path:
        """Where the whole files of a pull are put together."""
        return self.path / record.key

    def lock_of(self, record: Record) -> FileLock:
        """Held by who works on a pull."""
        return FileLock(self.folder_of(record))

    def write(self, record: Record) -> None:
        """Remembers a pull.

        Raises:
            HubError: the disk does not take it.
        """
        self.prepare()
        with on_disk(self.path), _only_writer(self.path):
            replace_file(self.path / f"{record.key}{_JSON}", record.model_dump_json().encode())

    def forget(self, record: Record) -> None:
        """Remembers a pull no longer.

        Raises:
            HubError: the disk does not let it go.
        """
        with on_disk(self.path):
            (self.path / f"{record.key}{_JSON}").unlink(missing_ok=True)

    def pause(self, record: Record) -> None:
        """Remembers that nobody wants a pull now; one that another daemon works on is that one's.

        Raises:
            HubError: the disk does not take it.
        """
        with self.lock_of(record).tried() as is_ours:
            if is_ours:
                self.write(record.model_copy(update={"is_under_way": False}))

    def drop(self, record: Record) -> None:
        """Forgets a pull and removes what came of it; likewise.

        Raises:
            HubError: the disk does not let it go.
        """
        with self.lock_of(record).tried() as is_ours:
            if is_ours:
                self.forget(record)
        self.sweep()

    def records(self) -> list[Record]:
        """All pulls that are remembered; what is no record of ours is left alone."""
        found = []
        for name in self._names(self.path):
            if name.endswith(_JSON) and _OF_PULL.fullmatch(name):
                with suppress(OSError, ValidationError, ValueError):
                    record = self._read(self.path / name)
                    if record.key == name.removesuffix(_JSON):
                        found.append(record)
        return found

    def sweep(self, *, done: Record | None = None) -> None:
        """Removes what no pull that is remembered wants, but what somebody works on.

        Args:
            done: a pull that has all its files in its folder, and wants nothing else any more.
        """
        for path in self._litter(done):
            with suppress(HubError, OSError), FileLock(path).tried() as is_ours:
                if is_ours and path in self._litter(done):  # a pull may have come meanwhile
                    _remove(path)

    def holdings(self) -> list[Holding]:
        """What is in the folder, pull by pull, and what nobody wants."""
        seen: set[tuple[int, int]] = set()
        found = []
        for record in self.records():
            parts = (self.part_of(record, file).whole for file in record.remote_files)
            size, changed_at = self._weigh([self.folder_of(record), *parts], seen)
            is_under_way, rel = record.is_under_way, f"{NAME}/{record.key}"
            found.append(Holding(rel, record.name, record.key, size, changed_at, is_under_way))
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
        keys = {each.key for each in old}
        for record in self.records():
            if record.key in keys and not record.is_under_way:
                self.drop(record)
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
            for file in record.remote_files:
                part = self.part_of(record, file)
                here = max(0, *map(size_of, (self.folder_of(record) / file.name, part.whole, part.partial)))
                missing[part.whole] = min(missing.get(part.whole, file.size), file.size - min(here, file.size))
        return sum(missing.values())

    def _is_there(self) -> bool:
        """Whether the folder is one: through a link we would remove what is none of ours."""
        try:
            return all(stat.S_ISDIR(folder.lstat().st_mode) for folder in (self.path, self._files))
        except OSError:
            return False

    def _names(self, folder: Path) -> list[str]:
        if not self._is_there():
            return []
        with suppress(OSError):
            return sorted(os.listdir(folder))
        return []

    def _read(self, path: Path) -> Record:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            owners = {os.geteuid(), self.models_dir.stat().st_uid}  # some file systems make all files one user's
            if os.fstat(fd).st_uid not in owners:
                raise ValueError("somebody else has written it")
            return Record.model_validate_json(file.read(_MAX_RECORD_BYTES))

    def _litter(self, done: Record | None = None) -> set[Path]:
        """What nobody mentions, without suffixes: keys, and files below `files`."""
        records = self.records()
        wanted = {self.folder_of(record) for record in records}
        wanted |= {
            self.part_of(record, file).whole for record in records if record != done for file in record.remote_files
        }
        found = {
            folder / named[1]
            for folder, shape in ((self.path, _OF_PULL), (self._files, _OF_FILE))
            for name in self._names(folder)
            if (named := shape.fullmatch(name)) and not name.endswith(_JSON)
        }
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


def size_of(path: Path) -> int:
    """The bytes of a file, -1 if there is none. Blocking."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


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
    """Removes what goes by this name; no link is followed."""
    for suffix in _SUFFIXES:
        file = path.with_name(path.name + suffix)
        try:
            file.unlink(missing_ok=True)
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(file)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Two daemons write no record at the same time, which takes milliseconds."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
