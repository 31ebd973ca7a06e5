"""D1 to D3, D6, D8, D9, D11, D12: a daemon that is told nonsense, ended, or left without what it was started with."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import free_port
from fakes.waiting import eventually
from llamavisor import procfs
from llamavisor.ledger import FORMAT, NAME, VERSION
from llamavisor.process import TERM_GRACE_S
from running import RunningDaemon, config_of, run_serve, start_with

Fake = Callable[..., FakeLlamaServer]
Start = Callable[..., RunningDaemon]
STOPS_S = 8.0
"""Less than the first grace of a router alone."""


# --- D1: a bad configuration at the start -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('models_dir = "/m"\nport = \n', ":2:"),
        ('models_dir = "/m"\n\nprot = 8080\n', ":3: prot"),
        ('models_dir = "/m"\nport = "many"\n', ":2: port"),
        ('models_dir = "/m"\n[defaults]\nctx_size = -5\n', ":3: defaults.ctx_size"),
        ('models_dir = "/m"\nport = 8080\n[metrics]\nport = 8080\n', "8080"),
    ],
    ids=["syntax", "key", "type", "value", "contradiction"],
)
def test_d1_a_bad_configuration(
    tmp_path: Path, models_dir: Path, fake_llama_server: Fake, text: str, told: str
) -> None:
    """D1: exit code 78 and a line with file, line and key; neither llama-server, nor socket, nor state folder."""
    fake = fake_llama_server()
    daemon = RunningDaemon(tmp_path, models_dir, fake, config=text)
    code, words = run_serve(daemon)
    assert code == 78
    assert str(daemon.config) in words
    assert told in words
    assert "Traceback" not in words
    assert fake.starts() == []
    assert not daemon.socket.exists()
    assert not daemon.state_dir.exists()
    assert daemon.cli("config", "check", "--config", str(daemon.config)).returncode == 78


# --- D2: a bad configuration in a reload ------------------------------------------------------------------------------


def test_d2_a_bad_file(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """D2: a bad configuration is refused as a whole and shown; the good one that follows is taken."""
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(), config="")
    good = f'models_dir = "{models_dir}"\nport = {daemon.port}\n[metrics]\nport = {daemon.metrics_port}\n'
    daemon.config.write_text(good)
    with daemon:
        before = daemon.wait_for_router("ready")["pid"]
        assert "llamavisor_config_last_reload_successful 1.0" in daemon.metrics()
        for bad in (f"{good}\nnonsense", good.replace("port", "prot"), good.replace(str(daemon.port), '"many"')):
            daemon.config.write_text(bad)
            status, problem = daemon.call("POST", "/control/v1/reload")
            assert (status, problem["status"]) == (422, 422)
            assert "llamavisor.toml" in problem["detail"]
            failed = daemon.cli("reload")
            assert failed.returncode == 78
            assert "llamavisor.toml" in failed.stderr
            assert daemon.status()["config_error"]
            assert "llamavisor.toml" in daemon.cli("status").stdout
            assert "llamavisor_config_last_reload_successful 0.0" in daemon.metrics()
        assert daemon.router()["pid"] == before
        daemon.config.write_text(good)
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.status()["config_error"] is None, what="the good configuration")
        assert "llamavisor_config_last_reload_successful 1.0" in daemon.metrics()
        assert daemon.router()["pid"] == before


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('models_dir = "', 'models_dir = "/nowhere', "/nowhere"),
        ("[metrics]", '[defaults]\nargs = ["--nosuchflag"]\n[metrics]', "--nosuchflag"),
        ("[metrics]", '[[router]]\nname = "b"\nport = {taken}\n[metrics]', "is taken"),
        ("port =", 'llama_server = "/bin/true"\nport =', "true"),
    ],
    ids=["folder", "option", "port", "binary"],
)
def test_d2_what_could_not_be_started(
    tmp_path: Path, models_dir: Path, fake_llama_server: Fake, old: str, new: str, told: str
) -> None:
    """D2: what parses but could not be started is refused as well, and what is loaded stays loaded."""
    good = config_of(models_dir, free_port())
    fake = fake_llama_server()
    with socket.create_server(("127.0.0.1", 0)) as holder:
        written = f'llama_server = "{fake}"\n{good}'
        daemon = RunningDaemon(tmp_path, models_dir, fake, config=written, serve="router")
        with daemon:
            before = daemon.wait_for_router("ready")["pid"]
            daemon.cli("load", "alpha")
            text = daemon.config.read_text()
            if "llama_server" in new:
                text = text.replace(f'llama_server = "{fake}"\n', "")
            daemon.config.write_text(text.replace(old, new.format(taken=holder.getsockname()[1]), 1))
            failed = daemon.cli("reload")
            assert failed.returncode == 78
            assert told in failed.stderr
            assert told in daemon.status()["config_error"]
            assert daemon.router()["pid"] == before
            assert daemon.model("alpha")["state"] == "loaded"
            assert [router["name"] for router in daemon.status()["routers"]] == ["main"]


# --- D3: a reload while a router is restarted or waits ----------------------------------------------------------------


def marked(models_dir: Path, port: int, mark: str) -> str:
    """A configuration whose router can be told from that of another one."""
    return config_of(models_dir, 1, f'[[router]]\nname = "main"\nport = {port}\nenv = {{ MARK = "{mark}" }}\n').replace(
        "port = 1\n", 'serve = "router"\n', 1
    )


def marks(fake: FakeLlamaServer) -> list[str]:
    """With which of them it was started, in order."""
    return [start["env"]["MARK"] for start in fake.starts()]  # type: ignore[index]


def routers_of(daemon: RunningDaemon) -> list[int]:
    """The processes that are routers."""
    return [each.pid for each in daemon.processes() if "--models-preset" in each.cmdline()]


def test_d3_a_reload_during_a_backoff(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """D3: a router that waits for its next try is tried with the new settings at once, and is there once."""
    fake, port = fake_llama_server(start_failures=-1, start_exit="SIGSEGV"), free_port()
    with RunningDaemon(tmp_path, models_dir, fake, config=marked(models_dir, port, "old")) as daemon:
        wait = daemon.wait_for_event("RouterRestartScheduled", lambda event: event["delay_s"] >= 4)
        fake.change()
        daemon.config.write_text(marked(models_dir, port, "new"))
        assert daemon.call("POST", "/control/v1/reload")[1]["changed"] == ["main"]
        pid = daemon.wait_for_router("ready")["pid"]
        due = wait["time"] + wait["delay_s"]
        assert daemon.events("RouterSpawned")[-1]["time"] < due
        assert marks(fake) == ["old"] * 3 + ["new"]
        time.sleep(max(0.0, due + 1.0 - time.time()))  # the try that was due comes to nothing
        assert (routers_of(daemon), daemon.router()["pid"]) == ([pid], pid)


@pytest.mark.parametrize("pause_s", [0.0, 0.3, 0.7])
def test_d3_a_reload_during_a_restart(
    tmp_path: Path, models_dir: Path, fake_llama_server: Fake, pause_s: float
) -> None:
    """D3: at whatever moment of a restart it comes, one router with the new settings is what is left."""
    fake, port = fake_llama_server(start_s=0.5), free_port()
    with RunningDaemon(tmp_path, models_dir, fake, config=marked(models_dir, port, "old")) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.call("POST", "/control/v1/routers/main/restart")[0] == 202
        time.sleep(pause_s)
        daemon.config.write_text(marked(models_dir, port, "new"))
        assert daemon.call("POST", "/control/v1/reload")[0] == 200
        eventually(lambda: marks(fake)[-1] == "new", what="the new settings")
        pid = daemon.wait_for_router("ready")["pid"]
        time.sleep(1)
        assert (routers_of(daemon), daemon.router()["pid"], daemon.router()["state"]) == ([pid], pid, "ready")
        assert marks(fake)[-1] == "new"


# --- D6: the end amid something else ----------------------------------------------------------------------------------


def test_d6_the_end_during_a_start(start: Start) -> None:
    """D6: a router that is not up yet ends with its daemon."""
    with start(start_s=60) as daemon:
        daemon.wait_for_event("RouterSpawned")
        assert daemon.router()["state"] == "starting"
        ends_soon(daemon)


def test_d6_the_end_during_a_backoff(start: Start) -> None:
    """D6: what was due is not waited for."""
    with start(start_failures=-1) as daemon:
        eventually(lambda: daemon.router()["failures"] >= 2, what="a wait of two seconds")
        daemon.wait_for_router("backoff")
        ends_soon(daemon)


def test_d6_the_end_during_a_stop(start: Start) -> None:
    """D6: a router that is being stopped and does not heed it is waited for no longer than its own grace."""
    with start(ignore_sigterm=True) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.call("POST", "/control/v1/routers/main/stop")[0] == 202
        daemon.wait_for_router("stopping")
        ends_soon(daemon, within_s=TERM_GRACE_S + 5)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_d6_a_second_signal_hurries(start: Start, second: signal.Signals) -> None:
    """D6: who asks twice does not wait for a router that ignores SIGTERM."""
    with start(ignore_sigterm=True) as daemon:
        daemon.wait_for_router("ready")
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_router("stopping")
        daemon.signal(second)
        assert daemon.wait() == 0
        assert time.monotonic() - began < STOPS_S


def test_d6_a_second_signal_hurries_a_drain(start: Start) -> None:
    """D6: nor for answers that are under way."""
    with start(model={"token_s": 10.0}) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        with socket.create_connection(("127.0.0.1", daemon.port)) as client:
            body = json.dumps({"model": "alpha", "stream": True, "messages": [{"role": "user", "content": "hi"}] * 100})
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(f"{head}{body}".encode())
            assert client.recv(1)
            began = time.monotonic()
            daemon.signal(signal.SIGTERM)
            daemon.wait_for_event("DaemonStopping")
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert time.monotonic() - began < STOPS_S


def ends_soon(daemon: RunningDaemon, *, within_s: float = STOPS_S) -> None:
    """It ends for one SIGTERM with exit code 0, and nothing of it is left; `with` looks at that."""
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - began < within_s
    assert list(daemon.processes()) == []


def test_d6_the_end_during_a_probe(tmp_path: Path, models_dir: Path) -> None:
    """D6: a llama-server that hangs when asked what it can do does not keep the daemon from ending."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    with RunningDaemon(tmp_path, models_dir, program, options=()) as daemon:
        assert daemon.router()["state"] == "starting"
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert time.monotonic() - began < STOPS_S  # the probe itself may take 30 s


