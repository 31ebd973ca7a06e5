"""C1 to C11: the control socket, whoever comes to it, whatever they send, and whatever becomes of its file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPResponse
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.waiting import PATIENCE_S, eventually
from llamavisor.events import Bus
from llamavisord import control_socket
from llamavisord.acceptor import CONNECTIONS_MAX
from llamavisord.app import HEAD_S
from llamavisord.control_socket import ControlSocket, Keeper, SocketPathError
from running import RunningDaemon, UnixConnection

NOBODY = 65534
SOON = "from functools import partial; import llamavisord.app as app; from llamavisord.cli import main; import sys\n"
"""The beginning of a program that serves with deadlines of its own."""
KEPT_OFTEN = f"{SOON}app.Keeper = partial(app.Keeper, every_s=0.1)\nsys.exit(main())\n"
"""The socket is looked at ten times a second instead of once a minute."""
IMPATIENT = (
    f"{SOON}app._web_server = partial(app._web_server, head_s=1.0)\n"
    "app.control_app = partial(app.control_app, body_s=1.0)\nsys.exit(main())\n"
)
"""A request may take a second instead of ten."""

Make = Callable[..., RunningDaemon]


@pytest.fixture
def make(tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., FakeLlamaServer]) -> Make:
    """Makes a daemon on a fake llama-server with this behaviour, that runs `program` if there is one."""

    def make(*, program: str = "", flags: tuple[str, ...] = (), **behaviour: object) -> RunningDaemon:
        daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(**behaviour), flags=flags, options=())
        if program:
            daemon.program = [sys.executable, "-c", program]
        return daemon

    return make


@pytest.fixture
def apart(make: Make, tmp_path: Path) -> RunningDaemon:
    """A daemon whose control socket is in a folder of its own, and is looked at often."""
    place = tmp_path / "run" / "control.sock"
    daemon = make(program=KEPT_OFTEN, flags=("--socket", str(place)))
    daemon.socket = place
    return daemon


def second(first: RunningDaemon, folder: Path) -> RunningDaemon:
    """Another daemon on the same socket."""
    folder.mkdir()
    daemon = RunningDaemon(folder, first.folder / "models", "/bin/true", flags=["--socket", str(first.socket)])
    daemon.socket = first.socket
    return daemon


def run_serve(daemon: RunningDaemon) -> tuple[int, str]:
    """Exit code and words of a daemon that cannot start."""
    daemon.start()
    code = daemon.wait()
    return code, daemon.log.read_text(encoding="utf-8")


@contextmanager
def following(daemon: RunningDaemon, path: str) -> Iterator[HTTPResponse]:
    """A stream that has begun."""
    with closing(UnixConnection(daemon.socket)) as connection:
        connection.request("GET", path)
        with connection.getresponse() as stream:
            yield stream


def hear(stream: HTTPResponse, name: str) -> dict[str, Any]:
    """Read a stream of events up to one of this name."""
    while line := stream.readline():
        if line.startswith(b"data:") and json.loads(line[5:])["event"] == name:
            return dict(json.loads(line[5:]))
    raise AssertionError(f"the stream ended before {name}")


def connect(place: Path | int, said: bytes = b"") -> socket.socket:
    """Somebody who connects to a Unix socket or a TCP port and says so much."""
    if isinstance(place, int):
        client = socket.create_connection(("127.0.0.1", place), timeout=PATIENCE_S)
    else:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(place))  # waits while the backlog is full, which with a timeout it would not
        except OSError:
            client.close()
            raise
        client.settimeout(PATIENCE_S)
    with suppress(BrokenPipeError):  # room may have been made of it already
        client.sendall(said)
    return client


def is_open(client: socket.socket) -> bool:
    """Whether the other end is still held; what it says is read."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


def modes(daemon: RunningDaemon) -> tuple[int, int]:
    """Who may use the folder, and who the socket."""
    return stat.S_IMODE(daemon.socket.parent.stat().st_mode), stat.S_IMODE(daemon.socket.lstat().st_mode)


