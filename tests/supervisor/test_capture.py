"""Running a short-lived program within bounds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamavisor.capture import capture
from llamavisor.errors import BinaryError

_LONG_S = 1000
"""How long the programs here would run if nobody ended them."""


@pytest.fixture
def quickly() -> Iterator[None]:
    """The test ends long before any of its programs would."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 20


def test_both_streams_and_the_status_are_kept() -> None:
    """Output, messages and exit status come back, each where it belongs; the environment is the one given."""
    answer = capture(("/bin/sh", "-c", 'echo "out $X"; echo err >&2; exit 3'), {"X": "ray"}, timeout_s=20)
    assert (answer.returncode, answer.stdout, answer.stderr) == (3, "out ray\n", "err\n")


def test_a_signal_is_a_negative_status() -> None:
    """A program that was killed is told from one that failed."""
    assert capture(("/bin/sh", "-c", "kill -SEGV $$"), {}, timeout_s=20).returncode == -11


def test_bytes_that_are_no_text_do_not_matter() -> None:
    """Output that is not UTF-8 is shown with replacement characters."""
    assert capture(("/bin/sh", "-c", r"printf 'a\377b'"), {}, timeout_s=20).stdout == "a\ufffdb"


def test_a_large_output_within_the_limit_is_whole() -> None:
    """More than a pipe holds at once arrives whole, also what is written just before the end."""
    command = ("/bin/sh", "-c", "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2")
    answer = capture(command, {"PATH": os.environ["PATH"]}, timeout_s=20)
    assert (len(answer.stdout), len(answer.stderr)) == (300_000, 300_000)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("script", [f"exec sleep {_LONG_S}", f"exec >&- 2>&-; exec sleep {_LONG_S}"])
def test_a_program_that_does_not_end_is_killed(script: str) -> None:
    """The time is kept, whether the program holds its output open or has closed it."""
    with pytest.raises(BinaryError, match=r"did not end within 0\.2 s"):
        capture(("/bin/sh", "-c", script), {"PATH": os.environ["PATH"]}, timeout_s=0.2)


@pytest.mark.usefixtures("quickly")
def test_a_program_that_says_too_much_is_killed() -> None:
    """A flood ends at the limit, not at the memory's."""
    with pytest.raises(BinaryError, match="printed more than 100000 bytes"):
        capture(("/bin/sh", "-c", "exec yes"), {"PATH": os.environ["PATH"]}, timeout_s=20, limit_bytes=100_000)


@pytest.mark.usefixtures("quickly")
def test_what_a_program_leaves_running_is_neither_waited_for_nor_left(tmp_path: Path) -> None:
    """A helper in the background that holds the output open does not delay the answer, and is gone afterwards."""
    script = f"sleep {_LONG_S} & echo $! >{tmp_path}/pid; echo done"
    answer = capture(("/bin/sh", "-c", script), {"PATH": os.environ["PATH"]}, timeout_s=20)
    assert answer.stdout == "done\n"
    helper = int((tmp_path / "pid").read_text(encoding="ascii"))
    _, status = os.waitpid(helper, 0)  # an orphan comes to the test process, see conftest
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_input_is_empty() -> None:
    """A program that asks something gets the end of the input at once."""
    assert capture(("/bin/sh", "-c", "cat; echo end"), {"PATH": os.environ["PATH"]}, timeout_s=20).stdout == "end\n"


def test_a_program_that_cannot_be_started_raises_the_systems_error(tmp_path: Path) -> None:
    """What execve(2) says comes through, for the caller to explain."""
    with pytest.raises(FileNotFoundError):
        capture((str(tmp_path / "missing"),), {}, timeout_s=20)