# --- D8: a bug --------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_d8_a_bug(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """D8: an internal task that raises ends the daemon with exit code 1 and all that it started: never half alive."""
    daemon = RunningDaemon(tmp_path, models_dir, llama_server)
    trigger = tmp_path / "now"
    start_with(
        daemon,
        "import anyio, pathlib\n"
        "async def bug(daemon):\n"
        f"    while not pathlib.Path({str(trigger)!r}).exists(): await anyio.sleep(0.01)\n"
        "    raise ZeroDivisionError('a bug')\n"
        "app._measure_lag = bug",
    )
    with daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        assert len(list(daemon.processes())) == 3  # the folder's worker, the router, the model
        trigger.touch()
        assert daemon.wait() == 1
        assert "ZeroDivisionError: a bug" in daemon.log.read_text()
        assert "cleaning up before exit" in (daemon.state_dir / "logs" / "main.log").read_text()
        assert list(daemon.processes()) == []
        assert not daemon.socket.exists()


# --- D9: signals, and a log that nobody reads -------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["_lock_state", "become_subreaper"])
def test_d9_signals_while_it_starts(tmp_path: Path, models_dir: Path, fake_llama_server: Fake, place: str) -> None:
    """D9: a signal that comes before everything is up is not lost, and has the effect that it always has."""
    patch = (
        f"real = app.{place}\n"
        "def early(*args):\n"
        "    os.kill(os.getpid(), signal.{})\n"
        "    return real(*args)\n"
        f"app.{place} = early"
    )
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(), options=())
    for number in ("SIGTERM", "SIGINT"):
        start_with(daemon, patch.format(number))
        assert run_serve(daemon)[0] == 0
        assert not daemon.socket.exists()
        daemon.end()
    start_with(daemon, patch.format("SIGHUP"))
    with daemon:
        daemon.wait_for_event("ConfigReloaded")


