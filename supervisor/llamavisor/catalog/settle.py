"""Whether a file is whole and still: a pure function of what was seen of it.

A file is not used while it is being written, and what is being written cannot be asked. It is told by four signs: the
header and the size that it promises, the time since the last change, blocks that were never written, and a tail of
zeros where the last tensor should be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llamavisor.catalog.entry import EntryState
from llamavisor.gguf import Header

STILL_S = 2.0
"""A file that has not changed for so long is not being written."""
STILL_NETWORK_S = 10.0
"""The same where another machine writes: its pauses are longer, and attributes are cached for seconds."""
OLD_NETWORK_S = 60.0
"""So old must a file be there by its own clock to count as still when it is first seen: two clocks may differ."""
HOLE_S = 600.0
"""After so long a hole is taken for a part of the file: no copy pauses longer."""
ZERO_TAIL_S = 600.0
"""After so long at most a tail of zeros is taken for a part of the file."""
SLOWEST_COPY_BYTES_PER_S = 1e6
"""A copy is at least so fast: a small file that ends in zeros is whole sooner than a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was seen of a file.

    Attributes:
        size: bytes.
        mtime_ns: of its content.
        ctime_ns: of anything about it, a rename for example.
        header: what it says; None when it cannot be read.
        problem: why it cannot be read.
        is_partial: whether a file that is being written may look like this.
        hole: the first byte that was never written, before the end of the last tensor; None without a hole.
        has_zero_tail: whether the last tensor ends in zeros.
        is_downloading: whether a downloader says so.
        is_network: whether it lies on a network file system.
        watched_s: seconds since this content was first seen.
        age_s: seconds that had then passed since its ctime; anything at all when the clocks differ.
    """

    size: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    header: Header | None = None
    problem: str = ""
    is_partial: bool = False
    hole: int | None = None
    has_zero_tail: bool = False
    is_downloading: bool = False
    is_network: bool = False
    watched_s: float = 0.0
    age_s: float = 0.0

    @property
    def was_moved_in(self) -> bool:
        """Whether it was written elsewhere and renamed to here.

        A write sets both times to the same; a rename sets ctime alone, and so does whoever sets a copy's mtime to the
        original's, which is done when all is written. Nothing of this holds on network file systems.
        """
        return not self.is_network and self.ctime_ns > self.mtime_ns


class Verdict(NamedTuple):
    """Whether a file can be used.

    Attributes:
        state: READY, SETTLING or INVALID.
        reason: why it is not READY.
        again_in_s: when it may be judged otherwise though nothing changes; None = never.
    """

    state: EntryState
    reason: str = ""
    again_in_s: float | None = None


def rest_s(seen: Evidence, needed_s: float) -> float:
    """Seconds until a file has been still for `needed_s`; 0 when it has."""
    if seen.is_network:  # its clock may not be ours
        return 0.0 if seen.age_s >= max(needed_s, OLD_NETWORK_S) else max(0.0, needed_s - seen.watched_s)
    return max(0.0, needed_s - max(0.0, seen.age_s) - seen.watched_s)


def still_s(seen: Evidence) -> float:
    """How long this file has to be still before it is believed to be written."""
    return STILL_NETWORK_S if seen.is_network else STILL_S


def settle(seen: Evidence) -> Verdict:
    """Judges a file. There are eight cases; the first that holds counts.

    1. A downloader's control file lies beside it: it settles as long as that lies there.
    2. It is no GGUF file and cannot become one: INVALID.
    3. It is too short, or so is its header: it settles until it is still, and is INVALID then.
    4. It was moved in whole and without holes: READY at once.
    5. It changed a moment ago: it settles.
    6. It has a hole: it settles until it has been still for `HOLE_S`.
    7. It ends in zeros: it settles as long as a slow copy of that size would take, `ZERO_TAIL_S` at most.
    8. READY.
    """
    if seen.is_downloading:
        return Verdict(EntryState.SETTLING, "a download is under way: the control file of aria2 lies beside it")
    header, rest = seen.header, rest_s(seen, still_s(seen))
    if header is None and not seen.is_partial:
        return Verdict(EntryState.INVALID, seen.problem)
    if header is None or seen.size < header.min_file_bytes:
        return _judge_short(seen, rest)
    if seen.was_moved_in and seen.hole is None:
        return Verdict(EntryState.READY)
    if rest:
        return Verdict(EntryState.SETTLING, "it was changed a moment ago", rest)
    if seen.hole is not None and (rest := rest_s(seen, HOLE_S)):
        return Verdict(EntryState.SETTLING, f"bytes are missing at {seen.hole}: a copy seems to be under way", rest)
    if seen.has_zero_tail and not seen.was_moved_in:
        rest = rest_s(seen, min(ZERO_TAIL_S, seen.size / SLOWEST_COPY_BYTES_PER_S))
        if rest:
            return Verdict(EntryState.SETTLING, "it ends in zeros: a copy seems to be under way", rest)
    return Verdict(EntryState.READY)


def _judge_short(seen: Evidence, rest: float) -> Verdict:
    if seen.header is None and seen.size:
        if rest:
            return Verdict(EntryState.SETTLING, f"it holds {seen.size} bytes so far: {seen.problem}", rest)
        return Verdict(
            EntryState.INVALID, f"it is cut off, or a copy that stalled, at {seen.size} bytes: {seen.problem}"
        )
    what = "is empty" if seen.header is None else f"holds {seen.size} of at least {seen.header.min_file_bytes} bytes"
    if rest:
        return Verdict(EntryState.SETTLING, f"it {what} so far", rest)
    return Verdict(EntryState.INVALID, f"it {what}: cut off, or a copy that stalled")
