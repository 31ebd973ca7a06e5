"""The end of the daemon's process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHIN_S = 30
HANGS = "import pathlib, threading, llamavisord.leaving as leaving\nhang = threading.Event().wait\n"


def exit_code_of(code: str) -> int:
    """The exit code of a program that can hang."""
    return subprocess.run([sys.executable, "-c", f"{HANGS}{code}"], check=False, timeout=WITHIN_S).returncode


def test_a_hung_thread_does_not_keep_the_process() -> None:
    """F14: a thread that waits for a dead mount for ever does not keep the daemon from ending with its exit code."""
    assert exit_code_of("threading.Thread(target=hang).start()\nleaving.leave_hung_threads(3)") == 3


def test_a_process_that_hangs_leaves(tmp_path: Path) -> None:
    """A process that hangs ends when its time is over, with its exit code, and has done what comes last."""
    done = tmp_path / "done"
    assert exit_code_of(f"leaving.leave_within(0.1, 3, pathlib.Path({str(done)!r}).touch)\nhang()") == 3
    assert done.exists()


def test_what_comes_last_hangs_as_well() -> None:
    """What would be done last is not waited for."""
    assert exit_code_of("leaving.leave_within(0.1, 3, hang)\nhang()") == 3


def test_the_earliest_of_several_counts() -> None:
    """Of several ends the earliest counts."""
    assert exit_code_of(f"for s in ({WITHIN_S * 2}, 0.1): leaving.leave_within(s, 3 if s < 1 else 4, str)\nhang()") == 3


def test_who_ends_in_time_is_left_alone() -> None:
    """A process that has ended in time has the exit code of its own, and is not held up."""
    assert exit_code_of(f"leaving.leave_within({WITHIN_S * 2}, 3, hang)\nraise SystemExit(5)") == 5