def test_d9_signals_that_mean_nothing(start: Start) -> None:
    """D9: SIGUSR1, SIGUSR2 and SIGPIPE are ignored; llama-server inherits no disposition of ours."""
    with start() as daemon:
        router = daemon.wait_for_router("ready")["pid"]
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
            daemon.signal(number)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_event("ConfigReloaded")
        assert daemon.router()["pid"] == router
        masks = dict(line.split(":\t") for line in Path(f"/proc/{router}/status").read_text().splitlines())
        held = int(masks["SigBlk"], 16) | int(masks["SigIgn"], 16)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            assert not held & 1 << number - 1, number


def test_d9_a_log_that_nobody_reads(start: Start) -> None:
    """D9: a daemon whose stderr has gone goes on supervising."""
    reader, writer = os.pipe()
    daemon = start()
    daemon.start(output=writer)
    os.close(writer)
    os.close(reader)
    try:
        eventually(daemon.is_live, what="a daemon that answers")
        before = daemon.wait_for_router("ready")["pid"]
        os.kill(before, signal.SIGKILL)
        daemon.wait_for_event("RouterReady", lambda event: event["pid"] != before)
    finally:
        daemon.end()


CONTROLLED = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Runs a program in a session of its own, whose terminal is its standard output."""


def test_d9_a_terminal_that_is_closed(start: Start) -> None:
    """D9: the SIGHUP of a terminal that is closed is a reload like any other, and its log just goes nowhere."""
    ours, theirs = pty.openpty()
    daemon = start()
    daemon.launcher = [sys.executable, "-c", CONTROLLED]
    daemon.start(output=theirs)
    os.close(theirs)
    try:
        eventually(daemon.is_live, what="a daemon that answers")
        before = daemon.wait_for_router("ready")["pid"]
        os.close(ours)
        daemon.wait_for_event("ConfigReloaded")
        assert daemon.router()["pid"] == before
        os.kill(before, signal.SIGKILL)
        daemon.wait_for_event("RouterReady", lambda event: event["pid"] != before)
    finally:
        daemon.end()


# --- D11: what is left of an earlier daemon is not what it should be --------------------------------------------------


@contextmanager
def left_with(daemon: RunningDaemon, name: str, content: bytes) -> Iterator[RunningDaemon]:
    """A daemon that finds this in one of the files of the daemon before it."""
    daemon.state_dir.mkdir()
    (daemon.state_dir / name).write_bytes(content)
    with daemon:
        daemon.wait_for_router("ready")
        assert daemon.chat("alpha")
        yield daemon


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"format": "', "cut off"),
        (b"", "empty"),
        (json.dumps({"format": FORMAT, "version": VERSION + 1, "sections": {}}).encode(), "newer llamavisor"),
    ],
    ids=["truncated", "empty", "newer"],
)
def test_d11_a_ledger_that_cannot_be_used(start: Start, content: bytes, told: str) -> None:
    """D11: a warning, the file beside, and a daemon that begins anew."""
    with left_with(start(), NAME, content) as daemon:
        (warned,) = [event for event in daemon.events("Warned") if event["subject"] == "ledger"]
        assert told in warned["text"]
        assert (daemon.state_dir / f"{NAME}.bad").read_bytes() == content
        assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize(
    "content", [b"", b"1234-56", b"\xff\xfe", b"x" * 100_000], ids=["empty", "torn", "binary", "long"]
)
def test_d11_an_instance_that_cannot_be_read(start: Start, content: bytes) -> None:
    """D11: without the mark of what was its own the daemon takes another one, and says so."""
    with left_with(start(), "instance", content) as daemon:
        mark = (daemon.state_dir / "instance").read_text().strip()
        assert str(uuid.UUID(mark)) == mark
        assert psutil.Process(daemon.router()["pid"]).environ()["LLAMAVISOR_INSTANCE"] == mark
        assert "is no id of an installation" in daemon.log.read_text()


def test_d11_a_pid_that_means_another_process() -> None:
    """D11: a pid is ours with its start time and its boot alone; what has another of them is somebody else's."""
    ours = procfs.identify(os.getpid())
    assert ours is not None
    assert ours.is_current
    assert not replace(ours, start_ticks=ours.start_ticks - 1).is_current
    assert not replace(ours, boot_id=str(uuid.uuid4())).is_current


