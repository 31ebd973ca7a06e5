"""Sockets that the service manager has listened on before the daemon began: systemd's protocol, see sd_listen_fds(3).

Whoever connects while no daemon runs waits in their queues, and is served by the next one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from ipaddress import ip_address

from llamavisor.errors import LlamavisorError
from llamavisord.variables import Variable

FIRST_FD = 3
"""Where they begin: SD_LISTEN_FDS_START."""
SOURCE = "the socket unit of systemd"
"""Where their addresses are written, for people."""


class ActivationError(LlamavisorError):
    """Raised when what the service manager hands over is of no use."""

    code = "activation"


@dataclass(frozen=True, slots=True)
class Activation:
    """The sockets that were handed over; by default none.

    What a socket is for follows from its kind: the Unix socket takes commands, those of TCP are the gateway's.

    Attributes:
        control: the control socket.
        gateway: where clients come in; who is reached from elsewhere stands first.
    """

    control: socket.socket | None = None
    gateway: tuple[socket.socket, ...] = ()

    @property
    def path(self) -> str | None:
        """Where the control socket is."""
        return None if self.control is None else str(self.control.getsockname())

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of the gateway: of several the one that most can reach, which is what has to be allowed."""
        return self.gateway[0].getsockname()[:2] if self.gateway else None


def take(environ: MutableMapping[str, str]) -> Activation:
    """The sockets that are meant for this process; they are asked for once.

    Args:
        environ: tells how many there are. That is taken out: it is meant for none that this process starts.

    Raises:
        ActivationError: something else is handed over, or more than there is use for.
    """
    count, pid = environ.pop(Variable.LISTEN_FDS, ""), environ.pop(Variable.LISTEN_PID, "")
    environ.pop(Variable.LISTEN_FDNAMES, None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return Activation()
    handed = [_adopt(fd) for fd in range(FIRST_FD, FIRST_FD + int(count))]
    control = [each for each in handed if each.family == socket.AF_UNIX]
    gateway = [each for each in handed if each.family in {socket.AF_INET, socket.AF_INET6}]
    if len(control) > 1:
        raise ActivationError(
            f"{SOURCE} has {len(control)} Unix sockets; one ListenStream= takes commands, remove others"
        )
    return Activation(control[0] if control else None, tuple(sorted(gateway, key=_is_local)))


def _adopt(fd: int) -> socket.socket:
    """The socket behind a descriptor; nothing that is started from here gets it."""
    try:
        os.set_inheritable(fd, False)
        adopted = socket.socket(fileno=fd)
        listens = adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ActivationError(f"descriptor {fd} of {SOURCE} is no socket: {error.strerror}") from error
    families = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}
    if not listens or adopted.type != socket.SOCK_STREAM or adopted.family not in families:
        raise ActivationError(f"descriptor {fd} of {SOURCE} takes no connections; use ListenStream= and Accept=no")
    adopted.setblocking(False)
    return adopted


def _is_local(listener: socket.socket) -> bool:
    return ip_address(listener.getsockname()[0]).is_loopback
