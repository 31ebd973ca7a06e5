"""How things look on a terminal: tables, colours, and nothing that a name could do to the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from llamavisor.units import format_duration
from llamavisord.plain import plain, tame
from llamavisord.variables import Variable

_COLOURS: Mapping[str, str] = {"green": "32", "yellow": "33", "red": "31", "dim": "2", "bold": "1"}
_STATE_COLOURS: Mapping[str, str] = {
    "ready": "green",
    "loaded": "green",
    "sleeping": "green",
    "starting": "yellow",
    "loading": "yellow",
    "stopping": "yellow",
    "unloading": "yellow",
    "draining": "yellow",
    "downloading": "yellow",
    "degraded": "yellow",
    "backoff": "red",
    "failed": "red",
    "stopped": "dim",
    "unloaded": "dim",
    "settling": "yellow",
    "incomplete": "red",
    "invalid": "red",
    "withheld": "red",
    "gone": "dim",
}
NAME_WIDTH = 48
"""Columns of a model's name on a terminal; of a longer one the middle is left out."""
BAR_WIDTH = 24
SAY_EVERY_S = 10.0
"""Between two lines about the same, where nothing can be drawn over the last one."""
_GAP = "  "
_WIDTH = 100
"""Of a terminal that does not tell how wide it is."""
_NARROWEST = 12
"""A last column is not cut shorter than this."""


class Screen:
    """Standard output, or something like it, with colours if they are wanted.

    Args:
        stream: where to write; None is standard output.
        environ: NO_COLOR (no-color.org) and TERM=dumb turn colours off.
    """

    def __init__(self, stream: TextIO | None = None, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._stream = stream or sys.stdout
        self.is_terminal = self._stream is not None and self._stream.isatty()  # None: it was closed
        self._has_colours = (
            self.is_terminal and not environ.get(Variable.NO_COLOR) and environ.get(Variable.TERM) != "dumb"
        )

    def paint(self, text: str, colour: str) -> str:
        """`text` in that colour, unchanged where there are none."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self._has_colours and colour else text

    def line(self, text: str = "") -> None:
        """Write a line."""
        print(text, file=self._stream)

    def raw(self, text: str) -> None:
        """Write text that is not to be read by people but by programs, as it is; on a terminal escaped all the same."""
        print(plain(text, keep="\n\t") if self.is_terminal else text, end="", file=self._stream)

    def prose(self, text: str, colour: str = "") -> None:
        """Write what a model says, at once: on a terminal it commands nothing, elsewhere it is as it is."""
        print(self.paint(tame(text), colour) if self.is_terminal else text, end="", file=self._stream, flush=True)

    def flush(self) -> None:
        """Have everything seen that was written."""
        if self._stream is not None:
            self._stream.flush()

    def rewrite(self, text: str) -> None:
        """Put `text` in the place of the line that the cursor is on."""
        print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)

    def draw(self, text: str) -> None:
        """Write what moves the cursor, at once; only to a terminal."""
        print(text, end="", file=self._stream, flush=True)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        if (told := os.environ.get(Variable.COLUMNS, "")).isdecimal():
            return int(told) or _WIDTH
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _WIDTH
        except (OSError, ValueError, AttributeError):
            return _WIDTH

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], *, cuts_last: bool = False) -> None:
        """Write a table. A cell that is the name of a state has its colour; control characters are escaped.

        Args:
            headers: one for each column.
            rows: one cell for each column.
            cuts_last: whether the last column is cut on a terminal that is too narrow for it.
        """
        cells = [[plain(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        if cuts_last and self.is_terminal:
            room = max(self.width - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1), _NARROWEST)
            cells = [[*row[:-1], _cut(row[-1], room)] for row in cells]
            widths[-1] = min(widths[-1], room)
        self.line(self.paint(_row(headers, widths), "bold"))
        for row in cells:
            painted = [self.paint(cell, _STATE_COLOURS.get(cell, "")) for cell in row]
            # Colours have no width on the screen.
            extra = [width + len(full) - len(cell) for width, full, cell in zip(widths, painted, row, strict=True)]
            self.line(_row(painted, extra))

    def json(self, document: object, *, on_one_line: bool = False) -> None:
        """Write JSON: indented, or as one line of many."""
        self.line(json.dumps(document, indent=None if on_one_line else 2))


def bar(share: float) -> str:
    """What is done of the whole, 0 to 1; it is full when all is."""
    filled = int(BAR_WIDTH * min(max(share, 0.0), 1.0))
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"


class Seldom:
    """When there is something to say again.

    Args:
        every_s: seconds between two times; the first is so long after the beginning.
    """

    def __init__(self, every_s: float = SAY_EVERY_S) -> None:
        self._every_s = every_s
        self._said = time.monotonic()

    def __repr__(self) -> str:
        return f"<Seldom, every {self._every_s:g} s>"

    def is_due(self) -> bool:
        """Whether it is time; then it is said now."""
        now = time.monotonic()
        if now - self._said < self._every_s:
            return False
        self._said = now
        return True


class Progress:
    """How far something has come, on standard error: one line that is rewritten, or, without a terminal, few lines.

    Args:
        what: what is under way, such as "loading alpha".
        screen: where to write.
        every_s: without a terminal, seconds between two lines.
    """

    def __init__(self, what: str, screen: Screen, *, every_s: float = SAY_EVERY_S) -> None:
        self._what = plain(what)
        self._screen = screen
        self._seldom = Seldom(every_s)
        self._began = time.monotonic()

    def show(self, fraction: float | None, stage: str) -> None:
        """It has come to `fraction`, 0 to 1 or unknown, of `stage`."""
        percent = "" if fraction is None else f" {fraction:.0%}"
        after = f" {plain(stage)}".rstrip() + f" {format_duration(time.monotonic() - self._began)}"
        if self._screen.is_terminal:
            self._screen.rewrite(f"{self._what} {bar(fraction or 0.0)}{percent}{after}")
        elif self._seldom.is_due():
            self._screen.line(f"{self._what}:{percent}{after}")

    def close(self) -> None:
        """Leave an empty line behind."""
        if self._screen.is_terminal:
            self._screen.rewrite("")


def shortened(text: str, room: int) -> str:
    """`text` in `room` columns: of a longer one the middle is left out, since names differ at both ends."""
    if len(text) <= room:
        return text
    kept = room - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
