"""D5, and what it means for P10 and N1: a daemon is killed, and what it leaves behind is known from everything else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from fakes.bare_router import BareRouter, free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

SWEPT_S = 5.0
"""How long a new daemon may take to be rid of what another one has left."""


@contextmanager
def streaming(daemon: RunningDaemon, model: str) -> Iterator[Iterator[bytes]]:
    """The lines of an answer through a daemon's gateway, as they come."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as connection:
        body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "hi"}}]}}'
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        with closing(connection.getresponse()) as response:
            assert response.status == 200
            yield (line for line in response if line.startswith(b"data:"))


def kill(daemon: RunningDaemon) -> None:
    """Kill a daemon without a word, and its main process only."""
    daemon.signal(signal.SIGKILL)
    daemon.wait()


def come_back(daemon: RunningDaemon) -> float:
    """Start it again; how long it took, from when it had taken its socket, to be rid of what was left."""
    daemon.start()
    eventually(daemon.is_live, what="a daemon that answers")
    return float(daemon.wait_for_event("StraysKilled")["time"]) - daemon.socket.stat().st_mtime


def test_d5_its_router_goes_along(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """D5: when the daemon is killed the kernel ends its router, and models go with that; the next one starts clean."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        kill(daemon)
        eventually(lambda: not list(daemon.processes()), what="the end of all that it had started")
        daemon.start()
        eventually(daemon.is_live, what="a daemon that answers")
        daemon.wait_for_router("ready")
        assert daemon.events("StraysKilled") == []


def test_d5_only_what_is_its_own(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """D5: a deaf router and its model are gone within five seconds, before another is started; neighbours go on.

    P10: these are another instance with a client amid an answer, and a llama-server of the same user.
    """
    write_tiny_model(models_dir / "ever.gguf", ["on", "and"], loop=True, n_layer=100, n_ctx=20_000)
    for name in ("victim", "neighbour"):
        (tmp_path / name).mkdir()
    with (
        RunningDaemon(tmp_path / "neighbour", models_dir, llama_server) as neighbour,
        RunningDaemon(tmp_path / "victim", models_dir, llama_server) as victim,
        BareRouter(llama_server, tmp_path / "foreign", models_dir) as foreign,
    ):
        neighbour.wait_for_router("ready")
        assert neighbour.cli("load", "beta").returncode == 0
        victim.wait_for_router("ready")
        assert victim.cli("load", "alpha").returncode == 0
        model = eventually(lambda: victim.model("alpha")["pid"], what="the pid of alpha")
        left = [psutil.Process(victim.router()["pid"]), psutil.Process(model)]
        with streaming(neighbour, "ever") as words:
            next(words)
            others = {process.pid for process in neighbour.processes()}
            for process in left:
                process.suspend()
            kill(victim)
            time.sleep(0.2)
            assert all(process.status() == psutil.STATUS_STOPPED for process in left), "nobody has ended them"
            assert come_back(victim) < SWEPT_S
            first, *_ = victim.events()
            assert first["event"] == "StraysKilled", "before anything is started"
            assert {process.pid for process in left} <= set(first["pids"])
            assert not set(first["pids"]) & (others | {foreign.pid, neighbour.pid})
            victim.wait_for_router("ready")
            assert not any(process.is_running() and process.status() != "zombie" for process in left)
            assert f"llamavisor_orphans_reaped_total {len(first['pids'])}.0" in victim.metrics()
            for _ in range(20):
                next(words)
        assert {process.pid for process in neighbour.processes()} == others
        for kind in ("RouterExited", "ModelUnloaded", "StraysKilled"):
            assert neighbour.events(kind) == []
        assert neighbour.chat("beta") == "I am beta"
        assert foreign.call("GET", "/health").status == 200
        assert victim.chat("alpha") == "I am alpha"


def test_d5_wherever_it_has_gone(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """D5: what carries its mark is its own, in a session of its own and a child of nobody who knows it, too."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        daemon.wait_for_router("ready")
        mark = (daemon.state_dir / "instance").read_text(encoding="ascii").strip()
        env = {"LLAMAVISOR_INSTANCE": mark}
        other_env = {"LLAMAVISOR_INSTANCE": f"{mark}0"}
        argv = ["sleep", "600"]
        with (
            subprocess.Popen(argv, env=env, start_new_session=True) as ours,
            subprocess.Popen(argv, env=other_env, start_new_session=True) as other,
        ):
            try:
                kill(daemon)
                assert come_back(daemon) < SWEPT_S
                assert ours.wait(PATIENCE_S) == -signal.SIGKILL
                assert other.poll() is None
            finally:
                ours.kill()
                other.kill()


def test_n1_an_orphan_of_ours_on_the_port(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """N1: a port that clients know and that a router of an earlier daemon still holds is free in time for the next."""
    with RunningDaemon(tmp_path, models_dir, llama_server, serve="router") as daemon:
        router = daemon.wait_for_router("ready")["pid"]
        os.kill(router, signal.SIGSTOP)
        kill(daemon)
        assert come_back(daemon) < SWEPT_S
        assert daemon.wait_for_router("ready")["pid"] != router
        assert daemon.events("RouterFailed") == []
        assert daemon.events("StraysKilled")[0]["pids"].count(router) == 1
        assert daemon.chat("alpha") == "I am alpha"


def test_n1_a_stranger_on_the_port(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """N1: who holds a fixed port is named and not touched; the router is FAILED until he goes, then READY by itself.

    P10: here another instance of ours.
    """
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    with RunningDaemon(tmp_path / "a", models_dir, llama_server, serve="router") as first:
        first.wait_for_router("ready")
        flags = ["--port", str(first.port)]
        with RunningDaemon(tmp_path / "b", models_dir, llama_server, flags=flags, serve="router") as second:
            failed = second.wait_for_router("failed")
            holder = f"port {first.port} on 127.0.0.1 is taken by llama-server (pid {first.router()['pid']})"
            assert holder in failed["reason"]
            assert holder in second.cli("status").stdout
            assert failed["hint"]
            assert first.chat("alpha") == "I am alpha"
            time.sleep(2)
            assert (second.router()["state"], second.events("RouterSpawned")) == ("failed", [])
            assert first.cli("stop", "main").returncode == 0
            second.wait_for_router("ready")


def test_n1_two_ports_of_one_configuration(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """N1: of two routers the one whose port is free is not held up by the other."""
    taken, free = free_port(), free_port()
    config = f'serve = "router"\nmodels_dir = "{models_dir}"\n[metrics]\nenabled = false\n[defaults]\nthreads = 1\n'
    config += f'[[router]]\nname = "a"\nport = {taken}\n[[router]]\nname = "b"\nport = {free}\n'
    with (
        BareRouter(llama_server, tmp_path / "foreign", models_dir, port=taken) as foreign,
        RunningDaemon(tmp_path, models_dir, llama_server, config=config) as daemon,
    ):
        assert f"(pid {foreign.pid})" in daemon.wait_for_router("failed", "a")["reason"]
        daemon.wait_for_router("ready", "b")
        assert daemon.chat("beta", port=free) == "I am beta"
