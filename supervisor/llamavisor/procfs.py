"""What /proc tells about processes: identity, descent, command line, environment.

A process may end between any two reads, so every reader returns None (or leaves the process out) when it has gone. The
reads are short and never block on a device; walks over many processes belong into a worker thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process a pid means: pids are used again, a pid with its start time and boot is not.

    Attributes:
        pid: process id.
        start_ticks: field 22 of /proc/PID/stat, clock ticks from boot to the start of the process.
        boot_id: /proc/sys/kernel/random/boot_id.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @property
    def is_current(self) -> bool:
        """Whether the pid still means this process."""
        return identify(self.pid) == self


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat that we use; see proc(5)."""

    state: str
    parent: int
    session: int
    major_faults: int
    cpu_ticks: int  # of all its threads, in user mode and in the kernel
    start_ticks: int

    @property
    def is_zombie(self) -> bool:
        """Whether the process has ended and only waits to be reaped."""
        return self.state in "ZX"


@cache
def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def stat(pid: int) -> Stat | None:
    """The state, parent, session and start time of `pid`, None when there is no such process."""
    raw = _read(pid, "stat")
    # The name in parentheses may hold anything, parentheses and newlines too: the fields begin after the last one.
    fields = raw.rpartition(b")")[2].split()
    if len(fields) < 20:
        return None
    return Stat(
        fields[0].decode("ascii"),
        int(fields[1]),
        int(fields[3]),
        int(fields[9]),
        int(fields[11]) + int(fields[12]),
        int(fields[19]),
    )


def moved_bytes(pid: int) -> int:
    """How many bytes `pid` has read and written, without those of sockets; 0 where that cannot be read."""
    moved = 0
    for line in _read(pid, "io").splitlines():
        name, _, count = line.partition(b": ")
        if name in {b"rchar", b"wchar"}:
            moved += int(count)
    return moved


def wait_status(pid: int, start_ticks: int) -> int | None:
    """How a process has ended that nobody has reaped yet, as wait(2) tells it; None for any other.

    Field 52 of /proc/PID/stat, for processes of our own user; see proc(5).
    """
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    is_its_own = len(fields) >= 50 and fields[0] == b"Z" and int(fields[19]) == start_ticks
    return int(fields[49]) if is_its_own else None


def identify(pid: int) -> Identity | None:
    """The identity of `pid`, None when there is no such process."""
    known = stat(pid)
    return None if known is None else Identity(pid, known.start_ticks, boot_id())


def command_line(pid: int) -> list[str]:
    """The arguments of `pid`, empty for a zombie or a process that has gone."""
    raw = _read(pid, "cmdline")
    return [os.fsdecode(piece) for piece in raw.removesuffix(b"\0").split(b"\0")] if raw else []


def has_environment(pid: int, marker: str) -> bool:
    """Whether the environment that `pid` was started with holds the entry `marker`, written NAME=VALUE.

    False where it cannot be read: a process of another user is never ours.
    """
    return os.fsencode(marker) in _read(pid, "environ").split(b"\0")


def children(pid: int) -> list[int]:
    """The direct children of `pid`, whichever of its threads started them."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        found += [int(child) for child in _read(pid, f"task/{thread}/children").split()]
    return found


def descendants(pid: int) -> list[int]:
    """The children of `pid`, their children, and so on, parents before their children; zombies are included."""
    found: list[int] = []
    seen = {pid}
    queue = [pid]
    while queue:
        for child in children(queue.pop()):
            if child not in seen:
                seen.add(child)
                found.append(child)
                queue.append(child)
    return found


def all_pids() -> list[int]:
    """Every process that this /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def option_value(arguments: list[str], option: str) -> str | None:
    """The value after the last `option` among `arguments`, None when it is not there."""
    for at in range(len(arguments) - 2, -1, -1):
        if arguments[at] == option:
            return arguments[at + 1]
    return None


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:  # noqa: PTH123 (a Path costs more than the read)
            return file.read()
    except OSError:
        return b""
