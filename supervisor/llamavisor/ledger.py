"""What must survive a daemon's death, in one small file of the state folder.

It holds sections, each with a name and an owner. A section that this version does not know is written back as it was
read, so that a newer daemon finds it again. A file that cannot be used is never in the way: it is put aside, and the
daemon begins with nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from llamavisor.catalog import FileId
from llamavisor.files import replace_file

NAME = "ledger.json"
FORMAT = "llamavisor-ledger"
VERSION = 1
"""Raised when an older daemon could no longer make sense of the file; a new section or field is no reason."""
FLUSH_EVERY_S = 3.0
"""A change reaches the disk so soon, and the disk is not written more often."""
WARN_EVERY_S = 3600.0
MAX_FILE_BYTES = 16 * 1024 * 1024
"""A larger file is not ours: two thousand footprints take less than one MiB."""
MAX_KEYS = 2_000
MAX_MEASURED = 3
MAX_AGE_S = 365 * 86400.0
"""What was measured longer ago says nothing of today's drivers."""
_BAD = ".bad"
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR})
"""Errors that say nothing of the file itself."""
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_R = TypeVar("_R", bound=BaseModel)


class Section(Protocol):
    """One part of the ledger. It is read once, at the start, and changed by one task only."""

    @property
    def name(self) -> str:
        """Its name in the file; never changed once it was released."""
        ...

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        ...

    def load(self, raw: object, now: float) -> str:
        """Takes over what the file says, as far as it makes sense.

        Args:
            raw: JSON values.
            now: Unix seconds.

        Returns:
            What a person should know of what was left out, empty when all is well.
        """
        ...

    def dump(self) -> object:
        """What the file is to say, as JSON values. Called in a worker thread while the owner may change the section."""
        ...


def read_records(raw: object, kind: type[_R], part: slice) -> tuple[list[_R], str]:
    """The records of a section that is a list, those that make sense.

    Args:
        raw: what the file says.
        kind: what each record is.
        part: which of them are read: a section is no longer than its owner would make it.

    Returns:
        They, and what a person should know of what was left out, empty when all is well.
    """
    if not isinstance(raw, list):
        return [], "it is no list, and was left out"
    good, bad = [], 0
    for item in raw[part]:
        try:
            good.append(kind.model_validate(item))
        except ValidationError:
            bad += 1
    return good, f"{bad} damaged records were left out" if bad else ""


@dataclass(frozen=True, slots=True)
class Flushed:
    """How an attempt to write ended.

    Attributes:
        is_written: whether the file says what is known.
        message: for a person, empty when there is nothing new to say.
    """

    is_written: bool
    message: str = ""