def complaints(daemon: RunningDaemon) -> int:
    """How often a daemon has said that its socket cannot be bound again."""
    return daemon.log.read_text(encoding="utf-8").count("nobody can connect any more")


# --- C1, C2, C3: what is there at the start ---------------------------------------------------------------------------


def test_c1_a_stale_socket_of_a_killed_daemon(make: Make) -> None:
    """C1: the socket and the lock that a killed daemon leaves behind are in nobody's way."""
    with make() as daemon:
        daemon.wait_for_router("ready")
        stale = daemon.socket.lstat().st_ino
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        assert daemon.socket.lstat().st_ino == stale
        with pytest.raises(ConnectionRefusedError):
            connect(daemon.socket)
        daemon.start()
        eventually(daemon.is_live, what="another daemon")
        daemon.wait_for_router("ready")


def test_c1_a_stale_socket_without_a_lock(tmp_path: Path) -> None:
    """C1: a socket that nobody serves any more is replaced, whoever made it."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with closing(ControlSocket(path)), closing(connect(path)):
        pass


def test_c2_a_second_daemon(make: Make, tmp_path: Path) -> None:
    """C2: a second daemon ends with 75 and one line that names the first, which is not affected."""
    with make() as first:
        pid = first.wait_for_router("ready")["pid"]
        code, words = run_serve(second(first, tmp_path / "second"))
        assert code == 75
        assert f"already running, pid {first.pid}" in words
        assert words.count("\n") == 1
        assert first.router()["pid"] == pid


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to a socket"])
def test_c3_what_is_no_socket(make: Make, tmp_path: Path, kind: str) -> None:
    """C3: a file, a folder or a link in the socket's place is named, kept as it is, and nothing is started."""
    daemon, elsewhere = make(), tmp_path / "elsewhere"
    if kind == "file":
        daemon.socket.write_text("precious")
    elif kind == "folder":
        daemon.socket.mkdir()
    else:
        daemon.socket.symlink_to(elsewhere)
    with socket.socket(socket.AF_UNIX) as dead:
        if kind == "link to a socket":
            dead.bind(str(elsewhere))
    before = daemon.socket.lstat()
    code, words = run_serve(daemon)
    assert code == 1
    assert f"{daemon.socket} is in the way and is not a socket; move it away, or use --socket" in words
    assert words.count("\n") == 1
    assert daemon.socket.lstat() == before
    assert elsewhere.exists() == (kind == "link to a socket")
    assert list(daemon.processes()) == []


# --- C4: the file goes while the daemon runs --------------------------------------------------------------------------


def test_c4_the_socket_is_deleted(apart: RunningDaemon, tmp_path: Path) -> None:
    """C4: a deleted socket is bound anew by the rules of the start, counted, and nobody who is connected notices."""
    with apart as daemon, ExitStack() as clients:
        router = daemon.wait_for_router("ready")["pid"]
        kept = clients.enter_context(closing(UnixConnection(daemon.socket)))
        kept.request("GET", "/livez")
        assert kept.getresponse().read() == b"ok\n"
        stream = clients.enter_context(following(daemon, "/control/v1/events"))
        for times in (1.0, 2.0):
            daemon.socket.unlink()
            assert hear(stream, "ControlSocketRebound")["socket"] == str(daemon.socket)
            assert f"llamavisor_control_socket_rebinds_total {times}" in daemon.metrics()
            assert modes(daemon) == (0o750, 0o660)
            assert daemon.router()["pid"] == router
        kept.request("GET", "/livez")
        assert kept.getresponse().read() == b"ok\n"
        assert kept.sock is not None, "the connection was not kept"
        listening = [each for each in psutil.Process(daemon.pid).net_connections("unix") if each.laddr]
        assert len({each.fd for each in listening if each.laddr == str(daemon.socket)}) == 3, "it, and both clients"
        assert run_serve(second(daemon, tmp_path / "second"))[0] == 75
        assert complaints(daemon) == 0


