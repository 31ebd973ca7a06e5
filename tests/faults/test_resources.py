"""R1 and R2: a disk that is full and descriptors that run out, under a real daemon with the real llama-server."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path

import anyio
import psutil
import pytest

from fakes.host import FakeHost
from fakes.machine import FakeChild, fake_models
from fakes.supervised import supervised
from fakes.waiting import eventually
from llamavisor.events import RouterDegraded
from llamavisor.generation import BINARY_POLL_S
from llamavisor.ledger import NAME, FootprintKey, Footprints, Ledger
from llamavisor.settings import RouterSettings
from llamavisor.states import ModelState
from llamavisord.acceptor import RESERVE
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon, UnixConnection

pytestmark = pytest.mark.real

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
CPU_MAX = 0.2
"""Of one core: whatever a daemon is short of, it must not wait for it in a loop."""


# --- R1: a full disk --------------------------------------------------------------------------------------------------


def on_small_disk(folder: Path, *, is_full: bool = False) -> list[str]:
    """What makes a program find a disk of 256 KiB at `folder`, of its own and gone with it, when it is put before it.

    The id of the daemon's installation stands on both sides of the mount: what it leaves behind is looked for outside.
    """
    folder.mkdir()
    (folder / "instance").write_text(f"{uuid.uuid4()}\n", encoding="ascii")
    script = 'set -e; id=$(cat "$1/instance"); mount -t tmpfs -o size=256k tmpfs "$1"; echo "$id" > "$1/instance"; '
    script += 'cat /dev/zero > "$1/filler" 2> /dev/null || true; ' if is_full else ""
    return [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script + 'shift; exec "$@"',
        "sh",
        str(folder),
    ]


def as_seen_by(pid: int, folder: Path) -> Path:
    """A folder in the mount namespace of another process."""
    return Path(f"/proc/{pid}/root{folder}")


def fill(disk: Path) -> None:
    """Leave no room."""
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(PAGE_BYTES)):
            pass
    assert os.statvfs(disk).f_bavail == 0


def warnings(daemon: RunningDaemon, subject: str) -> list[str]:
    """What the daemon has warned of."""
    return [event["text"] for event in daemon.events("Warned") if event["subject"] == subject]


def kill_router(daemon: RunningDaemon) -> None:
    """Kill it, and wait until another one has come up with what was loaded."""
    router = daemon.router()
    os.kill(router["pid"], signal.SIGKILL)
    eventually(lambda: daemon.router()["pid"] not in {None, router["pid"]}, what="another router")
    daemon.wait_for_router("ready")
    eventually(lambda: daemon.router()["loaded_count"] == router["loaded_count"], what="what was loaded")


def test_r1_a_disk_that_fills(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """R1: without room for state and logs models load and answer, a killed router comes back, and news waits."""
    daemon = RunningDaemon(tmp_path, models_dir, llama_server)
    daemon.launcher = on_small_disk(daemon.state_dir)
    with daemon:
        daemon.wait_for_router("ready")
        disk = as_seen_by(daemon.pid, daemon.state_dir)
        folder = disk / "routers" / "main"
        fill(disk)
        for name in ("alpha", "beta"):
            assert daemon.cli("load", name).returncode == 0
            assert daemon.chat(name) == f"I am {name}"
        log = disk / "logs" / "main.log"
        assert log.stat().st_size % PAGE_BYTES == 0, "llama-server should have met the end of the disk"
        assert daemon.cli("pin", "alpha").returncode == 0

        written = (folder / "preset.ini").stat()
        kill_router(daemon)
        assert daemon.chat("alpha") == "I am alpha"
        assert (folder / "preset.ini").stat() == written
        assert warnings(daemon, "router main") == []

        write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
        warned = eventually(lambda: warnings(daemon, "router main"), what="a warning")
        assert "No space left" in warned[0]
        assert "preset.ini" in warned[0]
        assert sorted(os.listdir(folder)) == ["cache", "config", "models", "preset.ini"], "no draft takes room"
        kill_router(daemon)
        for name in ("alpha", "beta", "gamma"):
            assert daemon.chat(name) == f"I am {name}"
        eventually(lambda: warnings(daemon, "ledger"), what="a warning of the ledger")
        assert os.statvfs(disk).f_bavail == 0

        (disk / "filler").unlink()
        eventually(lambda: daemon.models()["delta"]["state"] == "unloaded", what="the new model", within_s=60)
        assert daemon.chat("delta") == "I am delta"
        assert "delta.gguf" in (folder / "preset.ini").read_text(encoding="utf-8")
        assert daemon.router()["restarts"] == 2
        eventually(lambda: len(warnings(daemon, "ledger")) == 2, what="a ledger that is written", within_s=60)
        failed, recovered = warnings(daemon, "ledger")
        assert "No space left" in failed
        assert "written again" in recovered
        assert "alpha" in (disk / NAME).read_text(encoding="utf-8")


def test_r1_a_start_on_a_full_disk(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """R1: a daemon starts although it can write nothing, says what is wrong, and serves as soon as there is room."""
    daemon = RunningDaemon(tmp_path, models_dir, llama_server)
    daemon.launcher = on_small_disk(daemon.state_dir, is_full=True)
    with daemon:
        assert "No space left" in daemon.wait_for_router("backoff")["reason"]
        assert daemon.router()["hint"].startswith("make room")
        (as_seen_by(daemon.pid, daemon.state_dir) / "filler").unlink()
        daemon.wait_for_router("ready")
        assert daemon.chat("alpha") == "I am alpha"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk without a daemon."""
    folder = tmp_path / "disk"
    with subprocess.Popen([*on_small_disk(folder), "cat"], stdin=subprocess.PIPE) as holder:
        seen = as_seen_by(holder.pid, folder)
        eventually(lambda: os.path.ismount(seen) and (seen / "instance").exists(), what="a disk")
        yield seen
        assert holder.stdin is not None
        holder.stdin.close()


