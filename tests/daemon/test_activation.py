"""Sockets that the service manager has listened on: the daemon serves those, and says what is wrong with them."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest

from conftest import Start
from fakes.bare_router import free_port
from llamavisord.activation import take
from running import RunningDaemon, UnixConnection, run_serve

LISTEN = """
import json, os, socket, sys
made = []
for kind, family, address in json.loads(sys.argv[1]):
    made.append(socket.socket(getattr(socket, family), getattr(socket, kind)))
    made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made[-1].bind(tuple(address) if isinstance(address, list) else address)
    if kind == "SOCK_STREAM":
        made[-1].listen()
high = [os.dup2(each.fileno(), 100 + at) for at, each in enumerate(made)]
for at, fd in enumerate(high):
    os.dup2(fd, 3 + at)
    os.close(fd)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(made)), "LISTEN_FDNAMES": "x"}
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does before it becomes a service."""


def hand(daemon: RunningDaemon, *sockets: tuple[str, str, object]) -> None:
    """Have a daemon begin with these sockets: kind, family and address of each."""
    daemon.launcher = [sys.executable, "-c", LISTEN, json.dumps(sockets)]


def tcp(port: int, host: str = "127.0.0.1") -> tuple[str, str, object]:
    """One for clients."""
    return ("SOCK_STREAM", "AF_INET6" if ":" in host else "AF_INET", [host, port])


def unix(path: Path) -> tuple[str, str, object]:
    """One for commands."""
    return ("SOCK_STREAM", "AF_UNIX", str(path))


def test_both_are_served_and_stay(start: Start) -> None:
    """Clients and commands come in by them, whatever is configured; the file of the socket is not ours to remove."""
    daemon = start()
    configured, port = daemon.port, free_port()
    hand(daemon, unix(daemon.socket), tcp(port))
    with daemon:
        daemon.wait_for_router("ready")
        assert daemon.chat("alpha", port=port) == "I am alpha"
        status = daemon.status()
        assert status["gateway"]["urls"] == [f"http://127.0.0.1:{port}"]
        assert f"--port: {configured} has no effect" in " ".join(status["warnings"])
        with pytest.raises(ConnectionRefusedError):
            daemon.chat("alpha", port=configured)
        for process in daemon.processes():
            environment = process.environ()
            assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & environment.keys()
            held = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")}
            assert not held & {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in (3, 4)}
    assert daemon.socket.is_socket()


def test_who_waits_in_the_queue_is_served(start: Start) -> None:
    """A request that was sent before the daemon began is answered, and not told that there is no such model."""
    daemon = start()
    with closing(socket.create_server(("127.0.0.1", 0))) as door, closing(socket.socket()) as client:
        client.connect(door.getsockname())
        body = json.dumps({"model": "alpha", "messages": [{"role": "user", "content": "hi"}]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        os.set_inheritable(door.fileno(), True)
        script = (
            f"import os,sys; os.dup2({door.fileno()}, 3); os.environ|=dict(LISTEN_PID=str(os.getpid()),LISTEN_FDS='1')"
        )
        daemon.launcher = [sys.executable, "-c", f"{script}; os.execv(sys.argv[1], sys.argv[1:])"]
        daemon.pass_fds = (door.fileno(),)
        with daemon:
            client.settimeout(10)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"I am alpha" in answer


def test_a_control_socket_whose_file_has_gone_is_bound_anew(start: Start) -> None:
    """Nobody could find what was handed over: commands are taken all the same."""
    daemon = start()
    gone = daemon.folder / "other.sock"
    hand(daemon, unix(gone))
    daemon.launcher[2] = LISTEN.replace("os.execv", f"os.unlink({str(gone)!r}); os.execv")
    daemon.socket = gone
    with daemon:
        daemon.wait_for_router("ready")
        with closing(UnixConnection(gone)) as connection:
            connection.request("GET", "/livez")
            assert connection.getresponse().status == 200
    assert not gone.exists()


@pytest.mark.parametrize(
    ("sockets", "code", "words"),
    [
        pytest.param([("SOCK_DGRAM", "AF_INET", ["127.0.0.1", 0])], 1, "takes no connections", id="datagrams"),
        pytest.param([unix(Path("one.sock")), unix(Path("two.sock"))], 1, "2 Unix sockets", id="two for commands"),
        pytest.param([tcp(0, "0.0.0.0")], 78, "without a key everybody", id="open to all"),
        pytest.param([tcp(0), tcp(0, "0.0.0.0")], 78, "without a key everybody", id="one of them open to all"),
    ],
)
def test_what_is_of_no_use_is_refused(
    start: Start, sockets: list[tuple[str, str, object]], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is wrong, and before anything is started."""
    daemon = start()
    monkeypatch.chdir(daemon.folder)
    hand(daemon, *sockets)
    assert (done := run_serve(daemon))[0] == code
    assert words in done[1]
    assert "Traceback" not in done[1]


def test_no_door_without_a_gateway(start: Start) -> None:
    """With serve = "router" nobody would ever answer there."""
    daemon = start(serve="router")
    hand(daemon, tcp(0))
    code, said = run_serve(daemon)
    assert code == 78
    assert "for the gateway, and there is none" in said


@pytest.mark.parametrize("environ", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}])
def test_what_is_meant_for_others_is_left_to_them(environ: dict[str, str]) -> None:
    """And is not passed on."""
    assert take(environ) == take({})
    assert environ == {}
