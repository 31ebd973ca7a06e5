"""TCP ports of this machine: whether one can be listened on, and who does."""

from __future__ import annotations

import errno
import socket
from contextlib import closing
from typing import Any

import psutil

from llamavisor.cause import Cause, Verdict
from llamavisor.shortage import SHORTAGE_HINT, is_shortage


def find_port(host: str, port: int) -> int | Verdict:
    """The port to listen on, or what keeps us from it, seen by binding it for a moment as llama-server will.

    Args:
        host: the address.
        port: the port; 0 for any that is free.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        if is_shortage(error):
            return Verdict(Cause.SPAWN, f"cannot look at port {port}: {error.strerror}", SHORTAGE_HINT)
        if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
            why = error.strerror if isinstance(error, OSError) else error
            hint = "correct `host`; a port below 1024 needs the right to bind it"
            return Verdict(Cause.PORT_TAKEN, f"cannot listen on {host}:{port}: {why}", hint, is_obstacle=True)
        holder = holder_of(port)
        reason = f"port {port} on {host} is taken" + (f" by {holder}" if holder else "")
        hint = "choose another port, or end what holds it"
        return Verdict(Cause.PORT_TAKEN, reason, hint, is_obstacle=True)


def holder_of(port: int) -> str | None:
    """Who listens on the port, as `name (pid N)`, None when it cannot be seen (another user's process)."""
    pid = listener_of(port)
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})" if pid is not None else None
    except (psutil.Error, OSError):
        return None


def listener_of(port: int) -> int | None:
    """The process that listens on the port, None when it cannot be seen."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return None
    return next((each.pid for each in connections if _listens_on(each, port) and each.pid), None)


def is_listener(pid: int, port: int) -> bool:
    """Whether the process of that pid listens on the port."""
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.AccessDenied:  # a hardened system hides descriptors even of our own child: believe the answer
        return True
    except (psutil.Error, OSError):  # OSError: no descriptor to look with
        return False
    return any(_listens_on(connection, port) for connection in connections)


def _listens_on(connection: Any, port: int) -> bool:
    return connection.status == psutil.CONN_LISTEN and bool(connection.laddr) and connection.laddr.port == port
