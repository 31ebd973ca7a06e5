"""How far several files are at once: on a terminal a bar for each, redrawn in place; elsewhere a line now and then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llamavisor.units import format_duration, format_size
from llamavisord.cli.render import BAR_WIDTH, NAME_WIDTH, SAY_EVERY_S, Screen, Seldom, bar, shortened
from llamavisord.plain import plain

_LEAST_NAME = 12
_SILENT_S = 5.0
_ROWS = 24
"""Of a terminal that does not tell how high it is."""
_MOVING = frozenset({"receiving", "checking"})


class Bars:
    """The files of one pull as a person watches them.

    Args:
        screen: where to write.
        every_s: without a terminal, seconds between two lines.
    """

    def __init__(self, screen: Screen, *, every_s: float = SAY_EVERY_S) -> None:
        self._screen = screen
        self._seldom = Seldom(every_s)
        self._drawn = 0  # lines above the cursor that are ours

    def __repr__(self) -> str:
        return f"<Bars, {self._drawn} drawn>"

    def show(self, pull: dict[str, Any]) -> None:
        """This is how far it is, as the control API shows it; of a pull that only the disk knows, nothing."""
        if not pull["files"]:
            return
        if self._screen.is_terminal:
            files, width = self._shown(pull)
            has_bars = self._screen.width > width + BAR_WIDTH + 40
            self._draw([_line(file, width, has_bar=has_bars) for file in files])
        elif self._seldom.is_due():
            self._screen.line(f"{plain(pull['model'])}: {_numbers(pull)}")

    def close(self) -> None:
        """What is drawn stays."""
        self._drawn = 0

    def _shown(self, pull: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """The files to be shown, all or those that move, and how many columns their names have; never nothing."""
        files, room = list(pull["files"]), max(0, _rows() - 2)
        if len(files) > 1:
            if len(files) > room:
                files = [file for file in files if file["stage"] in _MOVING][:room]
            files.append({**pull, "name": f"all {len(pull['files'])} files", "stage": "receiving", "trouble": None})
        longest = max(len(plain(file["name"])) for file in files)
        return files, max(_LEAST_NAME, min(longest, NAME_WIDTH, self._screen.width - BAR_WIDTH - 48))

    def _draw(self, lines: Sequence[str]) -> None:
        width = self._screen.width - 1  # a line that wraps would be two, and the next drawing one too low
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        text = "".join(f"\r\x1b[K{line[:width]}\n" for line in lines)
        self._screen.draw(f"{up}{text}\x1b[J")
        self._drawn = len(lines)


def _line(file: dict[str, Any], name_width: int, *, has_bar: bool) -> str:
    name = shortened(plain(file["name"]), name_width).ljust(name_width)
    drawn = f" {bar(_share(file))}" if has_bar else ""
    return f"{name}{drawn} {_numbers(file)}"


def _share(file: dict[str, Any]) -> float:
    return min(1.0, file["done_bytes"] / file["size_bytes"]) if file["size_bytes"] else 1.0


def _numbers(file: dict[str, Any]) -> str:
    """Share, size, speed and time left; or what it waits for."""
    told = [f"{_share(file):4.0%}", f"of {format_size(file['size_bytes']):<10}"]
    stage = file.get("stage")
    if file.get("trouble"):
        told.append(f"{plain(file['trouble'])}; tried again soon")
    elif stage in {"waiting", "checking", "done"}:
        told.append(stage)
    elif file["silent_s"] >= _SILENT_S:
        told.append(f"nothing for {format_duration(file['silent_s'])}; tried again soon")
    else:
        told.append(f"{format_size(int(file['speed_bytes_per_s'])):>10}/s")
        if file["left_s"] is not None:
            told.append(f"{format_duration(file['left_s'])} left")
    if file.get("again"):
        told.append("once more: it had another hash")
    return "  ".join(told)


def _rows() -> int:
    try:
        return os.get_terminal_size(2).lines or _ROWS
    except OSError:
        return _ROWS
