"""The control socket: claimed by one daemon, open to the right people, never in somebody's way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamavisor.lock import AlreadyRunningError, Lock
from llamavisord.control_socket import (
    ControlSocket,
    Peer,
    peer_of,
)

NOBODY = 65534


@pytest.fixture
def claimed(tmp_path: Path) -> Iterator[ControlSocket]:
    """A control socket in a folder that did not exist."""
    control_socket = ControlSocket(tmp_path / "run" / "control.sock")
    yield control_socket
    control_socket.close()


def test_close_removes_the_socket(tmp_path: Path) -> None:
    """After a daemon has ended its socket is gone, and the next one can have it."""
    for _ in range(2):
        control_socket = ControlSocket(tmp_path / "control.sock")
        control_socket.close()
        assert not control_socket.path.exists()


def test_living_socket_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """A socket that another program serves is not taken over, lock or no lock."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(AlreadyRunningError, match="another program"):
            ControlSocket(path)
        assert path.is_socket()


def test_lock_outlives_its_file_name(tmp_path: Path) -> None:
    """A lock is released by closing it, whatever its file says."""
    first = Lock(tmp_path / "lock")
    with pytest.raises(AlreadyRunningError):
        Lock(tmp_path / "lock")
    first.close()
    Lock(tmp_path / "lock").close()


@pytest.mark.parametrize(
    ("peer", "admitted"),
    [
        (Peer(1, 0, frozenset()), True),
        (Peer(1, os.getuid(), frozenset()), True),
        (Peer(1, NOBODY, frozenset({NOBODY})), False),
    ],
)
def test_who_is_admitted(claimed: ControlSocket, peer: Peer, admitted: bool) -> None:
    """Our own user and root may command, a stranger may not."""
    assert claimed.admits(peer) is admitted


def test_members_of_the_group_are_admitted(claimed: ControlSocket) -> None:
    """Whoever is in the socket's group may command, by any of its groups."""
    assert claimed.admits(Peer(1, NOBODY, frozenset({NOBODY, claimed.gid})))


@pytest.mark.parametrize("count", [1, 256, 257])
def test_supplementary_groups_are_seen(count: int) -> None:
    """The kernel tells all groups of a peer, not only its first one; of too many the first one is left."""
    code = (
        "import os, socket, sys\n"
        f"os.setgroups([*range(5000, {5000 + count})]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(bytes.fromhex(sys.argv[1])); s.sendall(b'x'); s.recv(1)\n"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # an abstract name of the kernel's choice
        listener.listen()
        with subprocess.Popen([sys.executable, "-c", code, listener.getsockname().hex()]) as process:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1)
                peer = peer_of(connection)
                connection.sendall(b"x")
            assert process.wait(10) == 0
    assert (peer.pid, peer.uid) == (process.pid, NOBODY)
    supplementary = set(range(5000, 5000 + count)) if count <= 256 else set()
    assert peer.gids == {NOBODY, *supplementary}