# --- D12: something hangs and does not let go -------------------------------------------------------------------------

HUNG = """
import threading
from llamavisor.threads import run_in_thread
async def hang(*_, **__): await run_in_thread(threading.Event().wait)
"""
"""What waits in a thread that is not abandoned, as for a dead mount: it cannot be cancelled."""
DOWNLOADS = "import llamavisor.downloads\nllamavisor.downloads.Downloads"


def ended_in_order(daemon: RunningDaemon) -> bool:
    """Whether the ledger says so."""
    written = json.loads((daemon.state_dir / NAME).read_text())
    return bool(written["sections"]["lives"]["has_ended"])


def test_d12_a_task_that_cannot_be_cancelled(start: Start) -> None:
    """D12: SIGTERM ends a daemon in order and in time although a thread of one of its tasks waits for ever."""
    daemon = start()
    start_with(daemon, f"{HUNG}{DOWNLOADS}.run = hang")
    with daemon:
        daemon.wait_for_router("ready")
        ends_soon(daemon)
        assert ended_in_order(daemon)
        assert not daemon.socket.exists()
        assert "something hangs" in daemon.log.read_text()


def test_d12_a_state_folder_that_hangs(start: Start) -> None:
    """D12: a ledger that can no longer be written does not keep the daemon."""
    daemon = start()
    asked = daemon.folder / "asked"
    hang = f"import pathlib, threading\ndef hang(*_): pathlib.Path({str(asked)!r}).touch(); threading.Event().wait()\n"
    start_with(daemon, f"{hang}import llamavisor.ledger\nllamavisor.ledger.replace_file = hang")
    with daemon:
        daemon.wait_for_router("ready")
        eventually(asked.exists, what="a write that hangs")
        ends_soon(daemon)
        assert not daemon.socket.exists()


