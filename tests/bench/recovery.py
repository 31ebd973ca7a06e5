"""What is killed or hangs: how soon it is seen, and how soon a client is answered again, beside two supervisors.

Both of them restart the same router in the same way, at once, and know of no model: the next client has it loaded.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest
from report import Row, ms

from fakes.bare_router import BareRouter, free_port
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon
from systemd.sandbox import Systemd

RUNS = 5
STABLE_S = 10.5
"""What has served for 10 s is restarted at once; before that a backoff would be measured."""
SEEN_S = 0.05
POLL_S = 0.003
"""Between two looks whether a server answers."""
HANG_S = 58.0, 75.0
"""A process that hangs is to be noticed neither sooner nor later; its silence counts from its last answer, which may be
two seconds before it was stopped."""
HANG_PATIENCE_S = 100.0
HEALED_S = 90.0
MODEL = "alpha"

_SUPERVISORD = """
[supervisord]
nodaemon = true
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
[program:router]
command = {command}
environment = {environment}
autorestart = true
startsecs = 0
redirect_stderr = true
stdout_logfile = {folder}/router.log
"""
_UNIT = """
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart={command}
Environment={environment}
Restart=always
RestartSec=0
"""


def measure(folder: Path, llama_server: Path) -> Iterator[Row]:
    """What is killed, beside the others; what hangs, alone.

    Args:
        folder: a place for files.
        llama_server: the real one.
    """
    folder.mkdir()
    models = folder / "models"
    models.mkdir()
    write_tiny_model(models / f"{MODEL}.gguf", ["I", "am", MODEL])
    yield from killed(folder, models, llama_server)
    yield from hung(folder / "hung", models, llama_server)


# --- killed -----------------------------------------------------------------------------------------------------------


class Supervised:
    """A router that somebody else restarts.

    Args:
        name: of who does.
        router: how it is started.
    """

    def __init__(self, name: str, router: BareRouter) -> None:
        self.name = name
        self._router = router
        self.after_router: list[float] = []
        self.after_child: list[float] = []

    def __repr__(self) -> str:
        return f"<Supervised by {self.name}>"

    @property
    def pid(self) -> int:
        """Of the router."""
        return next(pid for pid, words in _llama_servers() if str(self._router.port) in words)

    @property
    def child(self) -> int:
        """Of its model."""
        return next(pid for pid, words in _llama_servers() if psutil.Process(pid).ppid() == self.pid)

    def answers(self) -> bool:
        """Whether its model does, which it loads if need be."""
        return _chat(self._router.port)

    def kill_router(self) -> None:
        """Take the time until a client is answered again that asks as soon as the router is healthy."""
        began = _kill(self.pid)
        _poll(lambda: _status(self._router.port, "GET", "/health") == 200)
        _poll(self.answers)
        self.after_router.append(time.time() - began)

    def kill_child(self) -> None:
        """Take the time until a client is answered again that asks all the time."""
        began = _kill(self.child)
        _poll(self.answers)
        self.after_child.append(time.time() - began)


class Ours:
    """A daemon and what it tells of its router and its model.

    Args:
        daemon: it.
    """

    def __init__(self, daemon: RunningDaemon) -> None:
        self._daemon = daemon
        self.seen_router: list[float] = []
        self.seen_child: list[float] = []
        self.after_router: list[float] = []
        self.after_child: list[float] = []

    def __repr__(self) -> str:
        return f"<Ours {self._daemon}>"

    def kill_router(self) -> None:
        """Take the times until that is seen, and until its model is loaded again without any request."""
        last, began = self._last, _kill(self._daemon.router()["pid"])
        time.sleep(1.0)  # asking all the time would be measured too; the events carry their times
        loaded = self._daemon.wait_for_event("ModelLoaded", lambda event: event["id"] > last)
        exited = self._daemon.wait_for_event("RouterExited", lambda event: event["id"] > last)
        self._answers()
        self.seen_router.append(exited["time"] - began)
        self.after_router.append(loaded["time"] - began)

    def kill_child(self) -> None:
        """The same of the model's process."""
        last, began = self._last, _kill(self._daemon.model(MODEL)["pid"])
        time.sleep(1.0)
        loaded = self._daemon.wait_for_event("ModelLoaded", lambda event: event["id"] > last)
        exited = self._daemon.wait_for_event("ModelChildExited", lambda event: event["id"] > last)
        self._answers()
        self.seen_child.append(exited["time"] - began)
        self.after_child.append(loaded["time"] - began)

    def _answers(self) -> None:
        """See that it does; a model that is killed again and again and answers nobody is put under quarantine."""
        assert self._daemon.chat(MODEL) == f"I am {MODEL}"

    @property
    def _last(self) -> int:
        return int(self._daemon.status()["event_id"])


def killed(folder: Path, models: Path, llama_server: Path) -> Iterator[Row]:
    """All three one after the other, so many times, with the same silence before."""
    with ExitStack() as stack:
        state = folder / "daemon"
        state.mkdir()
        daemon = stack.enter_context(RunningDaemon(state, models, llama_server))
        daemon.wait_for_router("ready")
        assert daemon.chat(MODEL) == f"I am {MODEL}"
        ours = Ours(daemon)
        others = [
            stack.enter_context(_by_systemd(folder, models, llama_server)),
            stack.enter_context(_by_supervisord(folder / "supervisord", models, llama_server)),
        ]
        for other in others:
            eventually(other.answers, what=f"an answer of what {other.name} runs")
        for _ in range(RUNS):
            time.sleep(STABLE_S)
            for each in (ours, *others):
                each.kill_router()
            time.sleep(STABLE_S)
            for each in (ours, *others):
                each.kill_child()
    yield _seen("router SIGKILL to exit seen", ours.seen_router)
    yield from _sooner("router SIGKILL to loaded", ours.after_router, {each.name: each.after_router for each in others})
    yield _seen("model SIGKILL to exit seen", ours.seen_child)
    yield from _sooner("model SIGKILL to loaded", ours.after_child, {each.name: each.after_child for each in others})


