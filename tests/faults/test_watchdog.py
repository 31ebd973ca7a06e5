"""Faults of the daemon itself, under what looks after it: systemd's watchdog, and a container that has no init."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.waiting import eventually
from running import RunningDaemon
from systemd.sandbox import Systemd

Fake = Callable[..., FakeLlamaServer]

WATCHDOG_S = 4
UNIT = f"""
[Unit]
StartLimitIntervalSec=0

[Service]
Type=notify
WatchdogSec={WATCHDOG_S}
Restart=always
RestartSec=100ms
KillMode=mixed
LimitCORE=0
TimeoutStopSec=5
"""

BLOCKED = """
async def bug(self: Daemon) -> None:
    time.sleep(60)  # on the event loop
"""
STUCK_OWNER = """
async def stuck(self: Inbox) -> None:
    await anyio.sleep_forever()

async def bug(self: Daemon) -> None:
    Inbox.take = stuck
"""
PROGRAM = """
import time
import anyio
from llamavisor.inbox import Inbox
from llamavisord.cli import main
from llamavisord.daemon import Daemon
{bug}
Daemon.try_reload = bug  # what SIGHUP calls
raise SystemExit(main())
"""


@contextmanager
def as_a_unit(systemd: Systemd, daemon: RunningDaemon) -> Iterator[None]:
    """Run a daemon as llamavisor.service; in the end stop it, and nothing may be left of it."""
    environment = "".join(f"Environment={shlex.quote(f'{name}={text}')}\n" for name, text in daemon.env.items())
    start = shlex.join(daemon.argv).replace("%", "%%")
    systemd.write_unit("llamavisor.service", f"{UNIT}{environment}ExecStart={start}\n")
    systemd.run("systemctl", "start", "llamavisor.service")
    yield
    systemd.run("systemctl", "stop", "llamavisor.service")
    assert systemd.show("llamavisor.service", "Result", "ActiveState") == {
        "Result": "success",
        "ActiveState": "inactive",
    }
    assert not list(daemon.processes())


@pytest.mark.parametrize(
    ("bug", "trace", "answers"),
    [
        pytest.param(BLOCKED, "in bug", False, id="the event loop is blocked"),
        pytest.param(STUCK_OWNER, "in run", True, id="the owner of a router is stuck"),
    ],
)
def test_d7_a_daemon_that_hangs_is_ended_and_started_again(
    tmp_path: Path, models_dir: Path, fake_llama_server: Fake, bug: str, trace: str, answers: bool
) -> None:
    """D7: nobody pings the watchdog of systemd: SIGABRT, every thread's stack in the journal, and a daemon that serves.

    Before that it is pinged for longer than the watchdog waits; of the daemon that hung nothing is left.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(bug=bug))
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server())
    daemon.program = [sys.executable, str(program)]
    with Systemd(tmp_path) as systemd, as_a_unit(systemd, daemon):
        daemon.wait_for_router("ready")
        ready = {
            "ActiveState": "active",
            "NRestarts": "0",
            "StatusText": "router main is ready with 0 of 3 models loaded",
        }
        eventually(lambda: systemd.show("llamavisor.service", *ready) == ready)
        before = list(daemon.processes())
        assert before
        time.sleep(1.5 * WATCHDOG_S)
        assert systemd.show("llamavisor.service", *ready) == ready
        systemd.run("systemctl", "kill", "--signal=HUP", "--kill-who=main", "llamavisor.service")
        if answers:
            time.sleep(0.5)
            assert daemon.call("GET", "/livez")[0] == 200
        eventually(lambda: systemd.show("llamavisor.service", "NRestarts") == {"NRestarts": "1"})
        eventually(lambda: systemd.show("llamavisor.service", "ActiveState") == {"ActiveState": "active"})
        daemon.wait_for_router("ready")
        assert not [process for process in before if process.is_running()]
        journal = systemd.journal("llamavisor.service")
        assert "Watchdog timeout" in journal
        assert "Failed with result 'watchdog'" in journal
        assert "Fatal Python error: Aborted" in journal
        assert trace in journal.partition("Fatal Python error: Aborted")[2]


def test_d7_a_stop_that_takes_longer_than_the_watchdog_waits(
    tmp_path: Path, models_dir: Path, fake_llama_server: Fake
) -> None:
    """D7: a daemon whose router takes ten seconds to end asks for that time, and is not taken for one that hangs."""
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(ignore_sigterm=True))
    with Systemd(tmp_path) as systemd, as_a_unit(systemd, daemon):
        daemon.wait_for_router("ready")
        began = time.monotonic()
        systemd.run("systemctl", "stop", "llamavisor.service", timeout_s=30)
        assert time.monotonic() - began > 2 * WATCHDOG_S
        journal = systemd.journal("llamavisor.service")
        assert "Watchdog" not in journal
        assert "timed out" not in journal


def test_d7_without_systemd_a_stall_is_a_metric(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """D7: how long the event loop was blocked is told in the metrics for ten seconds after it is over."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(bug=BLOCKED.replace("sleep(60)", "sleep(4)")))
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server())
    daemon.program = [sys.executable, str(program)]

    def lag_s() -> float:
        line = next(line for line in daemon.metrics().splitlines() if line.startswith("llamavisor_event_loop_lag_sec"))
        return float(line.split()[1])

    with daemon:
        daemon.wait_for_router("ready")
        assert lag_s() < 3.0
        daemon.signal(signal.SIGHUP)
        eventually(lambda: lag_s() >= 3.0)
        time.sleep(1.0)
        assert 3.0 <= lag_s() < 10.0


@pytest.fixture
def container() -> list[str]:
    """What runs before a program, so that it is process 1 of a pid namespace, with no init."""
    launcher = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL", "--"]
    tried = subprocess.run([*launcher, "true"], check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no pid namespace: {tried.stderr.strip()}")
    return launcher


@contextmanager
def ended(process: psutil.Process) -> Iterator[None]:
    """See that a process does not outlive a failing test."""
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_d10_pid_1(tmp_path: Path, models_dir: Path, fake_llama_server: Fake, container: list[str]) -> None:
    """D10: as process 1 it serves, reaps what is not its own, brings a router back, and ends with all on SIGTERM."""
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server())
    daemon.launcher = container
    with daemon:
        (inside,) = psutil.Process(daemon.pid).children()
        with ended(inside):
            daemon.wait_for_router("ready")
            assert daemon.status()["pid"] == 1
            assert daemon.chat("alpha") == "I am alpha"

            # Somebody else's process leaves children behind; they come to process 1, and end.
            enter = ["nsenter", f"--target={inside.pid}", "--pid", "--mount", "--"]
            subprocess.run([*enter, "sh", "-c", "sleep 0.1 & sleep 0.2 & exit 0"], check=True, timeout=10)
            strays = [child for child in inside.children() if child.name() == "sleep"]
            assert len(strays) == 2
            eventually(lambda: not any(stray.is_running() for stray in strays), what="no zombies")

            router = daemon.router()
            subprocess.run([*enter, "kill", "-KILL", str(router["pid"])], check=True, timeout=10)
            eventually(lambda: daemon.router()["restarts"] == 1)
            daemon.wait_for_router("ready")
            assert daemon.router()["pid"] != router["pid"]

            inside.terminate()
            assert daemon.wait() == 0
            assert "stopping: SIGTERM" in daemon.log.read_text(encoding="utf-8")
            assert not list(daemon.processes())
