"""The bars of a pull as a terminal of any size gets them, and the lines that others get."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest

from llamavisord.cli.bars import Bars
from llamavisord.cli.render import Screen


class Tty(io.StringIO):
    """A terminal that keeps what it is sent."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def file(name: str, done: int, stage: str = "receiving", **more: object) -> dict[str, Any]:
    """A file of a thousand bytes as the control API shows it."""
    speed = {"speed_bytes_per_s": 100.0, "left_s": (1000 - done) / 100, "silent_s": 0.0, "trouble": None}
    return {"name": name, "stage": stage, "size_bytes": 1000, "done_bytes": done, **speed, **more}


def pull(*files: dict[str, Any]) -> dict[str, Any]:
    """A pull of these files."""
    done = sum(each["done_bytes"] for each in files)
    whole = {"size_bytes": 1000 * len(files), "done_bytes": done, "speed_bytes_per_s": 200.0, "left_s": 7.0}
    return {"model": "M", "state": "under_way", "files": list(files), "silent_s": 0.0, **whole}


def drawn(*shown: dict[str, Any], columns: int = 120, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each drawing, without the command that clears a line."""
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Tty()
    bars = Bars(Screen(terminal))
    for each in shown:
        bars.show(each)
    return terminal.getvalue().replace("\r\x1b[K", "").split("\x1b[J")[:-1]


def test_one_file_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its share, size, speed and time left; the next drawing begins on the same line."""
    first, second = drawn(pull(file("M.gguf", 0)), pull(file("M.gguf", 500)), monkeypatch=monkeypatch)
    assert first == "M.gguf       [........................]   0%  of 1000 B           100 B/s  10s left\n"
    assert second == "\x1b[1AM.gguf       [############............]  50%  of 1000 B           100 B/s  5.0s left\n"


def test_more_files_than_rows_are_those_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one line for all; what was drawn beyond that is cleared."""
    files = [file(f"M-{number:05}.gguf", 1000, "done") for number in range(50)]
    files += [file("M-00050.gguf", 10), file("M-00051.gguf", 0, "waiting")]
    (lines,) = drawn(pull(*files), monkeypatch=monkeypatch)
    assert [line.split()[0] for line in lines.splitlines()] == ["M-00050.gguf", "all"]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_terminal_without_room_gets_one_line(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The only file, even while it waits, or the line for all of them; more would scroll away at each drawing."""
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((120, rows)))
    alone, several = (
        file("M.gguf", 0, "waiting"),
        [file("A.gguf", 10), file("B.gguf", 10), file("C.gguf", 0, "waiting")],
    )
    drawings = drawn(pull(alone), pull({**alone, "stage": "receiving"}), monkeypatch=monkeypatch)
    drawings += drawn(pull(*several), monkeypatch=monkeypatch)
    shown = [line.removeprefix("\x1b[1A").split()[0] for each in drawings for line in each.splitlines()]
    assert shown == ["M.gguf", "M.gguf", "all"]


def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take two rows, and the next drawing would stand one too low."""
    wide = file("name-" * 40, 500, trouble="the connection was cut " * 10)
    for columns in (20, 40, 80, 200):
        (lines,) = drawn(pull(wide, file("\x1b[31mred", 1)), columns=columns, monkeypatch=monkeypatch)
        assert all(len(line) < columns for line in lines.splitlines())
        assert "\x1b" not in lines


def test_of_a_pull_that_only_the_disk_knows_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far it is nobody can tell; neither a terminal nor a pipe is told anything."""
    left = {**pull(), "state": "left", "done_bytes": None}
    assert drawn(left, monkeypatch=monkeypatch) == []
    stream = io.StringIO()
    Bars(Screen(stream), every_s=0.0).show(left)
    assert not stream.getvalue()


def test_elsewhere_it_is_a_line_now_and_then() -> None:
    """Nothing that moves a cursor."""
    stream = io.StringIO()
    bars = Bars(Screen(stream), every_s=0.0)
    bars.show(pull(file("M.gguf", 250)))
    assert stream.getvalue() == "M:  25%  of 1000 B           200 B/s  7.0s left\n"
    Bars(Screen(stream)).show(pull(file("M.gguf", 250)))
    assert stream.getvalue().count("\n") == 1
