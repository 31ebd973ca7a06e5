"""The Unix socket that takes commands: claimed safely, and open to the right people alone."""

from __future__ import annotations

import array
import errno
import math
import os
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio

from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus, ControlSocketRebound, Warned
from llamavisor.lock import AlreadyRunningError, Lock, is_at
from llamavisor.threads import run_in_thread
from llamavisord.acceptor import WARN_EVERY_S, Accept

SOCKET_MODE = 0o660
FOLDER_MODE = 0o750
CHECK_S = 60.0
"""Between two looks whether the socket is still where people look for it."""
_SO_PEERGROUPS = 59  # asm-generic/socket.h; the socket module has no name for it
_GETSOCKOPT_BYTES = 1024  # the most that socket.getsockopt takes


class SocketPathError(LlamavisorError):
    """Raised when the control socket cannot be where the configuration wants it."""

    code = "socket_unusable"


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
        handed: a socket that listens there already, of the service manager's.

    Raises:
        AlreadyRunningError: another daemon has it.
        SocketPathError: something that is not a socket is there, somebody else serves it, or it cannot be created.
    """

    def __init__(self, path: Path, handed: socket.socket | None = None) -> None:
        self.path = path
        self._lock = _claim(path)
        try:
            # Somebody may have deleted its file, and a daemon that was killed left another there: then nobody finds it.
            self._is_handed = handed is not None and _is_served(path)
            if handed is not None and self._is_handed:
                self.listener, self._file = handed, path.lstat()
            else:
                _remove_stale(path)
                self.listener, self._file = _bind(path)
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise _cannot_create(path, error) from error
            raise

    def __repr__(self) -> str:
        return f"<ControlSocket {self.path}>"

    @property
    def gid(self) -> int:
        """The group whose members may command."""
        return self._file.st_gid

    @property
    def is_in_place(self) -> bool:
        """Whether whoever connects to that path comes to us. As long as we listen, nobody gets the same inode."""
        return is_at(self.path, self._file)

    def restore(self) -> socket.socket | None:
        """Bind it anew, as at the start, if its file or that of its lock has gone or is another's.

        Returns:
            The listener that was replaced, for the caller to close; None if nothing had to be bound.

        Raises:
            AlreadyRunningError: another daemon has the path now.
            SocketPathError: it cannot be bound again. We still listen as before.
        """
        if not self._lock.is_in_place:
            lost, self._lock = self._lock, _claim(self.path)
            lost.close()
        if self.is_in_place:
            return None
        replaced = self.listener
        _remove_stale(self.path)
        self.listener, self._file = _bind(self.path)
        self._is_handed = False
        return replaced

    def admits(self, peer: Peer) -> bool:
        """Whether `peer` may command: our own user, root, or a member of the socket's group."""
        return peer.uid in {0, os.getuid()} or self.gid in peer.gids

    def close(self) -> None:
        """Remove the file if it is ours, stop listening, release the lock."""
        if self.is_in_place and not self._is_handed:
            with suppress(OSError):
                self.path.unlink()
        self.listener.close()
        self._lock.close()


class Keeper:
    """Sees that the control socket stays where people look for it, whoever cleans up there.

    Args:
        control_socket: what is kept.
        bus: hears when it was bound anew; and once an hour that it cannot be, while that is tried again and again.
        every_s: between two looks.
    """

    def __init__(self, control_socket: ControlSocket, bus: Bus, *, every_s: float = CHECK_S) -> None:
        self._socket = control_socket
        self._bus = bus
        self._every_s = every_s
        self._warned_at = -math.inf

    def __repr__(self) -> str:
        return f"<Keeper of {self._socket!r}>"

    async def serve(self, accept: Accept) -> None:
        """Have connections taken until cancelled; those that are open do not notice when the socket is bound anew."""
        while True:
            async with anyio.create_task_group() as accepting:
                accepting.start_soon(accept, self._socket.listener)
                replaced = await self._bind_anew()
                accepting.cancel_scope.cancel()
            replaced.close()

    async def _bind_anew(self) -> socket.socket:
        """Wait until the socket has gone and was bound anew; the listener that was replaced."""
        while True:
            await anyio.sleep(self._every_s)
            try:
                replaced = await run_in_thread(self._socket.restore, abandon_on_cancel=True)
            except (AlreadyRunningError, SocketPathError) as error:
                if anyio.current_time() - self._warned_at >= WARN_EVERY_S:
                    self._warned_at = anyio.current_time()
                    text = f"nobody can connect any more: {error}; it is tried again"
                    self._bus.publish(Warned(subject="control socket", text=text))
                continue
            if replaced is not None:
                self._warned_at = -math.inf
                self._bus.publish(ControlSocketRebound(socket=str(self._socket.path)))
                return replaced


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


def _claim(path: Path) -> Lock:
    """The lock of the socket at `path`, in a folder that is made if it is missing."""
    try:
        path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        return Lock(path.with_name(f"{path.name}.lock"))
    except OSError as error:
        raise _cannot_create(path, error) from error


def _cannot_create(path: Path, error: OSError) -> SocketPathError:
    return SocketPathError(
        f"cannot create the control socket {path}: {error.strerror or error}",
        hint="choose another place with --socket, or let this user write there",
    )


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketPathError(f"{path} is in the way and is not a socket", hint="move it away, or use --socket")
    try:
        if not _is_served(path):
            path.unlink()
            return
    except OSError as error:
        raise SocketPathError(f"{path} cannot be replaced: {error.strerror or error}", hint="remove it") from error
    raise AlreadyRunningError(f"already running: another program serves {path}", hint="use --socket")


def _is_served(path: Path) -> bool:
    """Whether somebody listens on the socket at `path`, if there is one.

    Raises:
        OSError: it cannot be asked.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def _bind(path: Path) -> tuple[socket.socket, os.stat_result]:
    """A listener, and the file by which it is found."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The file must never be there with a wider mode, not even for a moment. Linux makes it with the mode of the
        # socket less the umask; the umask is not ours to change, the files of other threads would get it as well.
        os.fchmod(listener.fileno(), SOCKET_MODE)
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
        file = path.lstat()
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise _cannot_create(path, error) from error
    listener.setblocking(False)
    return listener, file
