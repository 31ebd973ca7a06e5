"""The folder in which models become whole, on the disk and in the sight of all daemons that share a models folder.

`.llamavisor-pull` lies in the models folder, so that a rename leads out of it; the catalog looks into no folder whose
name begins with a dot. In it are

    KEY.json         what a pull brings, and whether it is under way: it is taken up again by that
    KEY.lock         held by who works on it
    KEY/             its files, each of them whole and verified
    files/ID         a file that is whole, as long as a pull that wants it is not done
    files/ID.part    the beginning of one; files/ID.etag is what the server calls its content
    files/ID.lock    held by who fetches it

KEY and ID follow from what is wanted. What is not mentioned by any KEY.json is litter.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
from pydantic import ValidationError

from llamavisor.catalog.disk import disk_of
from llamavisor.hub.failure import HubError, Why
from llamavisor.hub.listing import RemoteFile
from llamavisor.hub.record import Record
from llamavisor.ledger import replace_file

NAME = ".llamavisor-pull"
SPARE_BYTES = 64 * 1024 * 1024
"""So much of the disk is left free: others live on it, too."""
LOOK_EVERY_S = 0.25
"""How often a lock that another holds is tried: flock(2) tells nobody when it is free."""

_JSON = ".json"
_SUFFIXES = (".part", ".etag")
_MAX_RECORD_BYTES = 1024 * 1024


class Staging:
    """The folder.

    Args:
        models_dir: the models folder that it lies in.
    """

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir
        self.path = models_dir / NAME

    def __repr__(self) -> str:
        return f"<Staging {self.path}>"

    def prepare(self) -> None:
        """Makes the folder. Blocking.

        Raises:
            HubError: it cannot be made.
        """
        with on_disk(self.models_dir):
            self.models_dir.stat()
            (self.path / "files").mkdir(parents=True, exist_ok=True)

    def part_of(self, record: Record, file: RemoteFile) -> Part:
        """Where a file becomes whole: one place for one content, else for one file of one commit."""
        named = file.sha256 or hashlib.sha256(f"{record.repository}\0{record.commit}\0{file.path}".encode()).hexdigest()
        return Part(self.path / "files" / f"{named[:32]}-{file.size}")

    def folder_of(self, record: Record) -> Path:
        """Where the whole files of a pull are put together."""
        return self.path / record.key

    def write(self, record: Record) -> None:
        """Remembers a pull. Blocking."""
        with on_disk(self.path), _only_writer(self.path):
            replace_file(self.path / f"{record.key}{_JSON}", record.model_dump_json().encode())

    def forget(self, record: Record) -> None:
        """Remembers a pull no longer. Blocking."""
        with on_disk(self.path):
            (self.path / f"{record.key}{_JSON}").unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """All pulls that are remembered; what is no record is left alone. Blocking."""
        found = []
        with suppress(OSError):
            for name in sorted(os.listdir(self.path)):
                if name.endswith(_JSON) and not name.startswith("."):
                    with suppress(OSError, ValidationError, ValueError):
                        found.append(self._read(self.path / name))
        return found

    def sweep(self, *, done: Record | None = None) -> int:
        """Removes what no pull that is remembered wants, but what somebody works on; how many bytes. Blocking.

        Args:
            done: a pull that has all its files in its folder, and wants nothing else any more.
        """
        freed = 0
        for path in self._litter(done):
            with suppress(HubError, OSError), _try_lock(path) as is_ours:
                if is_ours and path in self._litter(done):  # a pull may have come meanwhile
                    freed += sum(_remove(path.with_name(path.name + suffix)) for suffix in ("", *_SUFFIXES))
        return freed

    def free_bytes(self) -> int | None:
        """What the disk has to spare, None if it does not tell. Blocking."""
        disk = disk_of(str(self.models_dir))
        return None if disk is None else max(0, disk.free_bytes - SPARE_BYTES)

    def here_bytes(self, record: Record) -> int:
        """How much of a pull is on the disk already. Blocking."""
        folder = self.folder_of(record)
        here = 0
        for file in record.remote_files:
            part = self.part_of(record, file)
            here += max(0, *map(_size_of, (folder / file.name, part.whole, part.partial)))
        return here

    def _read(self, path: Path) -> Record:
        with path.open("rb") as file:
            return Record.model_validate_json(file.read(_MAX_RECORD_BYTES))

    def _litter(self, done: Record | None = None) -> set[Path]:
        """What nobody mentions, without suffixes: keys, and files below `files`."""
        records = self.records()
        wanted = {self.folder_of(record) for record in records}
        wanted |= {
            self.part_of(record, file).whole for record in records if record != done for file in record.remote_files
        }
        found = set()
        for folder in (self.path, self.path / "files"):
            with suppress(OSError):
                found |= {folder / _without_suffix(name) for name in os.listdir(folder) if not name.endswith(_JSON)}
        return found - wanted - {self.path / "files"}


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
        """Of what is here; empty when that is not known."""
        try:
            return self.etag.read_text(encoding="latin-1")[:1000]
        except OSError:
            return ""


@asynccontextmanager
async def locked(path: Path, *, waits: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
    """Holds PATH.lock; nobody else does meanwhile, in this process or another, and the kernel frees what dies.

    Args:
        path: what it is about.
        waits: called again and again while another holds it.

    Raises:
        HubError: the file cannot be made.
    """
    while True:
        with _try_lock(path) as is_ours:
            if is_ours:
                yield
                return
        waits()
        await anyio.sleep(LOOK_EVERY_S)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Two daemons write no record at the same time, which takes milliseconds."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether the lock was free, and is held now. It is removed by who holds it, so it must be the one on the disk."""
    lock = path.with_name(f"{path.name}.lock")
    with on_disk(lock):
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(fd), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        try:
            yield is_ours
        finally:
            if is_ours:
                with suppress(OSError):
                    lock.unlink()
    finally:
        os.close(fd)


