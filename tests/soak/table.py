"""What became of all faults, as a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from fault import Fault, Record
from traffic import Tally

HEAD = (
    "fault",
    "injected",
    "overtaken",
    "detected, median s",
    "worst s",
    "recovered, median s",
    "worst s",
    "requests lost",
)


def lines(kinds: Iterable[type[Fault]], records: Sequence[Record], tally: Tally) -> list[str]:
    """A table in GitHub's Markdown: one row for each kind, and one for clients that leave; times in seconds."""
    rows: list[Sequence[str]] = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)]]
    for kind in kinds:
        mine = [record for record in records if record.label == kind.label]
        rows.append(
            [
                kind.label,
                str(len(mine)),
                str(sum(record.was_overtaken for record in mine)),
                *_times(record.detected_s for record in mine),
                *_times(record.recovered_s for record in mine),
                str(sum(len(record.lost) for record in mine)),
            ]
        )
    rows.append(["a client leaves", str(tally.left), *["-"] * (len(HEAD) - 2)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _times(found: Iterable[float | None]) -> tuple[str, str]:
    """The median and the worst."""
    known = [each for each in found if each is not None]
    return (f"{statistics.median(known):.3f}", f"{max(known):.3f}") if known else ("-", "-")
