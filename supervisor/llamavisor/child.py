"""The child process that serves one model: a descendant of its router, known by `--port` and `--alias`."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from contextlib import suppress
from dataclasses import dataclass

import anyio

from llamavisor import procfs
from llamavisor.process import ExitStatus
from llamavisor.vitals import Vitals, read_vitals

# struct pidfd_info of <linux/pidfd.h>: the mask comes first, the wait status at byte 60 of a first version of 64.
_PIDFD_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)
_PIDFD_INFO_EXIT = 1 << 3
_REAPED_WITHIN_S = 0.1
_POLL_S = 0.01


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

    async def wait(self) -> ExitStatus | None:
        """Wait until the process has ended, seen by the kernel within milliseconds.

        We are not its parent, and the router tells 1 for any signal: how it ended is read from the zombie, which stays
        for up to 50 ms, or asked of the pidfd, which knows it later (Linux 6.15 or newer). None if neither tells.
        """
        try:
            pidfd = os.pidfd_open(self.identity.pid)
        except ProcessLookupError:
            return None
        try:
            known = procfs.stat(self.identity.pid)  # None if it has gone, or if there is no descriptor to look with
            if known is not None and known.start_ticks != self.identity.start_ticks:
                return None
            await anyio.wait_readable(pidfd)
            status = procfs.wait_status(self.identity.pid, self.identity.start_ticks)
            with anyio.move_on_after(_REAPED_WITHIN_S):
                while status is None and (status := _told_by(pidfd)) is None:
                    await anyio.sleep(_POLL_S)
        finally:
            os.close(pidfd)
        return None if status is None else ExitStatus.of_wait(status)

    def vitals(self) -> Vitals | None:
        """What the process has done so far, None if it has ended."""
        return read_vitals(self.pid) if self.identity.is_current else None

    def kill(self) -> None:
        """Kill the process, which its router did not; no effect once it has ended."""
        with suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if self.identity.is_current:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
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


def _told_by(pidfd: int) -> int | None:
    """The wait status of a process that was reaped; None while it was not, or if this kernel does not tell."""
    asked = bytearray(struct.pack("=Q56x", _PIDFD_INFO_EXIT))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, asked)
    except OSError:
        return None
    told, status = struct.unpack("=Q52xi", asked)
    return status if told & _PIDFD_INFO_EXIT else None
