"""P1, P2, P6, P8 to P10 and P12: routers and models that end, and what they leave behind, with real processes.

P3 to P5 and P11 are told in test_starts.py, P7 in test_memory.py and test_memory_processes.py.
What takes minutes or hours runs on virtual time.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
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
from fakes.bare_router import Answer, BareRouter, make_slow
from fakes.host import FakeHost
from fakes.machine import FakeStart
from fakes.supervised import supervised
from fakes.waiting import PATIENCE_S, eventually
from llamavisor import procfs
from llamavisor.cause import Cause
from llamavisor.events import (
    RouterExited,
    RouterRestartScheduled,
    RouterSpawned,
    StraysKilled,
)
from llamavisor.process import TERM_GRACE_S, ExitStatus, Leftovers
from llamavisor.restart import STABLE_AFTER_S
from llamavisor.states import RouterState
from running import RunningDaemon, as_user, wrapped

Fake = Callable[..., FakeLlamaServer]
Start = Callable[..., RunningDaemon]
HOUR_S = 3600.0
SEEN_S = 1.0
"""How long the end of a process may go unseen."""
REAPED_S = 10.0
"""Two looks at what was handed over, one a second, also on a busy machine."""


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon with three models on the true llama-server."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as running:
        running.wait_for_router("ready")
        yield running


def load(daemon: RunningDaemon, name: str) -> psutil.Process:
    """Load a model; its process."""
    assert daemon.cli("load", name).returncode == 0
    return psutil.Process(eventually(lambda: daemon.model(name)["pid"], what=f"the pid of {name}"))


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
    eventually(lambda: daemon.spawns == 2, what="another router")
    daemon.wait_for_router("ready")
    assert 'llamavisor_router_restarts_total{reason="exit",router="main"} 1.0' in daemon.metrics()
    assert daemon.cli("stop", "main").returncode == 0
    exited = daemon.events("RouterExited")[-1]
    assert (exited["status"], exited["is_requested"]) == ("exit code 0", True)
    time.sleep(2)  # a router that failed would be back after 1.25 s
    assert (daemon.router()["state"], daemon.spawns) == ("stopped", 2)


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
        assert daemon.cli("stop", "main", timeout_s=3 * TERM_GRACE_S).returncode == 0
        assert TERM_GRACE_S <= time.monotonic() - began < 2 * TERM_GRACE_S
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
@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_p10_a_foreign_llama_server(tmp_path: Path, models_dir: Path, llama_server: Path, whose: str) -> None:
    """P10: one of whatever user, on our port, is named in `status` and outlives whatever becomes of us."""
    program = tmp_path / "foreign-server"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(as_user())} {llama_server} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    with BareRouter(llama_server if whose == "ours" else program, tmp_path / "foreign", models_dir) as foreign:
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


# --- P12: zombies -----------------------------------------------------------------------------------------------------


def test_p12_zombies_of_a_router_that_ends(start: Start) -> None:
    """P12: ended processes that nobody waits for are reaped once they are handed to the daemon."""
    with start(zombies=5) as daemon:
        router = psutil.Process(daemon.wait_for_router("ready")["pid"])
        assert [child.status() for child in router.children()] == [psutil.STATUS_ZOMBIE] * 5
        router.kill()
        assert daemon.wait_for_event("RouterExited")["status"] == "SIGKILL"
        eventually(lambda: not daemon.zombies(), what="no zombies", within_s=REAPED_S)


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
        eventually(lambda: known.pid in daemon.zombies(), what="its end")
        eventually(lambda: not known.is_current, what="its reaping", within_s=REAPED_S)
        for number, status in ((signal.SIGTERM, "exit code 0"), (signal.SIGKILL, "SIGKILL")):
            ends = len(daemon.events("RouterExited"))
            os.kill(daemon.wait_for_router("ready")["pid"], number)
            eventually(lambda ends=ends: len(daemon.events("RouterExited")) > ends, what="an end")
            assert daemon.events("RouterExited")[-1]["status"] == status
