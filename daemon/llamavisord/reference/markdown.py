"""Tables and the like, as Markdown has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_CODE = re.compile(r"(`[^`]*`)")
_SPECIAL = re.compile(r"[\\<*]")


def code(text: object) -> str:
    """What people write or read as it stands; nothing for nothing."""
    return f"`{text}`" if str(text) else ""


def prose(text: str) -> str:
    """Text on one line, in which only what stands between backticks means something to Markdown."""
    pieces = _CODE.split(" ".join(text.split()))
    return "".join(piece if piece.startswith("`") else _SPECIAL.sub(r"\\\g<0>", piece) for piece in pieces)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table and an empty one, if it has rows; a column is left out if no row has anything in it."""
    rows = list(rows)
    if not rows:
        return
    shown = [at for at in range(len(headings)) if any(row[at] for row in rows)]
    for row in (headings, ["---"] * len(headings), *rows):
        cells = [row[at].replace("|", r"\|") for at in shown]
        yield f"| {' | '.join(cells)} |"
    yield ""
