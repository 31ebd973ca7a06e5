"""A whole llamavisor daemon in a process of its own, driven through its socket and its command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float = PATIENCE_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class RunningDaemon:
    """`llamavisor serve` as a subprocess; a context manager that ends it and checks that nothing is left of it.

    Args:
        folder: for its state, its socket and its log.
        models_dir: folder with the models.
        llama_server: the binary, true or fake.
        flags: more flags of `serve`.
        options: llama-server options behind `--`.
        config: text of a configuration file, instead of `--models-dir` and `--port`.
        env: more environment.
        serve: who listens on its port: "gateway" or "router".
    """

    def __init__(
        self,
        folder: Path,
        models_dir: Path,
        llama_server: Path | str | os.PathLike[str],
        *,
        flags: Sequence[str] = (),
        options: Sequence[str] = ("--threads", "1"),
        config: str | None = None,
        env: Mapping[str, str] | None = None,
        serve: str = "gateway",
    ) -> None:
        self.folder = folder
        self.socket = folder / "control.sock"
        self.state_dir = folder / "state"
        self.log = folder / "daemon.log"
        self.config = folder / "llamavisor.toml"
        self.port = free_port()
        self.metrics_port = free_port()
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), **(env or {})}
        if serve != "gateway":
            self.env["LLAMAVISOR_SERVE"] = serve
        self.launcher: list[str] = []  # what runs before the program and becomes it
        self.pass_fds: tuple[int, ...] = ()  # descriptors that it gets
        self.program = [sys.executable, "-m", "llamavisord"]
        self._argv = ["serve", "--socket", str(self.socket)]
        self._argv += ["--state-dir", str(self.state_dir)]
        if "llama_server" not in (config or ""):
            self._argv += ["--llama-server", os.fspath(llama_server)]
        if config is None:
            self._argv += ["--models-dir", str(models_dir), "--port", str(self.port)]
            self._argv += ["--metrics-port", str(self.metrics_port), *flags, "--", *options]
        else:
            self.config.write_text(config, encoding="utf-8")
            self._argv += ["--config", str(self.config), *flags]
        self._popen: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<RunningDaemon {self.folder}>"

    def __enter__(self) -> Self:
        """Start it and wait until it answers."""
        self.start()
        try:
            eventually(self.is_live, what="a daemon that answers")
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; nothing may be left of it."""
        self.end()
        if error is not None:
            sys.stderr.write(self.log.read_text(encoding="utf-8"))

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._popen is not None
        return self._popen.pid

    @property
    def argv(self) -> list[str]:
        """Its command line."""
        return [*self.launcher, *self.program, *self._argv]

    def start(self, *, output: int | None = None) -> None:
        """Start it, and do not wait; it writes to its log file, or to the descriptor `output`."""
        with self.log.open("ab") as file:
            log = file if output is None else output
            self._popen = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                pass_fds=self.pass_fds,
            )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; the exit code, or the negative number of a signal."""
        assert self._popen is not None
        return self._popen.wait(PATIENCE_S)

    def end(self) -> None:
        """End it kindly, and fail if anything that it started is still there."""
        assert self._popen is not None
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        left = list(self.processes())
        for process in left:
            process.kill()
        _reap_orphans()
        assert not left, f"left behind by the daemon: {left}"

    def processes(self) -> Iterator[psutil.Process]:
        """Everything that carries this daemon's marker and lives."""
        instance = self.state_dir / "instance"
        if not instance.exists():
            return
        marker = instance.read_text(encoding="ascii").strip()
        for process in psutil.process_iter():
            try:
                if process.environ().get("LLAMAVISOR_INSTANCE") == marker and process.status() != "zombie":
                    yield process
            except psutil.Error:
                continue

    @property
    def spawns(self) -> int:
        """How many routers it has started so far."""
        return len(self.events("RouterSpawned"))

    def zombies(self) -> set[int]:
        """Its ended children that nobody has waited for."""
        found = set()
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE:
                    found.add(child.pid)
        return found

    def is_live(self) -> bool:
        """Whether it answers on its socket; fails when it has ended."""
        assert self._popen is not None
        if self._popen.poll() is not None:
            raise AssertionError(f"exit code {self._popen.returncode}:\n{self.log.read_text(encoding='utf-8')}")
        try:
            return self.call("GET", "/livez")[0] == 200
        except (OSError, HTTPException):
            return False

    def call(
        self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and body of an answer on the control socket; JSON is parsed."""
        with closing(UnixConnection(self.socket)) as connection:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            text = response.read().decode("utf-8")
            is_json = "json" in (response.getheader("Content-Type") or "")
            return response.status, json.loads(text) if is_json else text

    def status(self) -> dict[str, Any]:
        """GET /control/v1/status."""
        status, body = self.call("GET", "/control/v1/status")
        assert status == 200, body
        return dict(body)

    def router(self, name: str = "main") -> dict[str, Any]:
        """One router as `status` shows it."""
        return next(router for router in self.status()["routers"] if router["name"] == name)

    def models(self) -> dict[str, dict[str, Any]]:
        """All models by name, as the list of models shows them."""
        status, body = self.call("GET", "/control/v1/models")
        assert status == 200, body
        return {model["name"]: model for model in body["models"]}

    def model(self, name: str) -> dict[str, Any]:
        """One model as the list of models shows it."""
        return self.models()[name]

    def wait_for_router(self, state: str, name: str = "main") -> dict[str, Any]:
        """Wait until a router is in `state`."""
        eventually(lambda: self.router(name)["state"] == state, what=f"router {name} {state}")
        return self.router(name)

    def wait_for_gateway(self) -> None:
        """Wait until clients can connect: not before it is known what is in the models folder."""
        eventually(lambda: self.status()["gateway"]["urls"], what="a gateway that listens")

    def wait_for_model(self, name: str, state: str) -> dict[str, Any]:
        """Wait until a model is in `state`."""
        eventually(lambda: self.models().get(name, {}).get("state") == state, what=f"model {name} {state}")
        return self.model(name)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Every event so far, or those of one kind."""
        status, text = self.call("GET", "/control/v1/events?follow=false")
        assert status == 200
        events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
        return [event for event in events if name is None or event["event"] == name]

    def wait_for_event(
        self, name: str, matches: Callable[[dict[str, Any]], bool] = lambda _: True, *, within_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Wait until an event of this kind has happened."""
        eventually(lambda: any(map(matches, self.events(name))), what=f"event {name}", within_s=within_s)
        return next(event for event in self.events(name) if matches(event))

    def metrics(self) -> str:
        """What Prometheus would read."""
        with closing(HTTPConnection("127.0.0.1", self.metrics_port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode("utf-8")

    def chat(self, model: str, *, port: int | None = None) -> str:
        """What a model answers when any client asks it."""
        with closing(HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE_S)) as connection:
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            assert response.status == 200, text
            return str(json.loads(text)["choices"][0]["message"]["content"]).strip()

    def cli(self, *arguments: str, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a command against this daemon."""
        return subprocess.run(
            [sys.executable, "-m", "llamavisord", *arguments],
            env={**self.env, "LLAMAVISOR_SOCKET": str(self.socket), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )


def _reap_orphans() -> None:
    """Reap what a killed daemon left to us, the subreaper of the tests; it has ended by now, or is about to.

    Who ends has no command line any more, some time before it can be reaped.
    """
    for process in psutil.Process().children():
        with suppress(OSError):  # it was reaped by somebody else
            if not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                os.waitpid(process.pid, 0)


def config_of(models_dir: Path, port: int, extra: str = "") -> str:
    """A configuration with one router."""
    return f'models_dir = "{models_dir}"\nport = {port}\n{extra}\n[metrics]\nenabled = false\n'


def run_serve(daemon: RunningDaemon) -> tuple[int, str]:
    """Exit code and words of a daemon that cannot start."""
    daemon.start()
    code = daemon.wait()
    return code, daemon.log.read_text()


def start_with(daemon: RunningDaemon, patch: str) -> None:
    """Have a daemon run these lines before it serves; `app` is its main module."""
    code = (
        f"import os, signal, sys, llamavisord.app as app; from llamavisord.cli import main\n{patch}\nsys.exit(main())"
    )
    daemon.program = [sys.executable, "-c", code]


def wrapped(folder: Path, llama_server: Path, command: str) -> Path:
    """The true llama-server behind a script, which runs this command before it becomes a router."""
    script = folder / "llama-server"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--models-preset*) {command};; esac\nexec {llama_server} "$@"\n', encoding="utf-8"
    )
    script.chmod(0o755)
    return script


USER = 54321
"""Nobody's: what is counted against its limits is ours alone."""


def as_user() -> list[str]:
    """What makes a program of root, put before it, that of a user who may read and write what root may, and no more."""
    if os.geteuid() != 0:
        return []
    capabilities = "-all,+dac_override,+dac_read_search"
    options = (f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    return ["setpriv", *options, f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]