def test_c4_the_whole_folder_is_deleted(apart: RunningDaemon, tmp_path: Path) -> None:
    """C4: a folder that was cleaned away is made again with its lock: others stay out, and a second daemon as well."""
    with apart as daemon:
        for _ in range(2):
            shutil.rmtree(daemon.socket.parent)
            eventually(lambda: daemon.socket.exists() and daemon.is_live(), what="a daemon that answers")
            assert modes(daemon) == (0o750, 0o660)
        code, words = run_serve(second(daemon, tmp_path / "second"))
        assert (code, f"already running, pid {daemon.pid}" in words) == (75, True)
        assert len(daemon.events("ControlSocketRebound")) == 2


def test_c4_the_lock_is_deleted(apart: RunningDaemon, tmp_path: Path) -> None:
    """C4: the lock alone is made again as well, so that nobody else can have it while the socket is ours."""
    with apart as daemon:
        lock = daemon.socket.with_name("control.sock.lock")
        lock.unlink()
        eventually(lock.exists, what="a lock")
        code, words = run_serve(second(daemon, tmp_path / "second"))
        assert (code, f"already running, pid {daemon.pid}" in words) == (75, True)
        assert daemon.events("ControlSocketRebound") == []


@pytest.mark.parametrize("kind", ["file", "dead socket", "living socket"])
def test_c4_something_else_is_in_its_place(apart: RunningDaemon, kind: str) -> None:
    """C4: only a socket that nobody serves is replaced; what is another's is neither taken over nor removed."""
    with apart as daemon, ExitStack() as others:
        stream = others.enter_context(following(daemon, "/control/v1/events"))
        other = others.enter_context(socket.socket(socket.AF_UNIX))
        theirs = daemon.socket.with_name("theirs")
        if kind == "file":
            theirs.write_text("precious")
        else:
            other.bind(str(theirs))
            if kind == "living socket":
                other.listen()
            else:
                other.close()
        before = theirs.lstat()
        theirs.replace(daemon.socket)
        if kind != "dead socket":
            eventually(lambda: complaints(daemon) == 1, what="a warning")
            time.sleep(0.5)  # five more tries
            assert complaints(daemon) == 1
            assert os.path.samestat(daemon.socket.lstat(), before)
            other.close()
        if kind == "file":
            assert daemon.socket.read_text() == "precious"
            daemon.socket.unlink()
        hear(stream, "ControlSocketRebound")
        assert daemon.is_live()


def test_c4_what_is_anothers_stays_when_the_daemon_ends(apart: RunningDaemon) -> None:
    """C4: a daemon that ends removes its own socket, and nothing that has come into its place."""
    with apart as daemon:
        daemon.socket.unlink()
        daemon.socket.write_text("precious")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert daemon.socket.read_text() == "precious"


