"""Looks at a models folder again and again, and tells what is different from the look before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llamavisor.catalog.disk import disk_of
from llamavisor.catalog.entry import Entry, EntryState, FileId, Scan
from llamavisor.catalog.group import Past, group, remember
from llamavisor.catalog.guard import Guard
from llamavisor.catalog.mounts import MOUNTINFO, network_devices
from llamavisor.catalog.reading import Reading, can_open, read
from llamavisor.catalog.settle import Evidence, Verdict, rest_s, settle, still_s
from llamavisor.catalog.split import Judged, join
from llamavisor.catalog.walk import Found, Oddity, Tree, Walker

REREAD_S = 1.0
"""The header of a file that keeps changing is not read more often."""

RETRY_S = 5.0
"""A file that could not be read because the disk is ill is read again."""

_LEAST_WAIT_S = 0.05
_NEVER_READ = -1e9
_UNJUDGED = Verdict(EntryState.SETTLING)


@dataclass(frozen=True, slots=True)
class _Held:
    """What a READY file was before its times changed, its size did not, and neither did its header.

    It was touched, or its times were put right, more likely than written to: it is READY as it was until it is still.

    Attributes:
        mtime_ns: of then.
        ctime_ns: likewise.
        seen_at: likewise.
        reading: likewise.
    """

    mtime_ns: int
    ctime_ns: int
    seen_at: float
    reading: Reading

    def fits(self, now: Reading) -> bool:
        """Whether a file of which this is the reading may be what it was."""
        is_same = now.header == self.reading.header and now.has_zero_tail <= self.reading.has_zero_tail
        return is_same and now.hole in (None, self.reading.hole)


@dataclass(slots=True)
class _Record:
    """What is known of one file, by device and inode.

    Attributes:
        size: of the content that this is about.
        mtime_ns: likewise.
        ctime_ns: when it was looked at last.
        first_seen: monotonic seconds.
        seen_at: Unix seconds of then.
        age_s: how old its ctime was then by the wall clock.
        reading: of this content, or of the one before while it changes too quickly.
        read_at: monotonic seconds of that reading.
        is_current: whether the reading is of this content.
        is_checked: whether it was read when it was still: what is written within one tick of the clock, or through a
            mapping, changes no mtime.
        is_ready: whether this content was READY once. Then it stays so.
        verdict: the last one.
        is_downloading: whether a downloader's control file lay beside it then.
        due: monotonic seconds at which the verdict may change by itself, None = never.
        held: what it is told to be while it settles, None when it is told as it is.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    first_seen: float
    seen_at: float
    age_s: float
    reading: Reading
    read_at: float
    is_current: bool = False
    is_checked: bool = False
    is_ready: bool = False
    verdict: Verdict = _UNJUDGED
    is_downloading: bool = False
    due: float | None = 0.0
    held: _Held | None = None

    def tell(self, found: Found) -> Judged:
        """What others are told of the file."""
        held = self.held
        if held is None:
            return Judged(found, self.reading.header, self.verdict, self.seen_at)
        was = found._replace(mtime_ns=held.mtime_ns, ctime_ns=held.ctime_ns)
        return Judged(was, held.reading.header, Verdict(EntryState.READY), held.seen_at)


