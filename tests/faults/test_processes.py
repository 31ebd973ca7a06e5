"""P1 to P12: routers and models that end, do not start, or leave something behind, with real processes.

P7 is told in test_memory.py and test_memory_processes.py. What takes minutes or hours runs on virtual time.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import Answer, BareRouter, free_port, make_slow
from fakes.host import FakeHost
from fakes.machine import FakeStart
from fakes.supervised import supervised
from fakes.waiting import PATIENCE_S, eventually
from llamavisor import procfs
from llamavisor.cause import Cause
from llamavisor.errors import SpawnError
from llamavisor.events import (
    RouterCrashLoop,
    RouterExited,
    RouterRestartScheduled,
    RouterSpawned,
    StraysKilled,
)
from llamavisor.process import TERM_GRACE_S, ExitStatus, Leftovers, Spawner
from llamavisor.restart import STABLE_AFTER_S
from llamavisor.states import RouterState
from running import RunningDaemon, config_of, start_with

Fake = Callable[..., FakeLlamaServer]
Start = Callable[..., RunningDaemon]
HOUR_S = 3600.0
SEEN_S = 1.0
"""How long the end of a process may go unseen."""


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon with three models on the true llama-server."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as running:
        running.wait_for_router("ready")
        yield running


@pytest.fixture
def copied(tmp_path: Path, llama_server: Path) -> Path:
    """The true llama-server with its libraries, in a folder of its own."""
    place = tmp_path / "bin"
    shutil.copytree(llama_server.parent, place, symlinks=True)
    return place / llama_server.name


def load(daemon: RunningDaemon, name: str) -> psutil.Process:
    """Load a model; its process."""
    assert daemon.cli("load", name).returncode == 0
    return psutil.Process(eventually(lambda: daemon.model(name)["pid"], what=f"the pid of {name}"))


def spawns(daemon: RunningDaemon) -> int:
    """How many routers were started so far."""
    return len(daemon.events("RouterSpawned"))


# --- P1: a router is killed -------------------------------------------------------------------------------------------


@pytest.mark.real
def test_p1_a_killed_router(daemon: RunningDaemon) -> None:
    """P1: its end is seen within a second and told as what it may be, its stopped child dies too, both come back."""
    router, children = psutil.Process(daemon.router()["pid"]), [load(daemon, name) for name in ("alpha", "beta")]
    children[0].suspend()  # it would not notice by itself that its router has gone
    killed_at = time.time()
    router.kill()
    exited = daemon.wait_for_event("RouterExited")
    assert exited["time"] - killed_at < SEEN_S
    assert (exited["pid"], exited["status"], exited["cause"]) == (router.pid, "SIGKILL", "signal")
    assert (exited["is_requested"], exited["detail"]) == (False, "ended by SIGKILL, possibly out of memory")
    assert f"pid {router.pid} ended unasked: ended by SIGKILL, possibly out of memory" in daemon.log.read_text()
    (planned,) = daemon.events("RouterRestartScheduled")
    assert 1.0 <= planned["delay_s"] <= 1.25
    recovered = daemon.wait_for_event("RouterRecovered")
    assert (sorted(recovered["models"]), recovered["missing"]) == (["alpha", "beta"], [])
    assert not any(process.is_running() for process in (router, *children))
    assert daemon.chat("alpha") == "I am alpha"
    assert 'llamavisor_router_restarts_total{reason="signal",router="main"} 1.0' in daemon.metrics()


# --- P2: a router that ends by itself ---------------------------------------------------------------------------------


@pytest.mark.real
def test_p2_exit_0_that_nobody_asked_for(daemon: RunningDaemon) -> None:
    """P2: a router that somebody else ends politely exits with 0, and is back; one that we were told to stop is not."""
    os.kill(daemon.router()["pid"], signal.SIGTERM)
    exited = daemon.wait_for_event("RouterExited")
    assert (exited["status"], exited["cause"], exited["is_requested"]) == ("exit code 0", "exit", False)
    eventually(lambda: spawns(daemon) == 2, what="another router")
    daemon.wait_for_router("ready")
    assert 'llamavisor_router_restarts_total{reason="exit",router="main"} 1.0' in daemon.metrics()
    assert daemon.cli("stop", "main").returncode == 0
    exited = daemon.events("RouterExited")[-1]
    assert (exited["status"], exited["is_requested"]) == ("exit code 0", True)
    time.sleep(2)  # a router that failed would be back after 1.25 s
    assert (daemon.router()["state"], spawns(daemon)) == ("stopped", 2)


@pytest.mark.anyio
async def test_p2_a_requested_stop_is_never_restarted(host: FakeHost, virtual_time: object) -> None:
    """P2: a router that was stopped stays down, for hours, and its end counts as asked for."""
    async with supervised(host) as it:
        await it.comes_up()
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        assert host.machine.left == []
        await anyio.sleep(2 * HOUR_S)
        assert it.spawns == 1
        assert [exited.is_requested for exited in it.story.of(RouterExited)] == [True]
        assert it.story.of(RouterRestartScheduled) == []
        assert it.router.process is None


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
        assert it.router.history.is_crash_loop
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
        assert (daemon.router()["state"], spawns(daemon)) == ("failed", 1)
        wrapped(tmp_path, llama_server, "set -- --nor-this-one")
        eventually(lambda: spawns(daemon) == 2, what="a try with the other binary")
        eventually(lambda: "--nor-this-one" in (daemon.router()["reason"] or ""), what="its words")
        assert daemon.router()["state"] == "failed"
        daemon.config.write_text(config % llama_server)
        assert daemon.cli("reload").returncode == 0
        daemon.wait_for_router("ready")
        assert spawns(daemon) == 3


def wrapped(folder: Path, llama_server: Path, command: str) -> Path:
    """The true llama-server behind a script, which runs this command before it becomes a router."""
    script = folder / "llama-server"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--models-preset*) {command};; esac\nexec {llama_server} "$@"\n', encoding="utf-8"
    )
    script.chmod(0o755)
    return script


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
        assert spawns(daemon) == 0
        if what == "not executable":
            copied.chmod(0o755)
        else:
            aside.replace(copied)
        if how == "by start":
            assert daemon.cli("start", "main").returncode == 0
            assert daemon.router()["state"] == "ready"
        daemon.wait_for_router("ready")
        assert daemon.chat("alpha") == "I am alpha"
        assert spawns(daemon) == 1


def test_p5_a_fixed_binary_is_tried_again(start: Start, tmp_path: Path) -> None:
    """P5: a llama-server that ends with a complaint of its loader is tried again by itself when it is replaced."""
    complaint = "llama-server: error while loading shared libraries: libggml.so: cannot open shared object file"
    with start(start_failures=-1, start_line=complaint) as daemon:
        assert "libggml.so" in daemon.wait_for_router("failed")["reason"]
        FakeLlamaServer.make(tmp_path / "fake0")
        daemon.wait_for_router("ready")
        assert spawns(daemon) == 2


# --- P6: a model that crashes in a loop -------------------------------------------------------------------------------


@pytest.mark.real
def test_p6_one_model_crashes_in_a_loop(daemon: RunningDaemon, models_dir: Path) -> None:
    """P6: who dies again and again before its first answer is left alone for a while, and nobody else is affected."""
    make_slow(models_dir, "slow")
    daemon.wait_for_model("slow", "unloaded")
    router, beta = daemon.router()["pid"], load(daemon, "beta")
    refused = crash_until_refused(daemon, "slow")
    assert refused.status == 503
    assert "slow" in refused.text
    (alone,) = quarantined(daemon)
    assert (alone["model"], alone["router"], alone["failures"]) == ("slow", "main", 1)
    assert 20 < alone["left_s"] <= 30
    assert 20 < int(refused.headers["Retry-After"]) <= 30
    assert daemon.chat("beta") == "I am beta"
    assert daemon.chat("gamma") == "I am gamma"
    counted = [line for line in daemon.metrics().splitlines() if line.startswith("llamavisor_model_quarantines_total")]
    assert counted == ['llamavisor_model_quarantines_total{model="slow",router="main"} 1.0']
    assert (daemon.router()["pid"], daemon.router()["restarts"], beta.is_running()) == (router, 0, True)


def crash_until_refused(daemon: RunningDaemon, model: str) -> Answer:
    """Crash a model's process whenever there is one, until nobody tries again for a client who wants it."""
    killed: set[int] = set()
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(ask, daemon, model)
        while not answer.done():
            child = daemon.model(model)["pid"]
            if child is not None and child not in killed:
                killed.add(child)
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGSEGV)
            time.sleep(0.01)
        assert killed
        return answer.result()


