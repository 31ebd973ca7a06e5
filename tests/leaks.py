"""What a test may not leave behind: open files and sockets, threads, and processes."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import stat
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SETTLE_S = 8.0
"""How long after a test its last thread or process may take to go."""
_POLL_S = 0.01
_PR_SET_CHILD_SUBREAPER = 36

_CACHED_THREADS = ("Trio thread",)
"""Names of threads that a library keeps for whoever needs one next; they end by themselves when idle."""


def adopt_orphans() -> None:
    """Have what a leaked process leaves behind handed to this one, where `Snapshot` finds it; see prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this process holds at one moment: descriptors, threads and children, each as a person reads it."""

    descriptors: dict[tuple[int, str], str]
    threads: dict[int, str]
    children: dict[int, str]

    @classmethod
    def take(cls) -> Self:
        """Look now."""
        threads = {id(thread): thread.name for thread in threading.enumerate()}
        return cls(
            descriptors=_descriptors(),
            threads={key: name for key, name in threads.items() if not name.startswith(_CACHED_THREADS)},
            children={pid: _command(pid) for pid in _children()},
        )

    def grown(self) -> list[str]:
        """What is there now and was not then, one line each."""
        now = Snapshot.take()
        return [
            *(f"file {what}" for key, what in now.descriptors.items() if key not in self.descriptors),
            *(f"thread {name}" for key, name in now.threads.items() if key not in self.threads),
            *(f"process {what}" for pid, what in now.children.items() if pid not in self.children),
        ]

    def leaked(self, *, within_s: float = SETTLE_S) -> list[str]:
        """What is still there after some time to settle, one line each; empty is good."""
        deadline = time.monotonic() + within_s
        leaked = self.grown()
        if leaked:
            gc.collect()
        while leaked and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            leaked = self.grown()
        return leaked

    def kill_new_children(self) -> None:
        """End the processes that were not there then, so that the next test does not inherit them."""
        for pid in set(_children()) - set(self.children):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def census() -> Counter[str]:
    """How many objects of our own classes live in this process, and how much their containers hold, by name."""
    gc.collect()
    counted: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if not str(kind.__module__).startswith("llamavisor"):  # that of a class may be anything
            continue
        counted[kind.__qualname__] += 1
        for name in vars(thing) if hasattr(thing, "__dict__") else getattr(kind, "__slots__", ()):
            held = getattr(thing, name, None)
            if isinstance(held, dict | list | set | deque):
                counted[f"{kind.__qualname__}.{name}"] += len(held)
    return counted


def _descriptors() -> dict[tuple[int, str], str]:
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor of the listing itself has gone
            target = str(link.readlink())
            fd = int(link.name)
            found[fd, target] = f"{fd} {_socket(fd) if stat.S_ISSOCK(os.fstat(fd).st_mode) else target}"
    return found


def _socket(fd: int) -> str:
    view = socket.socket(fileno=fd)
    try:
        listens = view.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return f"{'listening' if listens else 'connected'} socket {view.getsockname() or '(unnamed)'}"
    except OSError:
        return "socket"
    finally:
        view.detach()


def _children() -> list[int]:
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        words = ""
    return f"{pid} {words.strip() or '(without a command line: ended and not reaped, or just starting)'}"
