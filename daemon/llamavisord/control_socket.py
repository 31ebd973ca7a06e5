"""The Unix socket that takes commands: claimed safely, and open to the right people alone."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamavisor.errors import LlamavisorError

SOCKET_MODE = 0o660
FOLDER_MODE = 0o750
_SO_PEERGROUPS = 59  # asm-generic/socket.h; the socket module has no name for it
_GETSOCKOPT_BYTES = 1024  # the most that socket.getsockopt takes


class AlreadyRunningError(LlamavisorError):
    """Raised when another daemon holds the lock of the same socket or state folder."""

    code = "already_running"


class SocketPathError(LlamavisorError):
    """Raised when the control socket cannot be where the configuration wants it."""

    code = "socket_unusable"


class Lock:
    """A lock that the kernel releases however its holder ends. Close it to release it.

    Raises:
        AlreadyRunningError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            hint = "use that one, or give this one a --socket and a --state-dir of its own"
            raise AlreadyRunningError(f"already running, pid {holder} (lock {path})", hint=hint) from None
        with suppress(OSError):  # a full disk: the lock holds, whoever it may name
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode("ascii"), 0)

    def __repr__(self) -> str:
        return f"<Lock {self.path}>"

    def close(self) -> None:
        """Release it. The file stays: removing it would let two processes hold two files of one name."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who speaks on a connection, as the kernel says it.

    Attributes:
        pid: process id.
        uid: user id.
        gids: its group and its supplementary groups.
    """

    pid: int
    uid: int
    gids: frozenset[int]


class ControlSocket:
    """The listening socket and its lock. The lock is taken before the socket is touched.

    A second server on the same path would silently take a living socket over: hence the lock.

    Args:
        path: where the socket is; its folder is created with mode 0750 when missing.

    Raises:
        AlreadyRunningError: another daemon has it.
        SocketPathError: something that is not a socket is there, somebody else serves it, or it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            self._lock = Lock(path.with_name(f"{path.name}.lock"))
        except OSError as error:
            raise SocketPathError(
                f"cannot create the control socket {path}: {error.strerror}",
                hint="choose another place with --socket, or let this user write there",
            ) from error
        try:
            _remove_stale(path)
            self.listener = _bind(path)
        except BaseException:
            self._lock.close()
            raise
        self.gid = path.stat().st_gid

    def __repr__(self) -> str:
        return f"<ControlSocket {self.path}>"

    def admits(self, peer: Peer) -> bool:
        """Whether `peer` may command: our own user, root, or a member of the socket's group."""
        return peer.uid in {0, os.getuid()} or self.gid in peer.gids

    def close(self) -> None:
        """Stop listening, remove the file, release the lock."""
        self.listener.close()
        with suppress(FileNotFoundError):
            self.path.unlink()
        self._lock.close()


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end. SO_PEERGROUPS sees supplementary groups, which SO_PEERCRED does not; see unix(7).

    A peer with more than 256 groups is known by its first group alone: Python reads no longer answer of the kernel.

    Raises:
        OSError: the kernel does not say.
    """
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups = array.array("I")
    try:
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GETSOCKOPT_BYTES))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
    return Peer(pid, uid, frozenset({gid, *groups}))


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketPathError(f"{path} is in the way and is not a socket", hint="move it away, or use --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise SocketPathError(f"{path} cannot be replaced: {error.strerror}", hint="remove it") from error
    raise AlreadyRunningError(f"already running: another program serves {path}", hint="use --socket")


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # The file must never be there with a wider mode, not even for a moment.
    old = os.umask(0o777 & ~SOCKET_MODE)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise SocketPathError(
            f"cannot create the control socket {path}: {error.strerror or error}",
            hint="choose another place with --socket, or let this user write there",
        ) from error
    finally:
        os.umask(old)
    listener.listen(128)
    listener.setblocking(False)
    return listener
