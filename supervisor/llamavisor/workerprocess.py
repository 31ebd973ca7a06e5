"""The daemon's end of a worker process: starts it, talks to it, and gets rid of it without ever waiting for long."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

import anyio

from llamavisor.process import ExitStatus

INHERITED = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE"),
)
"""Of the daemon's environment: what Python needs to find the same modules and to read file names the same way."""
_READ_BYTES = 64 * 1024


def module_argv(module: str, *arguments: str) -> tuple[str, ...]:
    """The command line that runs a module of this program in a Python of its own."""
    return (sys.executable, "-P", "-m", module, *arguments)


class WorkerProcess:
    """A running worker, the leader of a session of its own.

    No `subprocess.Popen`: that complains when it is dropped before its process has ended, and one that hangs in the
    kernel does not end.
    """

    def __init__(self, pid: int, pidfd: int, reading: int, writing: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._reading = reading
        self._writing = writing

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.pid}>"

    @classmethod
    def start(cls, argv: tuple[str, ...], env: Mapping[str, str]) -> Self:
        """Start one with `env` and little else in its environment.

        Called from the main thread: the parent-death signal is bound to the thread that starts it.

        Args:
            argv: its command line, such as `module_argv` gives.
            env: added to what is inherited.

        Raises:
            OSError: it cannot be started.
        """
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        opened: list[int] = []
        try:
            opened += os.pipe2(os.O_CLOEXEC)
            opened += os.pipe2(os.O_CLOEXEC)
            theirs_in, writing, reading, theirs_out = opened
            pid = os.posix_spawn(
                argv[0],
                argv,
                {**inherited, **env},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs_in, 0), (os.POSIX_SPAWN_DUP2, theirs_out, 1)],
                setsid=True,
                setsigdef=[signal.SIGPIPE],
            )
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)  # it has not even begun, so this does not wait for what it is to touch
                raise
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            raise
        os.close(theirs_in)
        os.close(theirs_out)
        # Of the daemon's ends alone: the worker reads and writes as it is used to.
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        return cls(pid, pidfd, reading, writing)

    async def send(self, data: bytes) -> None:
        """Hand over a message, as fast as the worker takes it.

        Raises:
            OSError: the worker has ended.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._writing, view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._writing)

    def send_nowait(self, data: bytes) -> None:
        """Hand over a short message, or not, when the worker has ended or has not read many others."""
        # Invariant: shorter than PIPE_BUF, so that it is written whole or not at all.
        assert len(data) < select.PIPE_BUF  # noqa: S101
        with suppress(OSError):
            os.write(self._writing, data)

    async def receive(self) -> bytes:
        """What the worker says next; nothing when it has ended.

        Raises:
            OSError: it cannot be heard.
        """
        while True:
            await anyio.wait_readable(self._reading)
            with suppress(BlockingIOError):
                return os.read(self._reading, _READ_BYTES)

    def kill(self) -> None:
        """Kill it. One that hangs in the kernel ends when the kernel lets go."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def reap(self) -> str:
        """Wait until it has ended, and free its pid; how it ended, as a person reads it."""
        await anyio.wait_readable(self._pidfd)
        return self._reap()

    def _reap(self) -> str:
        try:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # who reaps the orphans was faster
            return "it ended"
        if info is None:
            return "it has not ended"
        exited = info.si_code == os.CLD_EXITED
        return str(ExitStatus(code=info.si_status) if exited else ExitStatus(signal=info.si_status))

    def close(self) -> None:
        """Let go of it; without its pipes it ends by itself. One that has not ended stays a child of this process."""
        for descriptor in (self._pidfd, self._reading, self._writing):
            os.close(descriptor)