class Ledger:
    """The file. `flush` is called every `FLUSH_EVERY_S` seconds at most, when `is_due`, and once at the end.

    Args:
        path: the file; its folder must be there.
        sections: those that are known.
        clock: monotonic seconds.
        wall: Unix seconds.
    """

    def __init__(
        self,
        path: Path,
        sections: Sequence[Section],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._sections = {section.name: section for section in sections}
        self._clock = clock
        self._wall = wall
        self._others: dict[str, object] = {}
        self._written = self._changes()
        self._tried_at: float | None = None
        self._warned_at: float | None = None
        self._is_failing = False
        self._is_unread = False
        self._writing = threading.Lock()

    def __repr__(self) -> str:
        state = "failing" if self._is_failing else "dirty" if self.is_dirty else "written"
        return f"<Ledger {self._path.name} {state}>"

    @property
    def is_dirty(self) -> bool:
        """Whether something is known that the file does not say."""
        return self._changes() != self._written and not self._is_unread

    @property
    def is_due(self) -> bool:
        """Whether it is time to `flush`."""
        return self.is_dirty and (self._tried_at is None or self._clock() - self._tried_at >= FLUSH_EVERY_S)

    def load(self) -> tuple[str, ...]:
        """Reads the file. Blocking, and called once, before anything is recorded.

        Returns:
            What a person should know. A file that cannot be used is kept beside, as one NAME.bad, and all sections
            begin empty. One that cannot be read for a reason that passes is not written over either.
        """
        try:
            raw = self._read()
        except FileNotFoundError:
            return ()
        except OSError as exc:
            if exc.errno in _PASSING:
                self._is_unread = True
                return (f"{self._path} cannot be read now: {exc.strerror}. It is left as it is until the next start.",)
            return (f"{self._path} cannot be used: {exc.strerror}. {self._put_aside()}",)
        except _UnusableError as exc:
            return (f"{self._path} cannot be used: {exc}. {self._put_aside()}",)
        return self._take(raw)

    def peek(self) -> None:
        """Reads the file as far as it can be read, for who is not its owner: it stays as it is, whatever it is like.

        Blocking.
        """
        with suppress(OSError, _UnusableError):
            self._take(self._read())

    def _take(self, raw: Mapping[str, object]) -> tuple[str, ...]:
        problems = []
        for name, content in raw.items():
            section = self._sections.get(name)
            if section is None:
                self._others[name] = content
            elif problem := section.load(content, self._wall()):
                problems.append(f"{self._path}: {name}: {problem}")
        self._written = self._changes()
        return tuple(problems)

    def flush(self) -> Flushed:
        """Writes the file if it is not up to date. Blocking: call it in a worker thread.

        A reader sees the old file or the new one, also after a power failure. When it cannot be written, all is kept in
        memory and the next call tries again; a person hears of it once an hour, and when it works again.
        """
        with self._writing:  # the last call may come while an earlier one that nobody waits for hangs
            return self._flush()

    def _flush(self) -> Flushed:
        changes = self._changes()  # first: what changes meanwhile is written the next time
        if changes == self._written or self._is_unread:
            return Flushed(is_written=changes == self._written)
        self._tried_at = self._clock()
        content = self._others | {name: section.dump() for name, section in self._sections.items()}
        text = json.dumps({"format": FORMAT, "version": VERSION, "sections": content}, separators=(",", ":"))
        try:
            replace_file(self._path, text.encode())
        except OSError as exc:
            return self._failed(exc)
        self._written = changes
        was_failing, self._is_failing, self._warned_at = self._is_failing, False, None
        return Flushed(is_written=True, message=f"{self._path} is written again" if was_failing else "")

    def _failed(self, exc: OSError) -> Flushed:
        self._is_failing = True
        now = self._clock()
        if self._warned_at is not None and now - self._warned_at < WARN_EVERY_S:
            return Flushed(is_written=False)
        self._warned_at = now
        return Flushed(
            is_written=False,
            message=f"{self._path} cannot be written: {exc.strerror}. What was learned is kept in memory until it can.",
        )

    def _changes(self) -> int:
        return sum(section.changes for section in self._sections.values())

    def _read(self) -> dict[str, object]:
        fd = os.open(self._path, _READ_FLAGS)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _UnusableError("it is no regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise _UnusableError(f"it has {status.st_size} bytes")
            with os.fdopen(fd, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES)
        finally:
            os.close(fd)
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise _UnusableError("it is cut off, or was never ours" if data else "it is empty") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise _UnusableError("it is not ours")
        version, sections = content.get("version"), content.get("sections")
        if not isinstance(version, int) or not isinstance(sections, dict):
            raise _UnusableError("it is damaged")
        if version > VERSION:
            raise _UnusableError(f"it is of version {version}, from a newer llamavisor, and this one reads {VERSION}")
        return sections

    def _put_aside(self) -> str:
        aside = self._path.with_name(self._path.name + _BAD)
        try:
            self._path.replace(aside)
        except OSError as exc:
            return f"It could not be put aside either ({exc.strerror}). Beginning with nothing."
        return f"It is kept as {aside.name}. Beginning with nothing."


@dataclass(frozen=True, slots=True)
class FootprintKey:
    """One model, one way to run it, one build: what is measured for it is the same every time.

    Attributes:
        files: names the contents of its files.
        options: names the way it is run (`footprint.Plan.digest`).
        build: names the llama-server.
    """

    files: str
    options: str
    build: str

    @classmethod
    def of(cls, files: Sequence[FileId], options: str, build: Sequence[tuple[str, int, int, int]]) -> FootprintKey:
        """The key of a model.

        Args:
            files: all of them: its own, its projector, its draft, its adapters.
            options: digest of its plan.
            build: the files of the build's fingerprint (`binary.Fingerprint.files`).
        """
        contents = [(file.device, file.inode, file.size, file.mtime_ns) for file in files]
        return cls(_digest(contents), options, _digest([tuple(file) for file in build]))


class _Record(BaseModel):
    """What was measured for one key."""

    model_config = ConfigDict(extra="allow", strict=True)

    files: Annotated[str, Field(max_length=64)]
    options: Annotated[str, Field(max_length=64)]
    build: Annotated[str, Field(max_length=64)]
    bytes: Annotated[list[dict[str, NonNegativeInt]], Field(min_length=1)]
    at: float


class Footprints:
    """The section of what models really took, the last measurements of each key, latest last.

    What is recorded should have been measured after a model has answered something: before that its compute buffers
    have hardly been touched; and before its prompt cache has grown, of which a footprint does not speak.

    Args:
        wall: Unix seconds.
    """

    name = "footprints"

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        # Invariant: the least recently measured key is first, and values are replaced, never changed.
        self._known: dict[FootprintKey, tuple[float, tuple[Mapping[str, int], ...]]] = {}
        self._changes = 0

    def __repr__(self) -> str:
        return f"<Footprints of {len(self._known)}>"

    def __len__(self) -> int:
        return len(self._known)

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._changes

    def record(self, key: FootprintKey, measured: Mapping[str, int]) -> None:
        """Adds a measurement, bytes by device id; the oldest of a key, and the key longest not measured, make room."""
        if not measured or any(size < 0 for size in measured.values()):
            return
        _, before = self._known.pop(key, (0.0, ()))
        self._known[key] = self._wall(), (*before, dict(measured))[-MAX_MEASURED:]
        while len(self._known) > MAX_KEYS:
            del self._known[next(iter(self._known))]
        self._changes += 1

    def recall(self, key: FootprintKey) -> tuple[Mapping[str, int], ...]:
        """What was measured, the latest last; empty when nothing was."""
        return self._known.get(key, (0.0, ()))[1]

    def load(self, raw: object, now: float) -> str:
        """Takes over what the file says, record by record."""
        records, problem = read_records(raw, _Record, slice(-MAX_KEYS, None))
        extra: set[str] = set()
        for record in records:
            extra |= (record.model_extra or {}).keys()
            # A clock that was wrong once must not make a record immortal.
            if 0 <= now - min(record.at, now) <= MAX_AGE_S:
                key = FootprintKey(record.files, record.options, record.build)
                self._known[key] = min(record.at, now), tuple(record.bytes[-MAX_MEASURED:])
        said = [problem] if problem else []
        said += [f"fields of a newer version were left out: {', '.join(sorted(extra))}"] if extra else []
        return "; ".join(said)

    def dump(self) -> object:
        """What the file is to say."""
        known: list[Any] = list(self._known.items())  # one step for other threads
        return [
            {
                "files": key.files,
                "options": key.options,
                "build": key.build,
                "bytes": [dict(each) for each in measured],
                "at": round(at, 3),
            }
            for key, (at, measured) in known
        ]


class _UnusableError(Exception):
    """Raised when the file is there and is not what it should be."""


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogateescape")).hexdigest()[:32]
