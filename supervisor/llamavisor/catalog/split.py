"""Models in one file or in several: what their names and their headers say of the parts, held against each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llamavisor.catalog.entry import EntryState
from llamavisor.catalog.naming import PART, stem_of
from llamavisor.catalog.settle import Verdict
from llamavisor.catalog.walk import Found, changed_at
from llamavisor.gguf import Header
from llamavisor.gguf.container import printable

_LISTED = 3


class Judged(NamedTuple):
    """A file that was judged.

    Attributes:
        found: where it is, and which content.
        header: what it says, None when it cannot be read.
        verdict: whether it can be used.
        seen_at: Unix seconds at which this content was first seen.
    """

    found: Found
    header: Header | None
    verdict: Verdict
    seen_at: float = math.inf

    @property
    def changed_at(self) -> float:
        """When it was last changed, in Unix seconds: never later than it was seen, whatever the clocks were."""
        return min(changed_at(self.found.ctime_ns), self.seen_at)


@dataclass(slots=True)
class Unit:
    """The files that are loaded together.

    Attributes:
        key: what stays the same while its parts come and go, and its content changes.
        files: in the order of the parts, those that are there. Never empty.
        stem: what they are called without suffix and part.
        verdict: whether all of them together can be used.
        header: of the first part, None when it is missing or cannot be read.
        is_known: whether any header could be read.
        parameter_count: of all parts; 0 when one is not known.
    """

    key: str
    files: tuple[Judged, ...]
    stem: str
    verdict: Verdict
    header: Header | None
    is_known: bool
    parameter_count: int

    @property
    def first(self) -> Found:
        """The file that llama-server is given."""
        return self.files[0].found

    @property
    def file_name(self) -> str:
        """Its name."""
        return self.first.rel.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The folder it lies in, relative to the models folder."""
        return self.first.rel.rpartition("/")[0]

    @property
    def home(self) -> str:
        """Likewise; in the hub's cache without the revision, so that what belongs together is found together."""
        return self.first.where.rpartition("/")[0]


def join(files: Iterable[Judged]) -> list[Unit]:
    """All files as what is loaded together. Parts belong together by folder, name and count."""
    units: list[Unit] = []
    splits: dict[tuple[str, str, str], list[tuple[int, Judged]]] = {}
    for judged in files:
        folder, _, name = judged.found.rel.rpartition("/")
        match = PART.fullmatch(name) if "-of-" in name else None
        if match is None:
            units.append(_single(judged, stem_of(name)))
        elif match[4] != ".gguf":
            reason = "llama-server finds the parts of a split file only if they end in .gguf; rename it"
            units.append(_single(judged, stem_of(match[1]), reason))
        elif not 0 < int(match[2]) <= int(match[3]):
            reason = f"there is no part {int(match[2])} of {int(match[3])}; its name is wrong"
            units.append(_single(judged, stem_of(name), reason))
        else:
            splits.setdefault((folder, match[1], match[3]), []).append((int(match[2]), judged))
    units += [_split(stem, int(count), sorted(parts)) for (_, stem, count), parts in splits.items()]
    return units


def _single(judged: Judged, stem: str, problem: str = "") -> Unit:
    header = judged.header
    if header is not None and header.split is not None and not problem:
        number, count = header.split.number + 1, header.split.count
        problem = f"by its header it is part {number} of {count}, but it is not called so; "
        problem += f"llama-server wants {printable(stem)}-{number:05}-of-{count:05}.gguf"
    verdict = Verdict(EntryState.INVALID, problem) if problem else judged.verdict
    count = header.parameter_count if header else 0
    return Unit(judged.found.where, (judged,), stem, verdict, header, header is not None, count)


def _split(prefix: str, count: int, parts: Sequence[tuple[int, Judged]]) -> Unit:
    headers = [judged.header for _, judged in parts if judged.header is not None]
    is_complete = len(headers) == count
    home = parts[0][1].found.where.rpartition("/")[0]
    return Unit(
        f"{home}/{prefix}-of-{count}",
        tuple(judged for _, judged in parts),
        stem_of(prefix),
        _judge(prefix, count, parts),
        parts[0][1].header if parts[0][0] == 1 else None,
        bool(headers),
        sum(header.parameter_count for header in headers) if is_complete else 0,
    )


def _judge(prefix: str, count: int, parts: Sequence[tuple[int, Judged]]) -> Verdict:
    """Whether a split model can be used; what cannot be mended by waiting is said first."""
    for number, judged in parts:
        if problem := _contradiction(number, count, judged.header):
            return Verdict(EntryState.INVALID, problem)
    worst = _first(parts, EntryState.INVALID, count)
    if worst is not None:
        return worst
    if len(parts) < count:
        return Verdict(EntryState.INCOMPLETE, _missing(prefix, count, {number for number, _ in parts}))
    worst = _first(parts, EntryState.SETTLING, count)
    if worst is not None:
        return worst
    headers = [judged.header for _, judged in parts if judged.header is not None]
    found = sum(header.tensor_count for header in headers)
    said = headers[0].split.tensor_count if headers and headers[0].split is not None else None
    if said is not None and said != found:
        return Verdict(EntryState.INVALID, f"its parts hold {found} tensors together, and the first says {said}")
    return Verdict(EntryState.READY)


def _contradiction(number: int, count: int, header: Header | None) -> str:
    if header is None:
        return ""
    if header.split is None:
        return "" if count == 1 else f"by its name it is part {number} of {count}; its header says nothing of parts"
    said, of = header.split.number + 1, header.split.count
    if (said, of) == (number, count):
        return ""
    return f"by its name it is part {number} of {count}, by its header part {said} of {of}"


def _first(parts: Sequence[tuple[int, Judged]], state: EntryState, count: int) -> Verdict | None:
    for number, judged in parts:
        if judged.verdict.state is state:
            reason = judged.verdict.reason
            return Verdict(state, reason if count == 1 else f"part {number} of {count}: {reason}")
    return None


def _missing(prefix: str, count: int, present: set[int]) -> str:
    n_missing = count - len(present)
    listed: list[int] = []
    for number in range(1, count + 1):
        if len(listed) == _LISTED:
            break
        if number not in present:
            listed.append(number)
    names = [f"{printable(prefix)}-{number:05}-of-{count:05}.gguf" for number in listed]
    if n_missing == 1:
        return f"part {listed[0]} of {count} is missing: {names[0]}"
    more = f" and {n_missing - len(listed)} more" if n_missing > len(listed) else ""
    return f"{n_missing} of {count} parts are missing: {', '.join(names)}{more}"
