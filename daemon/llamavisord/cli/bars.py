"""How far several files are at once: on a terminal a bar for each, redrawn in place; elsewhere a line now and then."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from llamavisord.cli.render import NAME_WIDTH, Screen, shortened
from llamavisord.plain import plain
from llamavisord.units import format_duration, format_size

_BAR_WIDTH = 24
_LEAST_NAME = 12
_ROWS = 24
"""Of a terminal that does not tell how high it is."""
_MOVING = frozenset({"receiving", "checking"})


class Bars:
    """The files of one pull as a person watches them.

    Args:
        screen: where to write.
        every_s: without a terminal, seconds between two lines.
    """

    def __init__(self, screen: Screen, *, every_s: float = 10.0) -> None:
        self._screen = screen
        self._every_s = every_s
        self._said = time.monotonic()
        self._drawn = 0  # lines above the cursor that are ours

    def __repr__(self) -> str:
        return f"<Bars, {self._drawn} drawn>"

    def show(self, pull: dict[str, Any]) -> None:
        """This is how far it is, as the control API shows it."""
        if self._screen.is_terminal:
            self._draw([_line(file, *shape) for file, shape in self._shaped(pull)])
        elif time.monotonic() - self._said >= self._every_s:
            self._said = time.monotonic()
            self._screen.line(f"{plain(pull['model'])}: {_numbers(pull)}")

    def close(self) -> None:
        """What is drawn stays."""
        self._drawn = 0

    def _shaped(self, pull: dict[str, Any]) -> list[tuple[dict[str, Any], tuple[int, int]]]:
        """The files to be shown, each with the columns of its name and of its bar: all, or those that move."""
        files, room = list(pull["files"]), _rows() - 2
        if len(files) > room:
            files = [file for file in files if file["stage"] in _MOVING][:room]
        if len(pull["files"]) > 1:
            files.append({**pull, "name": f"all {len(pull['files'])} files", "stage": "receiving", "trouble": None})
        longest = max(len(plain(file["name"])) for file in files)
        name = max(_LEAST_NAME, min(longest, NAME_WIDTH, self._screen.width - _BAR_WIDTH - 48))
        return [(file, (name, _BAR_WIDTH if self._screen.width > name + _BAR_WIDTH + 40 else 0)) for file in files]

    def _draw(self, lines: Sequence[str]) -> None:
        width = self._screen.width - 1  # a line that wraps would be two, and the next drawing one too low
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        text = "".join(f"\r\x1b[K{line[:width]}\n" for line in lines)
        self._screen.draw(f"{up}{text}\x1b[J")
        self._drawn = len(lines)


def _line(file: dict[str, Any], name_width: int, bar_width: int) -> str:
    name = shortened(plain(file["name"]), name_width).ljust(name_width)
    if not bar_width:
        return f"{name} {_numbers(file)}"
    filled = int(bar_width * _share(file))
    return f"{name} [{'#' * filled}{'.' * (bar_width - filled)}] {_numbers(file)}"


def _share(file: dict[str, Any]) -> float:
    return min(1.0, file["done_bytes"] / file["size_bytes"]) if file["size_bytes"] else 1.0


def _numbers(file: dict[str, Any]) -> str:
    """Share, size, speed and time left; or what it waits for."""
    told = [f"{_share(file):4.0%}", f"of {format_size(file['size_bytes']):<10}"]
    stage = file.get("stage")
    if file.get("trouble"):
        told.append(f"tried again soon: {plain(file['trouble'])}")
    elif stage in {"waiting", "checking", "done"}:
        told.append(stage)
    else:
        told.append(f"{format_size(int(file['speed_bytes_per_s'])):>10}/s")
        if file["left_s"] is not None:
            told.append(f"{format_duration(file['left_s'])} left")
    return "  ".join(told)


def _rows() -> int:
    try:
        return os.get_terminal_size(2).lines or _ROWS
    except OSError:
        return _ROWS