def test_r1_the_ledger(disk: Path) -> None:
    """R1: on a full disk what was learned is kept in memory, told once, and on the disk once there is room again."""
    footprints = Footprints()
    ledger = Ledger(disk / NAME, [footprints])
    keys = [FootprintKey(f"{at:032}", "options", "build") for at in range(200)]
    footprints.record(keys[0], {"RAM": 1})
    assert ledger.flush().is_written
    before = (disk / NAME).read_bytes()
    fill(disk)
    for at, key in enumerate(keys):
        footprints.record(key, {"RAM": at})
    assert "No space left" in ledger.flush().message
    assert ledger.flush().message == ""
    assert ledger.is_dirty
    assert (disk / NAME).read_bytes() == before
    assert sorted(os.listdir(disk)) == ["filler", "instance", NAME]
    (disk / "filler").unlink()
    flushed = ledger.flush()
    assert flushed.is_written
    assert "written again" in flushed.message
    again = Footprints()
    assert Ledger(disk / NAME, [again]).load() == ()
    assert [again.recall(key)[-1] for key in keys] == [{"RAM": at} for at in range(200)]


# --- R2: no descriptor left -------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon with one loaded model."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as running:
        load_alpha(running)
        yield running


def load_alpha(daemon: RunningDaemon) -> None:
    """Load a model, and wait until its process is watched."""
    daemon.wait_for_router("ready")
    assert daemon.cli("load", "alpha").returncode == 0
    eventually(lambda: daemon.model("alpha")["pid"], what="the pid of alpha")


def descriptors(daemon: RunningDaemon) -> dict[int, str]:
    """What the daemon has open."""
    folder, found = f"/proc/{daemon.pid}/fd", {}
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # closed meanwhile
            found[int(name)] = os.readlink(f"{folder}/{name}")
    return found


