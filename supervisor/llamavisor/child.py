"""The child process that serves one model: a descendant of its router, known by `--port` and `--alias`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import anyio

from llamavisor import procfs


@dataclass(frozen=True, slots=True)
class Child:
    """A running child of a router.

    Attributes:
        identity: which process it is.
        port: where it listens on 127.0.0.1, None if its command line does not say.
    """

    identity: procfs.Identity
    port: int | None

    @property
    def pid(self) -> int:
        """The process id."""
        return self.identity.pid

    async def wait(self) -> None:
        """Wait until the process has ended, seen by the kernel within milliseconds.

        We are not its parent: how it ended is not ours to know.
        """
        try:
            pidfd = os.pidfd_open(self.identity.pid)
        except ProcessLookupError:
            return
        try:
            known = procfs.stat(self.identity.pid)  # None if it has gone, or if there is no descriptor to look with
            if known is None or known.start_ticks == self.identity.start_ticks:
                await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)


def find(router_pid: int, model: str) -> Child | None:
    """The child of the router that serves `model`, None when there is none (yet). Blocks for a few milliseconds.

    The router puts `--alias NAME` and `--port N` onto every child's command line; the last one counts.
    """
    for pid in procfs.descendants(router_pid):
        identity = procfs.identify(pid)
        arguments = procfs.command_line(pid)
        if identity is not None and procfs.option_value(arguments, "--alias") == model:
            port = procfs.option_value(arguments, "--port")
            return Child(identity, int(port) if port and port.isdigit() else None)
    return None