class Scanner:
    """Looks at one models folder. Not to be used by two threads at once.

    Args:
        root: path of the models folder.
        link_dirs: folders outside of it that symlinks in it may lead to.
        monotonic: seconds that only grow.
        wall: Unix seconds.
        mountinfo: where it is told which file systems are mounted.

    Attributes:
        root: absolute path of the models folder.
        linked: folders that links lead to or into, as of the last look: what changes there is not seen in `root`.
    """

    def __init__(
        self,
        root: str,
        *,
        link_dirs: Sequence[str] = (),
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        mountinfo: str = MOUNTINFO,
    ) -> None:
        self.root = os.path.abspath(root)  # noqa: PTH100 (names may be no UTF-8)
        self._walker = Walker(self.root, link_dirs)
        self._monotonic, self._wall, self._mountinfo = monotonic, wall, mountinfo
        self._guard = Guard(self.root)
        self._tree = Tree()
        self._records: dict[tuple[int, int], _Record] = {}
        self.linked: tuple[str, ...] = ()
        self._entries: dict[str, Entry] = {}
        self._past = Past()
        self._devices: frozenset[int] = frozenset()
        self._network: frozenset[int] = frozenset()
        self._due: float | None = None
        self._reads = 0

    def __repr__(self) -> str:
        return f"<Scanner {self.root!r}: {len(self._entries)} entries, {len(self._tree.files)} files>"

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries as of the last look that was believed, by name."""
        return tuple(self._entries.values())

    def scan(self) -> Scan:
        """Looks at the folder once; tells the difference from the last look that was believed.

        Blocking: a folder on a server that does not answer takes for ever. It raises nothing for what it finds.
        """
        begin, self._reads = self._monotonic(), 0
        tree = self._walker.walk()
        if tree.problem:
            self._guard.forget()
            return Scan(problem=tree.problem, duration_s=self._monotonic() - begin)
        self.linked = tuple(sorted(tree.linked))
        self._keep_unreachable(tree)
        doubt = self._guard.doubt(
            had=len(self._tree.files), has=len(tree.files), before=self._tree.devices, devices=tree.devices, now=begin
        )
        if doubt is not None:
            return Scan(
                problem=doubt.problem,
                again_in_s=doubt.again_in_s,
                duration_s=self._monotonic() - begin,
                file_count=_count(tree),
            )
        is_same = tree.files == self._tree.files and tree.oddities == self._tree.oddities
        self._tree = tree
        if is_same and (self._due is None or begin < self._due):
            return self._told(begin, (), ())
        before, self._entries = self._entries, self._look(tree, begin)
        changed = tuple(entry for name, entry in self._entries.items() if before.get(name) != entry)
        return self._told(begin, changed, tuple(name for name in before if name not in self._entries))

    def _told(self, begin: float, changed: tuple[Entry, ...], removed: tuple[str, ...]) -> Scan:
        now = self._monotonic()
        return Scan(
            changed=changed,
            removed=removed,
            duration_s=now - begin,
            file_count=_count(self._tree),
            headers_read=self._reads,
            again_in_s=None if self._due is None else max(_LEAST_WAIT_S, self._due - now),
            disk=disk_of(self.root),
        )

    def _keep_unreachable(self, tree: Tree) -> None:
        """Puts into the tree what was known of the folders and files that do not answer."""
        if not tree.unreachable:
            return
        lost = tuple(f"{path}/" for path in tree.unreachable)
        for path, found in self._tree.files.items():
            if f"{path}/".startswith(lost):
                tree.files.setdefault(path, found)
        for path, oddity in self._tree.oddities.items():
            if path.startswith(lost):
                tree.oddities.setdefault(path, oddity)
        for path, device in self._tree.devices.items():
            if f"{path}/".startswith(lost):
                tree.devices.setdefault(path, device)
        for path, problem in tree.unreachable.items():
            if path not in tree.files and path not in tree.oddities:
                rel = path[len(self.root.rstrip("/")) + 1 :]
                tree.oddities[path] = Oddity(path, rel, f"it cannot be looked at: {problem}", FileId(0, 0, 0, 0))
        tree.supersede()

    def _look(self, tree: Tree, now: float) -> dict[str, Entry]:
        """The entries of a tree that is believed; reads what has to be read."""
        devices = frozenset(found.device for found in tree.files.values())
        if devices != self._devices:
            self._devices, self._network = devices, network_devices(self._mountinfo)
        wall, before = self._wall(), self._records
        self._records = {}
        judged: list[Judged] = []
        for found in tree.files.values():
            key = found.device, found.inode
            record = self._records.get(key)
            if record is None:  # not reached by another path in this look
                record = self._records[key] = _about(found, before.get(key), now, wall)
                self._judge(found, record, now)
                if record.held is not None and not _is_held(found, record, record.held):
                    record.held = None
            judged.append(record.tell(found))
        dues = [record.due for record in self._records.values() if record.due is not None]
        self._due = min(dues, default=None)
        units = join(judged)
        entries = group(units, tree.oddities.values(), self.root, self._past)
        self._past = remember(units, entries, self._past)
        return entries

    def _judge(self, found: Found, record: _Record, now: float) -> None:
        """Brings a record up to date. There are five reasons to read the file; all others cost nothing.

        1. Its content is new, and the last reading is a while ago.
        2. It has come to rest since it was read.
        3. It could not be opened, and something about it changed.
        4. It can no longer be opened.
        5. The last reading says that the next may be another.
        """
        is_touched = record.ctime_ns != found.ctime_ns
        is_steady = record.is_current and not is_touched and record.is_downloading == found.is_downloading
        if is_steady and (record.due is None or now < record.due):
            return
        record.ctime_ns, record.is_downloading = found.ctime_ns, found.is_downloading
        is_read = False
        if not record.is_current:
            if now < record.read_at + REREAD_S:
                record.verdict = Verdict(EntryState.SETTLING, "it is being written")
                record.due = record.read_at + REREAD_S
                return
            is_read = True
        elif record.reading.is_passing or (is_touched and (record.reading.is_refused or not can_open(found))):
            is_read = True
        if is_read:
            self._read(found, record, now)
        evidence = self._evidence(found, record, now)
        if not record.is_checked and not record.is_ready and not rest_s(evidence, still_s(evidence)):
            if not is_read:
                self._read(found, record, now)
                evidence = self._evidence(found, record, now)
            record.is_checked = True
        verdict = settle(evidence)
        if record.is_ready and record.reading.header is not None and not found.is_downloading:
            verdict = Verdict(EntryState.READY)
        record.verdict, record.is_ready = verdict, record.is_ready or verdict.state is EntryState.READY
        again = verdict.again_in_s
        if again is None and not record.is_ready and not record.is_checked:
            again = rest_s(evidence, still_s(evidence))
        if record.reading.is_passing:
            again = RETRY_S if again is None else min(again, RETRY_S)
        record.due = None if again is None else now + again

    def _read(self, found: Found, record: _Record, now: float) -> None:
        self._reads += 1
        reading = read(found)
        if reading.header is not None and reading.header == record.reading.header:
            reading = replace(reading, header=record.reading.header)  # one object: entries compare by it at once
        if record.is_current and reading.header is not None and reading.hole is None:
            # The same content has the same holes; it is our reading that hides them.
            reading = replace(reading, hole=record.reading.hole)
        record.reading, record.read_at, record.is_current = reading, now, True

    def _evidence(self, found: Found, record: _Record, now: float) -> Evidence:
        reading = record.reading
        return Evidence(
            size=found.size,
            mtime_ns=found.mtime_ns,
            ctime_ns=found.ctime_ns,
            header=reading.header,
            problem=reading.problem,
            is_partial=reading.is_partial,
            hole=reading.hole,
            has_zero_tail=reading.has_zero_tail,
            is_downloading=found.is_downloading,
            is_network=found.device in self._network,
            watched_s=now - record.first_seen,
            age_s=record.age_s,
        )


def _about(found: Found, known: _Record | None, now: float, wall: float) -> _Record:
    """The record of a file: the known one, or one of a new content."""
    if known is not None and known.size == found.size and known.mtime_ns == found.mtime_ns:
        return known
    reading, read_at = (known.reading, known.read_at) if known is not None else (Reading(is_partial=True), _NEVER_READ)
    record = _Record(
        size=found.size,
        mtime_ns=found.mtime_ns,
        ctime_ns=found.ctime_ns,
        first_seen=now,
        seen_at=wall,
        age_s=wall - found.ctime_ns / 1e9,
        reading=reading,
        read_at=read_at,
    )
    if known is not None and known.size == found.size:
        record.held = known.held
        if known.is_ready and known.verdict.state is EntryState.READY:
            record.held = _Held(known.mtime_ns, known.ctime_ns, known.seen_at, known.reading)
    return record


def _is_held(found: Found, record: _Record, held: _Held) -> bool:
    """Whether a file goes on being told as what it was. While it is too early to read it again it does."""
    if found.is_downloading or record.verdict.state is not EntryState.SETTLING:
        return False
    return not record.is_current or held.fits(record.reading)


def _count(tree: Tree) -> int:
    return len(tree.files) + sum(not oddity.is_folder for oddity in tree.oddities.values())