def held(daemon: RunningDaemon) -> Counter[str]:
    """What the daemon has open, but for its connections over TCP, which come and go."""
    before, found, after = tcp_sockets(daemon), descriptors(daemon), tcp_sockets(daemon)
    return Counter(what for what in found.values() if what not in before | after)


def assert_nothing_leaked(daemon: RunningDaemon, before: Counter[str]) -> None:
    """Wait until the daemon has nothing open that it did not have before."""

    def look() -> bool:
        assert not held(daemon) - before
        return True

    eventually(look)


def tcp_sockets(daemon: RunningDaemon) -> set[str]:
    """All sockets over TCP of the daemon's network, named as in /proc/PID/fd; the tenth field is the inode."""
    lines = Path(f"/proc/{daemon.pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return {f"socket:[{line.split()[9]}]" for line in lines}


def allow(daemon: RunningDaemon, descriptors: int) -> None:
    """Set the daemon's limit; what it starts gets the same, what runs keeps its own."""
    process = psutil.Process(daemon.pid)
    process.rlimit(psutil.RLIMIT_NOFILE, (descriptors, process.rlimit(psutil.RLIMIT_NOFILE)[1]))


def assert_calm(daemon: RunningDaemon, *, for_s: float = 2.0) -> None:
    """Look at the daemon for a while, and fail if it keeps a core busy."""
    process, began = psutil.Process(daemon.pid), time.monotonic()
    before = process.cpu_times()
    time.sleep(for_s)
    after = process.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    assert used_s / (time.monotonic() - began) < CPU_MAX


def connect(daemon: RunningDaemon, said: bytes = b"") -> socket.socket:
    """Somebody who connects to the control socket, and stops there or in the middle of a word."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(daemon.socket))  # waits while the backlog is full, which with a timeout it would not
    client.setblocking(False)
    with suppress(BrokenPipeError):  # its time may be over already
        client.send(said)
    return client


def is_open(client: socket.socket) -> bool:
    """Whether the daemon still holds the other end."""
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def test_r2_connections_that_say_nothing(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """R2: idle connections never take the descriptors that the daemon needs; the oldest ends for the next one."""
    daemon = RunningDaemon(tmp_path, models_dir, llama_server)
    daemon.launcher = ["prlimit", "--nofile=80:80"]  # a soft limit alone is raised
    with daemon, ExitStack() as clients:
        load_alpha(daemon)
        assert psutil.Process(daemon.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == 80
        before = held(daemon)
        follower = clients.enter_context(closing(UnixConnection(daemon.socket)))
        follower.request("GET", "/control/v1/events")
        stream = follower.getresponse()

        words = (b"", b"GET /control/v1/sta")
        idle = [clients.enter_context(connect(daemon, words[at % 2])) for at in range(300)]
        eventually(lambda: sum(map(is_open, idle)) < 80 // 4, what="an end of the others")
        assert is_open(idle[-1])
        assert not is_open(idle[0])
        assert_calm(daemon)
        assert daemon.status()["ready"]
        assert daemon.cli("load", "beta").returncode == 0
        while b'"ModelLoaded"' not in (line := stream.readline()) or b"beta" not in line:
            assert line, "a stream that somebody reads was cut"
        for name in ("alpha", "beta"):
            assert daemon.chat(name) == f"I am {name}"
        assert daemon.cli("unload", "beta").returncode == 0
        assert "llamavisor_" in daemon.metrics()
        assert daemon.router()["restarts"] == 0
        clients.close()
        assert "Too many open files" not in daemon.log.read_text(encoding="utf-8")
        assert_nothing_leaked(daemon, before)


def test_r2_no_descriptor_left(daemon: RunningDaemon) -> None:
    """R2: without a descriptor `status` is answered from a reserve, nothing spins or fills the log, models go on."""
    router, child = daemon.router()["pid"], daemon.model("alpha")["pid"]
    soft, _ = psutil.Process(daemon.pid).rlimit(psutil.RLIMIT_NOFILE)
    reserves = eventually(
        lambda: [at for at, what in descriptors(daemon).items() if at > 2 and what == os.devnull], what="reserves"
    )
    with ExitStack() as clients:
        allow(daemon, max(reserves) + 1)
        free = set(range(max(reserves))) - set(descriptors(daemon))
        for _ in range(len(free) + RESERVE + 2):
            clients.enter_context(connect(daemon))
        eventually(lambda: "cannot take a connection" in daemon.log.read_text(encoding="utf-8"), what="a warning")
        for _ in range(3):
            assert daemon.status()["pid"] == daemon.pid
        assert_calm(daemon, for_s=BINARY_POLL_S + 1)
        assert daemon.cli("status").stdout.startswith("llamavisor")
        assert daemon.chat("alpha") == "I am alpha"
        clients.close()
        allow(daemon, soft)
    eventually(lambda: daemon.status()["ready"], what="a daemon that has recovered")
    assert daemon.cli("load", "beta").returncode == 0
    assert daemon.chat("beta") == "I am beta"
    assert (daemon.router()["pid"], daemon.model("alpha")["pid"]) == (router, child)
    assert not [event for event in daemon.events("RouterDegraded") if "replaced" in event["reason"]]
    warned = warnings(daemon, "control socket")
    assert len(warned) == 1
    assert "Too many open files" in warned[0]
    assert len(daemon.log.read_text(encoding="utf-8").splitlines()) < 100


def test_r2_a_router_that_cannot_be_started(daemon: RunningDaemon) -> None:
    """R2: want of descriptors is waited out with backoff, recovered from, and leaves none open."""
    before = held(daemon)
    soft, _ = psutil.Process(daemon.pid).rlimit(psutil.RLIMIT_NOFILE)
    router = daemon.router()["pid"]
    allow(daemon, 3)
    os.kill(router, signal.SIGKILL)
    eventually(lambda: daemon.log.read_text(encoding="utf-8").count("(spawn, failure") >= 2, what="two tries")
    assert_calm(daemon)
    allow(daemon, soft)
    eventually(lambda: daemon.router()["pid"] not in {None, router}, what="another router")
    daemon.wait_for_router("ready")
    daemon.wait_for_model("alpha", "loaded")
    assert daemon.chat("alpha") == "I am alpha"
    delays = [event["delay_s"] for event in daemon.events("RouterRestartScheduled") if event["cause"] == "spawn"]
    assert len(delays) in {2, 3}
    assert all(later > delay >= 1 for delay, later in pairwise(delays))
    assert_nothing_leaked(daemon, before)


class Shortage(FakeHost):
    """A host without a descriptor to see with when a model's process ends."""

    is_over = False

    async def find_child(self, router_pid: int, model: str) -> FakeChild | None:
        """The process that serves the model."""
        child = await super().find_child(router_pid, model)
        return child and Unseen(self, child)


class Unseen(FakeChild):
    """A process whose end can be seen only when the shortage is over."""

    def __init__(self, host: Shortage, child: FakeChild) -> None:
        super().__init__(child.pid, child.port or 0)
        self.host, self.ended = host, child.ended

    async def wait(self) -> None:
        """Wait until it has ended."""
        if not self.host.is_over:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        await super().wait()


@pytest.mark.anyio
async def test_r2_a_model_that_cannot_be_watched_yet(tmp_path: Path, virtual_time: object) -> None:
    """R2: a model that is loaded while there is no descriptor to see its end with serves, and is watched later."""
    host = Shortage(RouterSettings(name="main", port=8080, models_dir=tmp_path), folder=tmp_path)
    host.models = fake_models(["alpha"])
    async with supervised(host) as it:
        await it.comes_up()
        assert await it.router.load("alpha")
        await anyio.sleep(60)
        assert it.model("alpha") is ModelState.LOADED
        assert it.story.of(RouterDegraded) == []
        host.is_over = True
        await anyio.sleep(2)
        it.process.lose_sight_of("alpha")
        await it.until(lambda: it.story.of(RouterDegraded), within_s=5)
        assert it.spawns == 1