def ask(daemon: RunningDaemon, model: str) -> Answer:
    """What a client gets who wants to chat with a model."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as connection:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read().decode("utf-8"))


def quarantined(daemon: RunningDaemon) -> list[dict[str, Any]]:
    """The models that are left alone."""
    return list(daemon.call("GET", "/control/v1/ps")[1]["quarantined"])


# --- P8: a router that ignores SIGTERM --------------------------------------------------------------------------------


def test_p8_a_router_that_ignores_sigterm(start: Start) -> None:
    """P8: it is killed after ten seconds, which is told once, and the command that stops it returns."""
    with start(ignore_sigterm=True) as daemon:
        router = psutil.Process(daemon.wait_for_router("ready")["pid"])
        began = time.monotonic()
        assert daemon.cli("stop", "main", timeout_s=2 * TERM_GRACE_S).returncode == 0
        assert TERM_GRACE_S <= time.monotonic() - began < TERM_GRACE_S + 3
        assert not router.is_running()
        assert daemon.router()["state"] == "stopped"
        told = [line for line in daemon.log.read_text().splitlines() if "SIGKILL" in line]
        assert len(told) == 1, told


# --- P9: what a router leaves behind ----------------------------------------------------------------------------------


def test_p9_a_child_in_a_session_of_its_own(start: Start) -> None:
    """P9: a process that called setsid and that a killed router leaves behind is killed and counted."""
    with start(grandchild="setsid") as daemon:
        router = psutil.Process(daemon.wait_for_router("ready")["pid"])
        (left,) = router.children()
        assert os.getsid(left.pid) != router.pid
        router.kill()
        assert daemon.wait_for_event("StraysKilled")["pids"] == [left.pid]
        assert not left.is_running()
        daemon.wait_for_event("RouterReady", lambda event: event["pid"] != router.pid)
        assert "llamavisor_orphans_reaped_total 1.0" in daemon.metrics()


@pytest.mark.anyio
async def test_p9_what_a_stable_router_leaves_behind(host: FakeHost, virtual_time: object) -> None:
    """P9: it is told also when the next router starts without a delay."""
    left = Leftovers(killed=(77,))
    host.starts.append(FakeStart(ends_at=2 * STABLE_AFTER_S, leftovers=left, status=ExitStatus(signal=signal.SIGKILL)))
    async with supervised(host) as it:
        await it.comes_up()
        await it.until(lambda: it.spawns == 2)
        assert [event.delay_s for event in it.story.of(RouterRestartScheduled)] == [0]
        assert it.story.of(StraysKilled) == [StraysKilled(router="main", pids=(77,))]
        assert [event.cause for event in it.story.of(RouterSpawned)] == [None, Cause.SIGNAL]


# --- P10: somebody else's llama-server --------------------------------------------------------------------------------


@pytest.mark.real
def test_p10_a_foreign_llama_server(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """P10: one of the same user, on our port, is named in `status` and outlives whatever becomes of us."""
    with BareRouter(llama_server, tmp_path / "foreign", models_dir) as foreign:
        flags = ["--port", str(foreign.port)]
        daemon = RunningDaemon(tmp_path, models_dir, llama_server, flags=flags, serve="router")
        with daemon:
            failed = daemon.wait_for_router("failed")
            holder = f"port {foreign.port} on 127.0.0.1 is taken by llama-server (pid {foreign.pid})"
            assert holder in failed["reason"]
            assert holder in daemon.cli("status").stdout
            assert daemon.cli("restart", "main").returncode != 0
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            daemon.start()  # it sweeps what was its own
            eventually(daemon.is_live, what="a daemon that answers")
            daemon.wait_for_router("failed")
            assert daemon.events("RouterSpawned") == []
            assert foreign.call("GET", "/health").status == 200
            foreign.stop()
            daemon.wait_for_router("ready")


# --- P11: a machine without room for another process ------------------------------------------------------------------


USER = 54321
"""Nobody's: what is counted against its limits is ours alone."""


