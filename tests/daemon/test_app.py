"""The end of the daemon's process."""

from __future__ import annotations

import subprocess
import sys


def test_a_hung_thread_does_not_keep_the_process() -> None:
    """F14: a thread that waits for a dead mount for ever does not keep the daemon from ending with its exit code."""
    code = (
        "import threading; from llamavisord.app import leave_hung_threads\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "leave_hung_threads(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 3
