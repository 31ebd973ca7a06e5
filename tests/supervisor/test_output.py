"""A router's log file: bounded on disk, readable from its end, followable, never a reason to wait."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Self

import anyio
import pytest

from fakes.waiting import PATIENCE_S
from llamavisor.output import LINE_BYTES, OutputFile

pytestmark = pytest.mark.anyio


@pytest.fixture
def output(tmp_path: Path) -> OutputFile:
    """A small log file."""
    return OutputFile(tmp_path / "main.log", cap_bytes=1000, kept=2)


class Writer:
    """Writes as llama-server does: through a descriptor that it opened once, for appending."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def line(self, text: str) -> None:
        """One line."""
        self.file.write(text.encode() + b"\n")


async def next_line(lines: AsyncIterator[str]) -> str:
    """The next line, soon."""
    with anyio.fail_after(PATIENCE_S):
        return await anext(lines)


async def test_rotation_does_not_disturb_the_writer(output: OutputFile) -> None:
    """The writer's old descriptor goes on writing into the new file, and old content is in the youngest predecessor."""
    with Writer(output.path) as writer:
        writer.line("x" * 1000)
        assert await output.rotate() == 1001
        writer.line("after")
    assert output.path.read_text() == "after\n"
    assert output.path.with_name("main.log.1").read_text() == "x" * 999 + "\n"


async def test_small_file_is_left_alone(output: OutputFile) -> None:
    """A file within its cap is not rotated, and one that is not there is no error."""
    assert await output.rotate() == 0
    output.path.write_text("small\n")
    assert await output.rotate() == 0
    assert output.path.read_text() == "small\n"


async def test_disk_use_is_bounded(output: OutputFile) -> None:
    """However much is written, at most the cap is kept of each file, and at most two predecessors."""
    with Writer(output.path) as writer:
        for number in range(5):
            writer.line(str(number) * 50_000)
            await output.rotate()
    files = sorted(output.path.parent.iterdir())
    assert [file.name for file in files] == ["main.log", "main.log.1", "main.log.2"]
    assert [file.stat().st_size for file in files] == [0, 1000, 1000]
    assert files[1].read_text().strip("\n") == "4" * 999
    assert files[2].read_text().strip("\n") == "3" * 999


async def test_full_disk_does_not_stop_the_truncation(output: OutputFile) -> None:
    """When the copy fails, the error is told and the file is truncated all the same: its size stays bounded."""
    output.path.write_text("x" * 2000)
    output.path.with_name("main.log.1").mkdir()
    output.path.with_name("main.log.2").mkdir()
    (output.path.with_name("main.log.2") / "full").mkdir()
    with pytest.raises(OSError, match=r"main\.log"):
        await output.rotate()
    assert output.size() == 0


def test_tail(output: OutputFile) -> None:
    """The last lines are found from the end, and only those after a mark if one is given."""
    output.path.write_text("".join(f"line {number}\n" for number in range(10)))
    assert output.tail(2) == ["line 8", "line 9"]
    assert output.tail(100, since=len("line 0\n") * 8) == ["line 8", "line 9"]
    assert output.tail(0) == []


def test_tail_of_a_giant_line_is_bounded(output: OutputFile) -> None:
    """H6: ten megabytes without a newline cost neither memory nor an error."""
    output.path.write_bytes(b"x" * 10_000_000 + b"\nend")
    assert output.tail(5) == ["end"]
    for size in (60_000, 10_000_000):
        output.path.write_bytes(b"x" * size)
        assert [len(line) for line in output.tail(5)] == [LINE_BYTES]


async def test_tail_after_a_mark_that_was_rotated_away(output: OutputFile) -> None:
    """A mark from before a rotation hides nothing that was written after it."""
    with Writer(output.path) as writer:
        writer.line("x" * 2000)
        mark = output.size()
        await output.rotate()
        writer.line("the reason")
        assert output.tail(5, since=mark) == ["the reason"]


def test_tail_of_what_is_not_there(output: OutputFile) -> None:
    """A file that is not there has no lines, and bytes that are not UTF-8 are shown as such."""
    assert output.tail(5) == []
    output.path.write_bytes(b"\xff\xfe\n")
    assert output.tail(5) == ["\ufffd\ufffd"]


async def test_follow_through_a_rotation(output: OutputFile) -> None:
    """A follower sees what is written from now on, in whole lines, and goes on after a rotation."""
    with Writer(output.path) as writer:
        writer.line("before")
        async with aclosing(output.follow()) as lines:
            async with anyio.create_task_group() as group:

                async def write() -> None:
                    await anyio.wait_all_tasks_blocked()
                    os.write(writer.file.fileno(), b"half ")
                    writer.line("a line")

                group.start_soon(write)
                assert await next_line(lines) == "half a line"
            writer.line("y" * 2000)
            assert await next_line(lines) == "y" * 2000
            await output.rotate()
            writer.line("new file")
            assert await next_line(lines) == "new file"


async def test_follow_cuts_giant_lines(output: OutputFile) -> None:
    """A line without an end is passed on in pieces instead of growing in memory."""
    with Writer(output.path) as writer:
        async with aclosing(output.follow()) as lines, anyio.create_task_group() as group:

            async def write() -> None:
                await anyio.wait_all_tasks_blocked()
                os.write(writer.file.fileno(), b"z" * (3 * LINE_BYTES))

            group.start_soon(write)
            assert [len(await next_line(lines)) for _ in range(3)] == [LINE_BYTES] * 3
