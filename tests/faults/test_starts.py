"""P3 to P5 and P11: routers that do not come up, or cannot even be started.

What takes minutes or hours runs on virtual time.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import free_port
from fakes.host import FakeHost
from fakes.machine import FakeStart
from fakes.supervised import supervised
from fakes.waiting import eventually
from llamavisor.errors import SpawnError
from llamavisor.events import (
    RouterCrashLoop,
    RouterExited,
    RouterRestartScheduled,
)
from llamavisor.process import Spawner
from llamavisor.states import RouterState
from running import RunningDaemon, as_user, config_of, start_with, wrapped

Fake = Callable[..., FakeLlamaServer]
Start = Callable[..., RunningDaemon]


@pytest.fixture
def copied(tmp_path: Path, llama_server: Path) -> Path:
    """The true llama-server with its libraries, in a folder of its own."""
    place = tmp_path / "bin"
    shutil.copytree(llama_server.parent, place, symlinks=True)
    return place / llama_server.name


# --- P3: a router that does not come up -------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_p3_twenty_crashes_before_ready(host: FakeHost, virtual_time: object) -> None:
    """P3: the delays are 1, 2, 4 ... 60 s, a crash loop is raised once, at 10, and the retries never end."""
    host.usual = FakeStart(ready_at=math.inf, ends_at=0.2)
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.spawns == 21)
        delays = [scheduled.delay_s for scheduled in it.story.of(RouterRestartScheduled)]
        assert delays == [1, 2, 4, 8, 16, 32, *[60] * 14]
        assert [loop.failures for loop in it.story.of(RouterCrashLoop)] == [10]
        ended = it.story.times(RouterExited)
        assert it.story.times(RouterCrashLoop) == [ended[9]]
        pauses = [spawn - end for end, spawn in zip(ended, host.machine.spawned_at[1:], strict=True)]
        assert pauses == pytest.approx(delays, abs=0.05)
        assert all(pause >= delay for pause, delay in zip(pauses, delays, strict=True))
        assert it.router.comeback.history.is_crash_loop
        assert (it.router.restarts, it.router.state) == (20, RouterState.STARTING)


@pytest.mark.anyio
@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
async def test_p3_jitter(host: FakeHost, virtual_time: object, jitter: float) -> None:
    """P3: every one of these delays is longer by up to a quarter."""
    host.usual = FakeStart(ready_at=math.inf, ends_at=0.0)
    async with supervised(host, jitter=jitter) as it:
        it.router.start()
        await it.until(lambda: it.spawns == 21)
        spawned = host.machine.spawned_at
        pauses = [later - earlier for earlier, later in itertools.pairwise(spawned)]
        wanted = [delay * (1 + jitter / 4) for delay in [1, 2, 4, 8, 16, 32, *[60] * 14]]
        assert pauses == pytest.approx(wanted, abs=0.05)


@pytest.mark.anyio
async def test_p3_never_more_than_one_start_a_second(host: FakeHost, virtual_time: object) -> None:
    """P3: whatever mixture of ends a router meets, it is not started twice within a second."""
    ends_at = [0.0, 0.1, 10.06, 0.0, 25.0, 3.0, 10.1, 10.2, 0.0, 400.0, 0.0, 10.1]
    host.starts.extend(FakeStart(ready_at=0.02, ends_at=end) for end in ends_at)
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.spawns == len(ends_at) + 1)
        spawned = host.machine.spawned_at
        assert min(later - earlier for earlier, later in itertools.pairwise(spawned)) >= 1.0


def test_p3_the_first_crashes_for_real(start: Start) -> None:
    """P3: starts that fail for no clear reason are tried again after 1 s, 2 s, …, and come up when they can."""
    with start(start_failures=2, start_exit="SIGSEGV") as daemon:
        daemon.wait_for_router("ready")
        planned = [event["delay_s"] for event in daemon.events("RouterRestartScheduled")]
        assert [int(delay) for delay in planned] == [1, 2]
        spawned = [event["time"] for event in daemon.events("RouterSpawned")]
        pauses = [later - earlier for earlier, later in itertools.pairwise(spawned)]
        assert all(pause >= delay for pause, delay in zip(pauses, planned, strict=True))
        assert all(event["status"] == "SIGSEGV" for event in daemon.events("RouterExited"))
        assert daemon.router()["failures"] == 2
        metrics = daemon.metrics()
    assert 'llamavisor_router_consecutive_failures{router="main"} 2.0' in metrics
    assert 'llamavisor_router_crash_loop{router="main"} 0.0' in metrics


# --- P4: an option that llama-server does not take --------------------------------------------------------------------


@pytest.mark.real
def test_p4_a_bad_flag(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """P4: FAILED after the first try with llama-server's own last words; tried when binary or configuration changes."""
    wrapper = wrapped(tmp_path, llama_server, "set -- --no-such-flag")
    daemon = RunningDaemon(tmp_path, models_dir, wrapper, config="llama_server = ")
    config = f'llama_server = "%s"\n{config_of(models_dir, daemon.port)}'
    daemon.config.write_text(config % wrapper)
    with daemon:
        failed = daemon.wait_for_router("failed")
        assert failed["reason"] == "error: invalid argument: --no-such-flag"
        assert failed["hint"]
        assert any("--no-such-flag" in line for line in failed["log_tail"])
        assert "--no-such-flag" in daemon.cli("status").stdout
        time.sleep(3)  # what is tried again would be after 1.25 s
        assert (daemon.router()["state"], daemon.spawns) == ("failed", 1)
        wrapped(tmp_path, llama_server, "set -- --nor-this-one")
        eventually(lambda: daemon.spawns == 2, what="a try with the other binary")
        eventually(lambda: "--nor-this-one" in (daemon.router()["reason"] or ""), what="its words")
        assert daemon.router()["state"] == "failed"
        daemon.config.write_text(config % llama_server)
        assert daemon.cli("reload").returncode == 0
        daemon.wait_for_router("ready")
        assert daemon.spawns == 3


