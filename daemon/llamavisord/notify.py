"""Tells the service manager how the daemon is doing: systemd's protocol of datagrams, see sd_notify(3)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress

from llamavisord.plain import plain
from llamavisord.variables import Variable


class Notifier:
    """Tells it, if there is one; nothing is done otherwise.

    Nobody waits for the service manager: a message that it does not take at once is lost, and it may have gone.

    Args:
        environ: says where it listens, and whether it has a watchdog. That is taken out: it is meant for this process
            and for none that it starts.

    Attributes:
        watchdog_s: it ends this process if it hears no `alive` for so long; None without a watchdog.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = _address(environ.pop(Variable.NOTIFY_SOCKET, ""))
        period_us, pid = environ.pop(Variable.WATCHDOG_USEC, ""), environ.pop(Variable.WATCHDOG_PID, "")
        is_meant = self._address is not None and pid in {"", str(os.getpid())}
        self.watchdog_s = int(period_us) / 1e6 if is_meant and period_us.isdecimal() and int(period_us) else None

    def __repr__(self) -> str:
        return f"<Notifier {self._address or 'of nobody'}>"

    def __bool__(self) -> bool:
        """Whether somebody is told."""
        return self._address is not None

    def ready(self) -> None:
        """The daemon is up."""
        self._tell("READY=1")

    def status(self, text: str) -> None:
        """What people are to read in `systemctl status`, in one line."""
        self._tell(f"STATUS={plain(text)}")

    def alive(self) -> None:
        """The watchdog may wait again."""
        self._tell("WATCHDOG=1")

    def stopping(self, within_s: float) -> None:
        """The daemon ends, which may take so long."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """The configuration is read again within this block."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self.ready()

    def _tell(self, *assignments: str) -> None:
        if self._address is None:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(assignments).encode("utf-8", "backslashreplace"), self._address)


def _address(text: str) -> str | None:
    """The address of a socket: a path, or a name that begins with "@". Others, such as "vsock:", are not for us."""
    if text.startswith("@"):
        return f"\0{text[1:]}"
    return text if text.startswith("/") else None