def place(record: Record, folder: Path, models_dir: Path) -> Path:
    """Puts what is whole where the catalog sees it, all of it in one step; the path of what is new there. Blocking.

    Raises:
        HubError: something else has that name.
    """
    target = target_of(record, models_dir)
    if len(record.files) > 1:
        with on_disk(target):
            _sync(folder)
            try:
                folder.rename(target)
            except OSError as exc:
                if exc.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    raise _taken(target) from exc
                raise
    else:
        source = folder / record.remote_files[0].name
        with on_disk(target):
            try:
                os.link(source, target)  # a rename would replace what is there
            except FileExistsError as exc:
                raise _taken(target) from exc
            except OSError:  # a file system without links
                if os.path.lexists(target):
                    raise _taken(target) from None
                source.rename(target)
            else:
                source.unlink()
            with suppress(OSError):
                folder.rmdir()
    _sync(models_dir)
    return target


def target_of(record: Record, models_dir: Path) -> Path:
    """Where a pull ends: a file in the models folder; a folder if there are several."""
    return models_dir / (record.name if len(record.files) > 1 else f"{record.name}.gguf")


def is_placed(record: Record, models_dir: Path) -> bool:
    """Whether all of it is where it belongs, with its very content. Blocking: it reads all files, if their sizes fit.

    Raises:
        HubError: something else has that name.
    """
    target = target_of(record, models_dir)
    if not os.path.lexists(target):
        return False
    for file in record.remote_files:
        path = target / file.name if len(record.files) > 1 else target
        if _size_of(path) != file.size or (file.sha256 and _hash_of(path) != file.sha256):
            raise _taken(target)
    return True


def keep(part: Part, path: Path) -> None:
    """Puts a whole file into the folder of a pull; others may want it, too. Blocking."""
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(part.whole, path)
        except OSError:
            part.whole.rename(path)


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Errors of the disk as ours."""
    try:
        yield
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise HubError(
                f"{path.parent}: the disk is full", why=Why.NO_SPACE, hint="Make room, and pull again: it goes on."
            ) from exc
        hint = (
            "Let the user of the daemon write there." if exc.errno in {errno.EACCES, errno.EPERM, errno.EROFS} else ""
        )
        raise HubError(f"{path} cannot be written: {exc.strerror}", why=Why.DISK, hint=hint) from exc


def _taken(target: Path) -> HubError:
    hint = "Move it away, or pull under another name."
    return HubError(f"{target} is there already, and is something else", why=Why.EXISTS, hint=hint)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _hash_of(path: Path) -> str:
    with on_disk(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> int:
    """Removes a file or a folder of files if it is there; how many bytes it had."""
    try:
        freed = sum(max(0, _size_of(inside)) for inside in path.iterdir())
    except NotADirectoryError:
        freed = max(0, _size_of(path))
        path.unlink()
    except FileNotFoundError:
        return 0
    else:
        shutil.rmtree(path)
    return freed


def _without_suffix(name: str) -> str:
    for suffix in (*_SUFFIXES, ".lock"):
        name = name.removesuffix(suffix)
    return name


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)