@pytest.mark.real
def test_p4_an_unknown_flag(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """P4: an option that this build does not have is told by its name without a start, and left alone."""
    with RunningDaemon(tmp_path, models_dir, llama_server, options=("--no-such-flag",)) as daemon:
        failed = daemon.wait_for_router("failed")
        assert "--no-such-flag" in failed["reason"]
        assert "--no-such-flag" in daemon.cli("status").stdout
        time.sleep(2)
        assert (daemon.router()["state"], daemon.events("RouterSpawned")) == ("failed", [])


# --- P5: a binary that cannot be started ------------------------------------------------------------------------------


def foreign_program(path: Path) -> None:
    """An ELF file that is right in all but the machine that it is for; see elf(5)."""
    machine = 0xB7 if os.uname().machine != "aarch64" else 0x3E
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    numbers = [(2, 2), (machine, 2), (1, 4), (0x400078, 8), (64, 8), (0, 8), (0, 4), (64, 2), (56, 2), (1, 2)]
    path.write_bytes(ident + b"".join(value.to_bytes(size, "little") for value, size in numbers) + bytes(62))
    path.chmod(0o755)


@pytest.mark.real
@pytest.mark.parametrize("how", ["by itself", "by start"])
@pytest.mark.parametrize(
    ("what", "told"),
    [("missing", "No such file"), ("not executable", "is not executable"), ("of another machine", "it is built for")],
)
def test_p5_a_binary_that_cannot_be_started(
    tmp_path: Path, models_dir: Path, copied: Path, what: str, told: str, how: str
) -> None:
    """P5: FAILED with the file and what is wrong, no start; READY once it is right, or somebody says start."""
    aside = copied.rename(copied.with_name("aside"))
    if what == "not executable":
        shutil.copy(aside, copied)
        copied.chmod(0o644)
    elif what == "of another machine":
        foreign_program(copied)
    with RunningDaemon(tmp_path, models_dir, copied) as daemon:
        failed = daemon.wait_for_router("failed")
        assert str(copied) in failed["reason"]
        assert told in failed["reason"]
        assert failed["hint"]
        assert daemon.spawns == 0
        if what == "not executable":
            copied.chmod(0o755)
        else:
            aside.replace(copied)
        if how == "by start":
            assert daemon.cli("start", "main").returncode == 0
            assert daemon.router()["state"] == "ready"
        daemon.wait_for_router("ready")
        assert daemon.chat("alpha") == "I am alpha"
        assert daemon.spawns == 1


def test_p5_a_fixed_binary_is_tried_again(start: Start, tmp_path: Path) -> None:
    """P5: a llama-server that ends with a complaint of its loader is tried again by itself when it is replaced."""
    complaint = "llama-server: error while loading shared libraries: libggml.so: cannot open shared object file"
    with start(start_failures=-1, start_line=complaint) as daemon:
        assert "libggml.so" in daemon.wait_for_router("failed")["reason"]
        FakeLlamaServer.make(tmp_path / "fake0")
        daemon.wait_for_router("ready")
        assert daemon.spawns == 2


# --- P11: a machine without room for another process ------------------------------------------------------------------


def allow_processes(daemon: RunningDaemon, number: int) -> None:
    """From now on its user may start a process from it only while there are fewer than so many, threads included."""
    subprocess.run([*as_user(), "prlimit", f"--pid={daemon.pid}", f"--nproc={number}:"], check=True)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder from which everybody may start programs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_p11_no_process_can_be_started(tmp_path: Path, models_dir: Path, public: Path) -> None:
    """P11: fork fails with EAGAIN, which is waited out with backoff; nothing is left of a try, and it recovers."""
    daemon = RunningDaemon(tmp_path, models_dir, FakeLlamaServer.make(public), options=())
    daemon.launcher = as_user()
    with daemon:
        router = daemon.wait_for_router("ready")["pid"]
        process = psutil.Process(daemon.pid)
        files = process.num_fds()
        allow_processes(daemon, 1)
        os.kill(router, signal.SIGKILL)
        daemon.wait_for_event("RouterRestartScheduled", lambda event: event["failures"] == 3)
        waiting = daemon.wait_for_router("backoff")
        assert "Resource temporarily unavailable" in waiting["reason"]
        assert waiting["hint"]
        assert daemon.cli("status").returncode == 0
        planned = daemon.events("RouterRestartScheduled")
        assert [event["cause"] for event in planned] == ["signal", "spawn", "spawn"]
        assert [int(event["delay_s"]) for event in planned] == [1, 2, 4]
        assert daemon.zombies() == set()
        eventually(lambda: process.num_fds() <= files, what="no more descriptors than before")
        allow_processes(daemon, 4096)
        assert daemon.wait_for_router("ready")["pid"] != router
        assert daemon.cli("load", "alpha").returncode == 0


def test_p11_no_thread_can_be_started(tmp_path: Path, models_dir: Path, public: Path) -> None:
    """P11: threads are processes too: with none for the work of several routers at once, the daemon goes on."""
    names = ("a", "b")
    routers = "".join(f'[[router]]\nname = "{name}"\nport = {free_port()}\n' for name in names)
    config = f'models_dir = "{models_dir}"\nserve = "router"\n[metrics]\nenabled = false\n{routers}'
    daemon = RunningDaemon(tmp_path, models_dir, FakeLlamaServer.make(public), config=config)
    start_with(
        daemon,
        "import time, anyio._backends._asyncio as threads, llamavisor.launch as launch\n"
        "threads.WorkerThread.MAX_IDLE_TIME = -1.0\n"  # all but one end as soon as they are idle
        "prepare = launch.Launcher._prepare\n"
        "def slow(*args):\n"
        "    time.sleep(0.5)\n"
        "    return prepare(*args)\n"
        "launch.Launcher._prepare = slow",
    )
    daemon.launcher = as_user()
    with daemon:
        killed = {name: daemon.wait_for_router("ready", name)["pid"] for name in names}
        process = psutil.Process(daemon.pid)
        eventually(lambda: process.num_threads() <= 2, what="only one thread beside the main one")
        allow_processes(daemon, 1)
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)
        for name in names:
            daemon.wait_for_event("RouterRestartScheduled", lambda event, name=name: event["router"] == name)
            eventually(lambda name=name: daemon.router(name)["failures"] >= 2, what="a try")
        assert daemon.cli("status").returncode == 0
        allow_processes(daemon, 4096)
        for name in names:
            assert daemon.wait_for_router("ready", name)["pid"] != killed[name]
    assert "Traceback" not in daemon.log.read_text()


def test_p11_no_process_to_ask_a_new_binary(tmp_path: Path, models_dir: Path, public: Path) -> None:
    """P11: a llama-server that nobody can ask what it can do, for want of a process, is not called a bad one."""
    daemon = RunningDaemon(tmp_path, models_dir, public / "llama-server", options=())
    daemon.launcher = as_user()
    with daemon:
        daemon.wait_for_router("failed")
        allow_processes(daemon, 1)
        FakeLlamaServer.make(public)
        assert "unavailable" in daemon.wait_for_router("backoff")["reason"]
        allow_processes(daemon, 4096)
        daemon.wait_for_router("ready")


@pytest.mark.anyio
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
async def test_p11_fork_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """P11: whatever fork fails with for want of something, it is worth another try, and nothing leaks meanwhile."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(SpawnError, match=os.strerror(number)) as caught:
        await Spawner("x").spawn(["/bin/true"], env={}, output=tmp_path / "log")
    assert not caught.value.is_permanent
