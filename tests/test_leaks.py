"""The fixture that guards every test sees what it must see."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fakes.waiting import eventually
from leaks import Snapshot

ORPHANING = "import os, sys\nif os.fork() == 0: os.setsid(); os.execv('/bin/sleep', ['sleep', '60'])\nsys.exit(0)"


def test_nothing_is_nothing() -> None:
    """Without a leak there is none, at once."""
    assert Snapshot.take().leaked() == []


def test_files_and_sockets(tmp_path: Path) -> None:
    """An open file is told with its name, a listening socket with its address."""
    before = Snapshot.take()
    with (tmp_path / "open").open("w"), socket.create_server(("127.0.0.1", 0)) as listener:
        file, line = sorted(before.leaked(within_s=0), key=lambda leak: "listening" in leak)
        assert file.endswith(f"{tmp_path}/open")
        assert line.endswith(f"listening socket {listener.getsockname()}")
    assert before.leaked() == []


def test_threads() -> None:
    """A thread is told with its name."""
    before = Snapshot.take()
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="left behind")
    thread.start()
    assert before.leaked(within_s=0) == ["thread left behind"]
    done.set()
    thread.join()
    assert before.leaked() == []


def test_children_and_orphans() -> None:
    """A process is told with its command line, also one whose parent has left it to us, and ended for the next test."""
    before = Snapshot.take()
    subprocess.run([sys.executable, "-c", ORPHANING], check=True)
    with subprocess.Popen(["/bin/sleep", "61"]):
        # A process that has just been started has no command line for a moment.
        eventually(lambda: {leak.split(maxsplit=2)[2] for leak in before.grown()} == {"sleep 60", "/bin/sleep 61"})
        before.kill_new_children()
    assert before.leaked() == []


def test_what_settles_is_no_leak() -> None:
    """What goes by itself within a moment is waited for."""
    before = Snapshot.take()
    child = subprocess.Popen(["/bin/sleep", "0.2"])
    threading.Thread(target=child.wait).start()
    assert before.leaked() == []


def test_the_fixture_fails_a_leaking_test(tmp_path: Path) -> None:
    """A test that leaves something behind fails, and the message says what."""
    source = (
        "import subprocess\ndef test_leaky():\n    global child\n    child = subprocess.Popen(['/bin/sleep', '62'])\n"
    )
    (tmp_path / "test_leaky.py").write_text(source, encoding="utf-8")
    tests = Path(__file__).parent
    (tmp_path / "conftest.py").write_bytes((tests / "conftest.py").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"pythonpath={tests}", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "left behind:" in done.stdout
    assert "/bin/sleep 62" in done.stdout