@pytest.mark.anyio
async def test_c4_a_warning_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C4: a socket that cannot be bound again is tried with every look, and told of once an hour."""
    bus, tries, told = Bus(), count(), list[str]()
    bus.listen(lambda published: told.append(published.event.message()))
    place = tmp_path / "control.sock"
    with closing(ControlSocket(place)) as kept:
        place.unlink()
        place.write_text("precious")
        restore = kept.restore

        def counted() -> socket.socket | None:
            next(tries)
            return restore()

        monkeypatch.setattr(kept, "restore", counted)

        async def accept(_: socket.socket) -> None:
            await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Keeper(kept, bus, every_s=0.01).serve, accept)
            with anyio.fail_after(PATIENCE_S):
                while next(tries) < 20:
                    await anyio.sleep(0.02)
                assert len(told) == 1
                monkeypatch.setattr(control_socket, "WARN_EVERY_S", 0.1)  # the hour is over
                while len(told) < 3:
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        assert all("nobody can connect any more" in text and "is in the way" in text for text in told)
        assert place.read_text() == "precious"


# --- C5: a long path --------------------------------------------------------------------------------------------------


def test_c5_a_path_that_is_too_long(make: Make) -> None:
    """C5: of a path 107 bytes fit, which are served; one more is an error of the configuration that says so."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        room = 107 - len(folder) - 1
        path = Path(folder) / ("é" * (room // 2) + "x" * (room % 2))
        daemon = make(flags=("--socket", str(path)))
        daemon.socket = path
        with daemon:
            assert len(os.fsencode(daemon.status()["socket"])) == 107
        daemon = make(flags=("--socket", f"{path}x"))
        daemon.log.unlink()
        code, words = run_serve(daemon)
        assert code == 78
        assert f"AF_UNIX path too long: {path}x has 108 bytes and 107 fit" in words
        assert os.listdir(folder) == [f"{path.name}.lock"]


# --- C6: who says nothing, or half of it ------------------------------------------------------------------------------

HALVES = (
    b"",
    b"GET /livez HT",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ",
    b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHo",
)


def test_c6_half_a_request_is_ended(make: Make) -> None:
    """C6: half a head ends at the deadline, however slowly it goes on, half a body with 408; long answers do not."""
    with make(program=IMPATIENT, start_s=2.5) as daemon, ExitStack() as clients, ThreadPoolExecutor(1) as pool:
        before = daemon.wait_for_router("ready")["pid"]
        events, logs = (
            clients.enter_context(following(daemon, f"/control/v1/{path}")) for path in ("events", "logs?follow=true")
        )
        restart = pool.submit(daemon.call, "POST", "/control/v1/routers/main/restart?wait=true")
        began = time.monotonic()
        halves = [
            clients.enter_context(connect(place, said))
            for place in (daemon.socket, daemon.metrics_port)
            for said in HALVES
        ]
        body = b"POST /control/v1/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        unfinished = clients.enter_context(connect(daemon.socket, body))
        trickling = clients.enter_context(connect(daemon.socket, b"GET /livez HTTP/1.1\r\nX: "))
        while is_open(trickling):
            assert time.monotonic() - began < PATIENCE_S
            with suppress(BrokenPipeError):
                trickling.send(b"x")
            time.sleep(0.05)
        assert time.monotonic() - began > 0.9
        eventually(lambda: not any(map(is_open, halves)), what="the end of the others")
        answer = unfinished.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "request_timeout"' in answer
        assert restart.result()[0] == 200
        assert hear(events, "RouterReady")["pid"] == before
        assert hear(events, "RouterReady")["pid"] == daemon.router()["pid"]
        while b"listening" not in (line := logs.readline()):
            assert line, "the log of the next process was cut off"
        assert time.monotonic() - began > 2.5
        assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


def test_c6_a_thousand_idle_connections(make: Make) -> None:
    """C6: 64 of them are held, none of them for longer than ten seconds; everybody else is served meanwhile."""
    with make() as daemon, ExitStack() as clients:
        daemon.wait_for_router("ready")
        process = psutil.Process(daemon.pid)
        stream = clients.enter_context(following(daemon, "/control/v1/events"))
        before = process.num_fds()
        idle = [clients.enter_context(connect(daemon.socket, HALVES[at % 2])) for at in range(1000)]
        last = time.monotonic()
        assert eventually(lambda: sum(map(is_open, idle)) < CONNECTIONS_MAX == 64)
        assert is_open(idle[-1])
        assert process.num_fds() < before + CONNECTIONS_MAX
        for _ in range(20):
            asked = time.monotonic()
            assert daemon.status()["ready"]
            assert time.monotonic() - asked < 2
        assert daemon.call("POST", "/control/v1/models/alpha/load?wait=true")[0] == 200
        assert hear(stream, "ModelLoaded")["model"] == "alpha"
        assert is_open(idle[-1])
        eventually(lambda: not any(map(is_open, idle)), what="the end of all")
        assert HEAD_S - 0.5 < time.monotonic() - last < HEAD_S + 5 == 15
        assert daemon.call("POST", "/control/v1/models/alpha/unload?wait=true")[0] == 200
        assert hear(stream, "ModelUnloaded")["model"] == "alpha"


# --- C7: what cannot be understood ------------------------------------------------------------------------------------

BIG = b"x" * 10_000_000
RELOAD = "/control/v1/reload"
UNUSABLE: list[tuple[str, str, bytes, dict[str, str], int]] = [
    ("10 MB", RELOAD, BIG, {}, 413),
    ("10 MB to nobody", "/nothing", BIG, {}, 413),
    ("10 MB in pieces", RELOAD, b"%x\r\n%b\r\n0\r\n\r\n" % (len(BIG), BIG), {"Transfer-Encoding": "chunked"}, 413),
    ("deep", RELOAD, b"[" * 30_000 + b"]" * 30_000, {}, 400),
    ("deeper", RELOAD, b'{"a":' * 10_000, {}, 400),
    ("not JSON", RELOAD, b'{"a"', {}, 400),
    ("wrong types", RELOAD, b'{"wait": {"true": []}}', {}, 400),
    ("NaN", RELOAD, b'{"wait": NaN}', {}, 400),
    ("duplicate keys", RELOAD, b'{"wait": 1, "wait": 2}', {}, 400),
    ("not UTF-8", RELOAD, b"\xff\xfe\x00", {}, 400),
    ("not gzip", RELOAD, b"junk", {"Content-Encoding": "gzip"}, 400),
    ("a wait that is no number", "/control/v1/models/alpha/load?wait=nan", b"", {}, 400),
    ("two waits", "/control/v1/models/alpha/load?wait=soon&wait=1", b"", {}, 400),
]


def problem(daemon: RunningDaemon, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """What a request is refused with: a whole problem document."""
    with closing(UnixConnection(daemon.socket)) as connection:
        connection.putrequest("POST", path)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if name != "Content-Length" or "Transfer-Encoding" not in headers:
                connection.putheader(name, value)
        connection.endheaders()
        with suppress(BrokenPipeError):
            connection.send(body)
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "application/problem+json; charset=utf-8"
        told = json.loads(response.read())
        assert told["status"] == response.status
        assert {"type", "title", "detail", "code"} <= set(told)
        assert told["detail"].isprintable()
        return dict(told)


def test_c7_what_cannot_be_understood(make: Make) -> None:
    """C7: bodies that are too long, too deep or nonsense are a problem document each; none costs memory or a word."""
    with make() as daemon:
        daemon.wait_for_router("ready")
        process, last = psutil.Process(daemon.pid), daemon.status()["event_id"]
        for times in range(10):
            for name, path, body, headers, status in UNUSABLE:
                assert problem(daemon, path, body, headers)["status"] == status, name
            if times == 1:
                before = process.memory_info().rss
        assert process.memory_info().rss - before < 10e6
        assert daemon.call("POST", RELOAD, body=b" {} ")[0] == 200
        assert [event["event"] for event in daemon.events() if event["id"] > last] == ["ConfigReloaded"]
        assert "Traceback" not in daemon.log.read_text(encoding="utf-8")
        assert "bug" not in daemon.log.read_text(encoding="utf-8")


def test_c7_a_body_without_an_end(make: Make) -> None:
    """C7: whoever goes on sending when the body is too long already is told so and hung up on."""
    with make() as daemon:
        daemon.wait_for_router("ready")
        before, began = psutil.Process(daemon.pid).memory_info().rss, time.monotonic()
        head = f"POST {RELOAD} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with connect(daemon.socket, head.encode()) as client, suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - began < PATIENCE_S:
                client.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        assert time.monotonic() - began < PATIENCE_S
        assert psutil.Process(daemon.pid).memory_info().rss - before < 10e6
        assert daemon.is_live()


def test_c7_a_body_in_pieces_that_are_none(make: Make) -> None:
    """C7: a body whose pieces are not as HTTP has them is a 400 if it comes with its head, else 408."""
    with make(program=IMPATIENT) as daemon:
        head = f"POST {RELOAD} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        with connect(daemon.socket, head + b"zz\r\n") as client:
            assert client.makefile("rb").read().startswith(b"HTTP/1.0 400 ")
        with connect(daemon.socket, head) as client:
            time.sleep(0.2)
            client.sendall(b"zz\r\n")
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 408 ")
        assert daemon.is_live()
        assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


def test_c7_a_configuration_that_cannot_be_understood(
    tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., FakeLlamaServer]
) -> None:
    """C7: a reload of a file that is not understood is 422, with the file and the line."""
    config = f'models_dir = "{models_dir}"\n[metrics]\nenabled = false\n'
    with RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config) as daemon:
        for wrong in ('port = "many"', "port = nan", "port = 1\nport = 2", "port = " + "[" * 5000, "\x00"):
            daemon.config.write_text(f"{wrong}\n{config}", encoding="utf-8")
            told = problem(daemon, RELOAD, b"", {})
            assert (told["status"], told["code"]) == (422, "config_invalid")
            assert str(daemon.config) in told["detail"]
        assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


# --- C8, C9: who may come in ------------------------------------------------------------------------------------------

STRANGER = f"""
import os, socket, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendall(b"POST /control/v1/routers/main/stop HTTP/1.0\\r\\n\\r\\n"); print(s.makefile().read())
"""


def test_c8_a_stranger(make: Make) -> None:
    """C8: another user who can reach the socket gets a 403 and nothing else, and is on record with uid and pid."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, make() as daemon:
        Path(folder).chmod(0o755)
        place = Path(folder) / "control.sock"
        daemon.wait_for_router("ready")
        place.hardlink_to(daemon.socket)
        place.chmod(0o666)
        with subprocess.Popen([sys.executable, "-c", STRANGER, place], stdout=subprocess.PIPE, text=True) as stranger:
            told = stranger.communicate()[0]
        assert " 403 " in told.splitlines()[0]
        assert "application/problem+json" in told
        assert '"code": "forbidden"' in told
        [refused] = daemon.events("PeerRefused")
        assert (refused["uid"], refused["pid"]) == (NOBODY, stranger.pid)
        words = f"refused POST /control/v1/routers/main/stop from uid {NOBODY}, pid {stranger.pid}"
        assert words in daemon.log.read_text(encoding="utf-8")
        assert daemon.router()["state"] == "ready"


def test_c9_never_wider_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9: whatever the umask, a socket is for its user and group alone from the moment in which it is there."""
    seen: list[int] = []
    bind, change = socket.socket.bind, Path.chmod

    def note(path: str) -> None:
        seen.append(stat.S_IMODE(os.lstat(path).st_mode))

    monkeypatch.setattr(socket.socket, "bind", lambda self, path: (bind(self, path), note(path))[0])
    monkeypatch.setattr(Path, "chmod", lambda self, mode: (change(self, mode), note(str(self)))[0])
    for umask, first in ((0o000, 0o660), (0o022, 0o640), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with closing(ControlSocket(tmp_path / f"{umask:o}" / "control.sock")) as claimed:
                assert stat.S_IMODE(claimed.path.parent.stat().st_mode) == 0o750 & ~umask
                assert stat.S_IMODE(claimed.path.with_name("control.sock.lock").stat().st_mode) == 0o600
        finally:
            os.umask(before)
        assert seen == [first, 0o660]
        seen.clear()


def test_c9_a_mode_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9: a socket that cannot get its mode is no socket: the start fails, and nobody can connect."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    path = tmp_path / "control.sock"
    with pytest.raises(SocketPathError, match=r"cannot create the control socket .*: Operation not permitted"):
        ControlSocket(path)
    monkeypatch.undo()
    with closing(ControlSocket(path)):
        pass


def test_c9_a_folder_that_cannot_be_written(make: Make) -> None:
    """C9: an unprivileged user is told which socket cannot be created and why, and nothing is started."""
    unprivileged = (
        # All that is needed later, too: where the tests lie this user may not read.
        "import encodings.ascii, os, sys, llamavisord.app, llamavisord.cli.program, llamavisord.cli.serve\n"
        "from llamavisord.cli import main\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); sys.exit(main())\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        place, state = Path(folder) / "run" / "control.sock", Path(folder) / "state"
        state.mkdir()
        os.chown(state, NOBODY, NOBODY)
        daemon = make(program=unprivileged, flags=("--socket", str(place), "--state-dir", str(state)))
        daemon.state_dir = state
        code, words = run_serve(daemon)
        assert code == 1
        assert f"cannot create the control socket {place}: Permission denied" in words
        assert words.count("\n") == 1
        assert not place.parent.exists()
        assert list(daemon.processes()) == []


# --- C10, C11: many commands, and nobody who waits --------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, fake_llama_server: Callable[..., FakeLlamaServer]) -> Path:
    """A llama-server that fails with 99 if another one of it is there: the kernel holds a lock as long as it lives."""
    program, lock, fake = tmp_path / "llama-server", tmp_path / "alone", fake_llama_server(start_s=0.05)
    lock.touch()
    program.write_text(
        "#!/bin/sh\n"
        f"case \" $* \" in *' --port '*) exec flock --nonblock --no-fork -E 99 '{lock}' '{fake}' \"$@\";; esac\n"
        f"exec '{fake}' \"$@\"\n"
    )
    program.chmod(0o755)
    return program


def is_alone(lock: Path) -> bool:
    """Whether no router runs."""
    return subprocess.run(["flock", "--nonblock", lock, "true"], check=False).returncode == 0


def test_c10_many_commands_at_once(tmp_path: Path, models_dir: Path, alone: Path) -> None:
    """C10: whatever many clients command at once, there are never two routers, and the last command is what becomes."""
    with RunningDaemon(tmp_path, models_dir, alone, options=()) as daemon, ThreadPoolExecutor(8) as clients:
        daemon.wait_for_router("ready")
        assert not is_alone(tmp_path / "alone")

        def command(what: str, *, wait: str = "10") -> tuple[int, Any]:
            return daemon.call("POST", f"/control/v1/routers/main/{what}?wait={wait}")

        def in_haste(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(8):
                what, wait = chance.choice(["start", "stop", "restart"]), chance.choice(["false", "0.05"])
                status, told = command(what, wait=wait)
                assert status in {200, 202, 504}, told

        for seed, (last, state) in enumerate([("stop", "stopped"), ("start", "ready"), ("restart", "ready")] * 2):
            list(clients.map(in_haste, range(8 * seed, 8 * seed + 8)))
            assert command(last)[1]["router"]["state"] == state
            assert is_alone(tmp_path / "alone") is (state == "stopped")
            again = "stop" if last == "stop" else "start"
            pid = daemon.router()["pid"]
            told = list(clients.map(command, [again] * 8))
            assert {(status, body["changed"], body["router"]["pid"]) for status, body in told} == {(200, False, pid)}
        spawned = daemon.events("RouterSpawned")
        ended = daemon.events("RouterExited")
        assert len(spawned) > 10
        assert len(spawned) == len(ended) + 1
        assert "exit code 99" not in {event["status"] for event in ended}
        assert all(event["is_requested"] for event in ended)
        assert daemon.router()["failures"] == 0
        servers = [each for each in daemon.processes() if str(alone.parent / "fake0") in " ".join(each.cmdline())]
        assert [each.pid for each in servers] == [daemon.router()["pid"]]


def test_c11_a_client_that_leaves(make: Make) -> None:
    """C11: a restart goes on although the client that waits for it has hung up in the middle of it."""
    with make(start_s=0.5) as daemon:
        before = daemon.wait_for_router("ready")["pid"]
        with closing(UnixConnection(daemon.socket)) as connection:
            connection.request("POST", "/control/v1/routers/main/restart?wait=true")
            daemon.wait_for_event("RouterExited")
        assert daemon.router()["state"] != "ready"
        after = daemon.wait_for_event("RouterReady", lambda event: event["pid"] != before)["pid"]
        assert daemon.router()["pid"] == after
        assert [event["pid"] for event in daemon.events("RouterReady")] == [before, after]
        assert "Traceback" not in daemon.log.read_text(encoding="utf-8")