def test_d12_a_reload_that_hangs(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """D12: nor does a configuration that is being read again and does not come."""
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config_of(models_dir, free_port()))
    with daemon:
        daemon.wait_for_router("ready")
        daemon.config.unlink()
        os.mkfifo(daemon.config)
        daemon.signal(signal.SIGHUP)
        with daemon.config.open("wb"):  # opened once it is being read; it has no end
            ends_soon(daemon)
        assert ended_in_order(daemon)


def test_d12_a_router_that_cannot_be_ended(start: Start) -> None:
    """D12: where the end of a router hangs the promised time counts: it goes along, and what was learned is kept."""
    daemon = start()
    hangs = "import llamavisor.router\nllamavisor.router.Router.shut_down = app.keep = hang\n"
    start_with(daemon, f"{HUNG}{hangs}app._ends_within_s = lambda _: 0.5")
    with daemon:
        daemon.wait_for_router("ready")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 1
        eventually(lambda: not list(daemon.processes()), what="a router that goes along")
        assert not daemon.socket.exists()
        assert not ended_in_order(daemon)  # and it was written, although `keep` did not


def test_d12_a_bug_while_something_hangs(start: Start) -> None:
    """D12: a daemon with a bug ends with exit code 1 all the same, and nothing is left of it."""
    daemon = start()
    start_with(daemon, f"{HUNG}{DOWNLOADS}.run, app.STOP_S, app.LAG_INTERVAL_S = hang, 2.0, None")
    daemon.start()
    assert daemon.wait() == 1
    assert list(daemon.processes()) == []
    assert not daemon.socket.exists()
    daemon.end()