def as_user() -> list[str]:
    """What makes a program of root that of a user who may read and write what root may, and no more than that."""
    if os.geteuid() != 0:
        return []
    capabilities = "-all,+dac_override,+dac_read_search"
    options = (f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    return ["setpriv", *options, f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]


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
        assert zombies_of(daemon) == set()
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


# --- P12: zombies -----------------------------------------------------------------------------------------------------


def test_p12_zombies_of_a_router_that_ends(start: Start) -> None:
    """P12: ended processes that nobody waits for are reaped once they are handed to the daemon."""
    with start(zombies=5) as daemon:
        router = psutil.Process(daemon.wait_for_router("ready")["pid"])
        assert [child.status() for child in router.children()] == [psutil.STATUS_ZOMBIE] * 5
        router.kill()
        assert daemon.wait_for_event("RouterExited")["status"] == "SIGKILL"
        eventually(lambda: not zombies_of(daemon), what="no zombies", within_s=2.5)


@pytest.mark.real
def test_p12_an_orphan_that_ends_later(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """P12: one that was handed over alive is reaped by the second look after its end, and nobody's status is stolen."""
    orphan = tmp_path / "orphan"
    wrapper = wrapped(tmp_path, llama_server, f"(sleep 1 & echo $! > {orphan})")
    with RunningDaemon(tmp_path, models_dir, wrapper) as daemon:
        daemon.wait_for_router("ready")
        known = procfs.identify(int(orphan.read_text()))
        assert known is not None
        stat = procfs.stat(known.pid)
        assert stat is not None
        assert stat.parent == daemon.pid
        eventually(lambda: known.pid in zombies_of(daemon), what="its end")
        eventually(lambda: not known.is_current, what="its reaping", within_s=2.5)
        for number, status in ((signal.SIGTERM, "exit code 0"), (signal.SIGKILL, "SIGKILL")):
            ends = len(daemon.events("RouterExited"))
            os.kill(daemon.wait_for_router("ready")["pid"], number)
            eventually(lambda ends=ends: len(daemon.events("RouterExited")) > ends, what="an end")
            assert daemon.events("RouterExited")[-1]["status"] == status


def zombies_of(daemon: RunningDaemon) -> set[int]:
    """The ended children that nobody has waited for."""
    found = set()
    for child in psutil.Process(daemon.pid).children():
        with suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found
