"""A memory cgroup of its own for a test: what runs in it meets a limit of the real kernel, and nobody else does."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from llamavisor.gauge.cgroup import Membership, find_cgroup

NOT_HERE = "no memory cgroup can be made here"
"""Why a test is skipped where it needs one: the only skip that CI lets pass."""
_EMPTY_S = 5.0
"""How long the kernel may take to let go of processes that were killed."""
_numbers = itertools.count()


class MemoryGroup:
    """A context manager that makes it, within the one in which the tests run, and in the end removes it with all in it.

    Args:
        limit_bytes: how much there is for all who are in it together, without swap.

    Raises:
        OSError: when entered; this process may not make one.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._folder: Path | None = None

    def __repr__(self) -> str:
        return f"<MemoryGroup {self._folder}>"

    def __enter__(self) -> Self:
        ours = find_cgroup(Path("/"))
        if ours is None:
            raise OSError("there are no memory cgroups")
        folder = _parent(ours) / f"llamavisor-test-{os.getpid()}-{next(_numbers)}"
        folder.mkdir()
        self._folder = folder
        limit, swap = (
            ("memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", self.limit_bytes))
            if ours.version == 1
            else ("memory.max", ("memory.swap.max", 0))
        )
        try:
            (folder / limit).write_text(str(self.limit_bytes))
            with suppress(FileNotFoundError):  # a kernel that does not count swap
                (folder / swap[0]).write_text(str(swap[1]))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    @property
    def folder(self) -> Path:
        """Where its files are."""
        assert self._folder is not None, "not entered"
        return self._folder

    @property
    def launcher(self) -> list[str]:
        """What runs before a program, so that it and all that it starts are in the group."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder)]

    def executable(self, path: Path, program: str | os.PathLike[str]) -> Path:
        """Make an executable at `path` that becomes `program` within the group."""
        words = shlex.join([*self.launcher, os.fspath(program)])
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
        return path

    def root(self, folder: Path) -> Path:
        """Make `folder` a root of the file system under which a process outside of the group sees what one in it does.

        Of /proc it has the numbers of the machine and of the group, and no processes.
        """
        (folder / "proc/self").mkdir(parents=True)
        (folder / "sys").symlink_to("/sys")
        for name in ("meminfo", "pressure"):
            (folder / "proc" / name).symlink_to(f"/proc/{name}")
        for name in ("cgroup", "mountinfo"):
            told = subprocess.run([*self.launcher, "cat", f"/proc/self/{name}"], check=True, capture_output=True)
            (folder / "proc/self" / name).write_bytes(told.stdout)
        return folder

    def _remove(self) -> None:
        """Kill whatever is in it, and remove it; the kernel takes its time for both."""
        deadline = time.monotonic() + _EMPTY_S
        while True:
            for pid in map(int, (self.folder / "cgroup.procs").read_text().split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                self.folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return


def _parent(ours: Membership) -> Path:
    """The nearest cgroup in which others can be made that count memory, and that is within the limits of ours."""
    if ours.version == 1:
        return ours.folder
    for folder in ours.levels():  # in version 2 those with processes of their own cannot have any
        with suppress(OSError):
            if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                return folder
    raise OSError("no cgroup here may have others in it that count memory")
