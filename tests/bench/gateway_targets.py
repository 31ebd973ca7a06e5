"""What is measured beside each other: the child itself, and everything that can stand before it."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from gateway_load import Yardsticks
from report import cpu_s

from fakes.bare_router import BareRouter, free_port
from fakes.builder import FakeLlamaServer
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

DIRECT, ROUTER, NGINX, GO, GATEWAY = "direct", "the router", "nginx", "Go", "the gateway"
MODEL = "alpha"
NEVER = "never"
"""The model that a scripted child loads for ever."""
CONNECTIONS = 4096

_NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes auto;
worker_rlimit_nofile 16384;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_body_buffer_size 1m;
    upstream child {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 95; keepalive_timeout 4s; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://child;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""

_CONFIG = """
serve = "gateway"
port = {port}
models_dir = {models}
[gateway]
max_connections = {connections}
max_waiting = {connections}
max_waiting_per_model = {connections}
[metrics]
enabled = false
[defaults]
threads = 1
"""


class Target:
    """Something that clients can ask.

    Args:
        name: what it is called in the table.
        port: where it listens.
        pid: the process whose CPU and memory are its own, with its children where it is nginx; None for the child.

    Attributes:
        idle_load: seconds of CPU that it takes in a second in which nobody asks; 0 before that is measured.
    """

    def __init__(self, name: str, port: int, pid: int | None = None) -> None:
        self.name = name
        self.port = port
        self.idle_load = 0.0
        own = [psutil.Process(pid)] if pid is not None else []
        self._processes = [*own, *(own[0].children() if name == NGINX else ())]

    def __repr__(self) -> str:
        return f"<Target {self.name} port={self.port}>"

    def cpu_s(self) -> float:
        """Seconds of CPU that it has taken so far."""
        return cpu_s(*self._processes)

    def memory_bytes(self) -> int:
        """What it holds in RAM."""
        return int(sum(process.memory_info().rss for process in self._processes))


class Scripted:
    """llama-servers that start children of ours.

    Args:
        folder: where they go.
        llama_server: the true one.
        yardsticks: hold the child.
    """

    def __init__(self, folder: Path, llama_server: Path, yardsticks: Yardsticks) -> None:
        folder.mkdir(parents=True)
        self._true = llama_server
        self._child = f'exec {shlex.quote(str(yardsticks.path))} child "$@"'
        self.true_router = folder / "llama-server"
        shutil.copy(llama_server, self.true_router)
        self.env = {"LD_LIBRARY_PATH": str(llama_server.resolve().parent)}
        self.fake_router = FakeLlamaServer.make(folder / "fake").path
        shebang, command = self.fake_router.read_text(encoding="utf-8").split("\n", 1)
        ours = f'case " $* " in *" --alias "*) {self._child} ;; esac'
        self.fake_router.write_text(f"{shebang}\n{ours}\n{command}", encoding="utf-8")

    def __repr__(self) -> str:
        return f"<Scripted {self.true_router}>"

    def stage(self) -> None:
        """Have the true router, which runs by now, start our children.

        It starts them by the path under which it was started itself, and we put the child there.
        """
        script = self.true_router.with_suffix(".new")
        script.write_text(f"#!/bin/sh\n{self._child}\n", encoding="utf-8")
        script.chmod(0o755)
        script.replace(self.true_router)


@contextmanager
def before_scripted(folder: Path, llama_server: Path, yardsticks: Yardsticks) -> Iterator[dict[str, Target]]:
    """All of them by name, before scripted children; nginx is left out where it is not installed.

    The gateway's router, which has no part in what it forwards, is a fake one: llamavisor would see that a true one's
    program has been exchanged.
    """
    models, scripted = _models(folder), Scripted(folder / "scripted", llama_server, yardsticks)
    with BareRouter(scripted.true_router, folder / "router", models, env=scripted.env) as router:
        scripted.stage()
        with _all(folder, router, models, scripted.fake_router, yardsticks) as found:
            yield found


@contextmanager
def before_true(folder: Path, llama_server: Path, yardsticks: Yardsticks) -> Iterator[dict[str, Target]]:
    """All of them by name, before true children with a tiny model."""
    models = _models(folder)
    with (
        BareRouter(llama_server, folder / "router", models) as router,
        _all(folder, router, models, llama_server, yardsticks) as found,
    ):
        yield found


def _models(folder: Path) -> Path:
    models = folder / "models"
    models.mkdir(parents=True)
    for name in (MODEL, NEVER):
        write_tiny_model(models / f"{name}.gguf", ["I", "am", name])
    return models


@contextmanager
def _all(
    folder: Path, router: BareRouter, models: Path, llama_server: Path, yardsticks: Yardsticks
) -> Iterator[dict[str, Target]]:
    child = router.load(MODEL).port
    with ExitStack() as stack:
        found = [Target(DIRECT, child), Target(ROUTER, router.port, router.pid)]
        if shutil.which("nginx"):
            found.append(stack.enter_context(_nginx(folder / "nginx", child)))
        found.append(stack.enter_context(_go(folder, yardsticks, child)))
        found.append(stack.enter_context(_gateway(folder / "gateway", models, llama_server)))
        yield {target.name: target for target in found}


@contextmanager
def _gateway(folder: Path, models: Path, llama_server: Path) -> Iterator[Target]:
    """The gateway of a daemon whose model is loaded; so many clients are let in as any measurement has."""
    folder.mkdir()
    port = free_port()
    config = _CONFIG.format(port=port, models=json.dumps(str(models)), connections=CONNECTIONS)
    with RunningDaemon(folder, models, llama_server, config=config) as daemon:
        daemon.wait_for_router("ready")
        daemon.chat(MODEL, port=port)
        yield Target(GATEWAY, port, daemon.pid)


@contextmanager
def _go(folder: Path, yardsticks: Yardsticks, upstream: int) -> Iterator[Target]:
    """The minimal reverse proxy on Go's standard library."""
    port = free_port()
    argv = [str(yardsticks.path), "proxy", "-listen", f"127.0.0.1:{port}", "-upstream", f"127.0.0.1:{upstream}"]
    with _running(argv, port, folder / "go.stderr") as pid:
        yield Target(GO, port, pid)


@contextmanager
def _nginx(folder: Path, upstream: int) -> Iterator[Target]:
    """A reverse proxy as it is usually set up for such servers: kept connections behind it, and no buffering."""
    folder.mkdir()
    port, config = free_port(), folder / "nginx.conf"
    text = _NGINX.format(folder=folder, connections=CONNECTIONS, upstream=upstream, port=port)
    config.write_text(text, encoding="utf-8")
    with _running(
        ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)], port, folder / "stderr"
    ) as pid:
        yield Target(NGINX, port, pid)


@contextmanager
def _running(argv: Sequence[str], port: int, log: Path) -> Iterator[int]:
    """A process of ours that listens, from its first connection to its end."""
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=file)
    try:
        eventually(lambda: _listens(port), what=f"{argv[0]} that listens")
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