def _seen(what: str, found: list[float]) -> Row:
    return Row(what, ms(statistics.median(found)), "", ms(SEEN_S), statistics.median(found) <= SEEN_S)


def _sooner(what: str, ours: list[float], others: dict[str, list[float]]) -> Iterator[Row]:
    """Sooner than a first request is answered where another supervisor restarts."""
    measured = statistics.median(ours)
    for name, found in others.items():
        yardstick = statistics.median(found)
        yield Row(f"{what}, over {name} + request", ms(measured), ms(yardstick), ms(yardstick), measured <= yardstick)


@contextmanager
def _by_systemd(folder: Path, models: Path, llama_server: Path) -> Iterator[Supervised]:
    """Restart=always and RestartSec=0, in a systemd that sees nothing of the temporary files but this folder."""
    router = BareRouter(llama_server, folder / "systemd", models)
    environment = " ".join(f'"{name}={value}"' for name, value in router.environment.items())
    try:
        with Systemd(folder) as systemd:
            command = " ".join(router.command)
            systemd.write_unit("router.service", _UNIT.format(command=command, environment=environment))
            systemd.run("systemctl", "start", "router.service")
            yield Supervised("systemd", router)
    except pytest.skip.Exception as error:
        sys.exit(str(error))


@contextmanager
def _by_supervisord(folder: Path, models: Path, llama_server: Path) -> Iterator[Supervised]:
    """autorestart=true, and what ends at once is restarted at once too."""
    folder.mkdir()
    router = BareRouter(llama_server, folder / "router", models)
    environment = ",".join(f'{name}="{value}"' for name, value in router.environment.items())
    text = _SUPERVISORD.format(folder=folder, command=" ".join(router.command), environment=environment)
    config = folder / "supervisord.conf"
    config.write_text(text, encoding="utf-8")
    argv = [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "--configuration", str(config)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as supervisord:
        try:
            yield Supervised("supervisord", router)
        finally:
            supervisord.terminate()


# --- hung -------------------------------------------------------------------------------------------------------------


def hung(folder: Path, models: Path, llama_server: Path) -> Iterator[Row]:
    """A router and, on another router, a model that are stopped at the same time; nobody else would ever notice."""
    folder.mkdir()
    port, metrics_port = free_port(), free_port()
    config = f'serve = "gateway"\nport = {port}\n[metrics]\nport = {metrics_port}\n[defaults]\nthreads = 1\n'
    for name in ("one", "two"):
        (folder / name).mkdir()
        write_tiny_model(folder / name / f"{name}.gguf", ["I", "am", name])
        config += f'[[router]]\nname = "{name}"\nmodels_dir = "{folder / name}"\n'
    with RunningDaemon(folder, models, llama_server, config=config) as daemon:
        for name in ("one", "two"):
            daemon.wait_for_router("ready", name)
            assert daemon.chat(name, port=port) == f"I am {name}"
        time.sleep(STABLE_S)
        last, router, child = daemon.status()["event_id"], daemon.router("one")["pid"], daemon.model("two")["pid"]
        began = time.time()
        os.kill(router, signal.SIGSTOP)
        os.kill(child, signal.SIGSTOP)

        def first(name: str, **fields: object) -> float | None:
            """Seconds until the first event of these fields, None as long as there is none."""
            for event in daemon.events(name):
                if event["id"] > last and fields.items() <= event.items():
                    return float(event["time"]) - began
            return None

        seen = {"router": ("RouterHung", {"router": "one"}), "model": ("ModelHung", {"model": "two"})}
        well = {"router": ("RouterRecovered", {"router": "one"}), "model": ("ModelLoaded", {"model": "two"})}
        deadline = time.monotonic() + HANG_PATIENCE_S
        while time.monotonic() < deadline and not all(first(name, **fields) for name, fields in well.values()):
            time.sleep(0.5)
        for what in ("router", "model"):
            noticed, healed = (first(name, **fields) for name, fields in (seen[what], well[what]))
            in_time = noticed is not None and HANG_S[0] <= noticed <= HANG_S[1]
            yield Row(f"{what} SIGSTOP to seen", _s(noticed), "never", _s(HANG_S[1]), in_time)
            is_well = healed is not None and healed <= HEALED_S
            yield Row(f"{what} SIGSTOP to loaded", _s(healed), "never", _s(HEALED_S), is_well)
        for pid in (router, child):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)


def _s(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"


# --- clients ----------------------------------------------------------------------------------------------------------


def _kill(pid: int) -> float:
    """Kill a process, and wait for its end; Unix seconds of when it was killed."""
    process = psutil.Process(pid)
    began = time.time()
    process.kill()
    _poll(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    return began


def _poll(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


def _status(port: int, method: str, path: str, body: object = None) -> int:
    """The status of an answer, 0 if there is none."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as line:
        try:
            line.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = line.getresponse()
            response.read()
        except (OSError, HTTPException):
            return 0
        return response.status


def _chat(port: int) -> bool:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    return _status(port, "POST", "/v1/chat/completions", body) == 200


def _llama_servers() -> Iterator[tuple[int, list[str]]]:
    """Every llama-server on this machine, with its arguments."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and words[0].endswith("llama-server"):
            yield process.pid, words
