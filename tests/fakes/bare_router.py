"""A llama-server router started without llamavisor, true or fake, for tests of what llamavisor relies on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model

PRESET = "[*]\nthreads = 1\nstop-timeout = 3\nmetrics = 1\n"
"""One thread: llama.cpp's threads wait for each other by spinning, which is slow on a busy machine."""


def free_port() -> int:
    """A TCP port on 127.0.0.1 that the kernel has just called free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refusal(status: int, message: str, kind: str = "invalid_request_error") -> dict[str, object]:
    """The body of an error as llama-server writes most of them."""
    return {"error": {"code": status, "message": message, "type": kind}}


def make_slow(folder: Path, name: str) -> None:
    """Put a model into `folder` that takes the true llama-server seconds to load; the fake has to be told so."""
    write_tiny_model(folder / f"{name}.gguf", ["slow"], n_layer=200, n_ctx=60_000)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> object:
        """The body, which must be JSON."""
        return json.loads(self.text)


@dataclass(frozen=True, slots=True)
class ModelProcess:
    """The process of one model, as its command line tells it."""

    pid: int
    name: str
    port: int


class Events:
    """What a router has told on its event stream so far."""

    def __init__(self) -> None:
        self.all: list[dict[str, object]] = []
        self.has_ended = False
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<Events {len(self.all)}>"

    def of(self, name: str) -> list[dict[str, object]]:
        """The events about one model."""
        return [event for event in self.all if event["model"] == name]

    def wait_for(self, wanted: Callable[[dict[str, object]], object], *, since: int = 0) -> dict[str, object]:
        """The first event after the first `since` ones that is wanted; waits for it.

        Raises:
            AssertionError: it did not come in time.
        """
        found: list[dict[str, object]] = []

        def look() -> bool:
            found[:] = [event for event in self.all[since:] if wanted(event)]
            return bool(found) or self.has_ended

        with self._changed:
            self._changed.wait_for(look, PATIENCE_S)
        assert found, f"the event did not come; there were {self.all}"
        return found[0]

    def wait_for_status(self, name: str, status: str, *, since: int = 0) -> dict[str, object]:
        """Wait until a model has this status."""
        return self.wait_for(
            lambda event: event["model"] == name and event.get("data", {}).get("status") == status,
            since=since,
        )

    def add(self, event: dict[str, object] | None) -> None:
        """Keep one more event, None = there will be no more."""
        with self._changed:
            if event is None:
                self.has_ended = True
            else:
                self.all.append(event)
            self._changed.notify_all()


class BareRouter:
    """One router in a session of its own.

    Use it as a context manager: entered when it answers, left when all that it started is gone.

    Args:
        program: a llama-server.
        folder: for its files; created when missing.
        models_dir: folder of its models.
        arguments: more arguments.
        preset: its preset file.
        env: more environment.
        port: where it listens, None = on a free port.

    Attributes:
        preset: the preset file.
        port: where it listens.
        command: how it is started, by whomever.
        environment: with which.
    """

    def __init__(
        self,
        program: Path | str,
        folder: Path,
        models_dir: Path,
        *,
        arguments: Sequence[str] = (),
        preset: str = PRESET,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        for name in ("config", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.preset = folder / "preset.ini"
        self.preset.write_text(preset, encoding="utf-8")
        self.port = port or free_port()
        self._key = (env or {}).get("LLAMA_API_KEY")
        self.command = [
            *(str(program), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--models-dir", str(models_dir), "--models-preset", str(self.preset)),
            *("--timeout", "60", "--threads-http", "32", "--log-colors", "off", *arguments),
        ]
        self.environment = {
            "PATH": os.environ["PATH"],
            "XDG_CONFIG_HOME": str(folder / "config"),
            "LLAMA_CACHE": str(folder / "cache"),
            **(env or {}),
        }
        self._popen: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<BareRouter port={self.port} pid={self._popen and self._popen.pid}>"

    def __enter__(self) -> Self:
        """Start it and wait until it answers."""
        self.start()
        try:
            eventually(self._is_ready, what="a ready router")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it and whatever it started."""
        self.stop()

    @property
    def pid(self) -> int:
        """Its process id, which is its session's too."""
        assert self._popen is not None
        return self._popen.pid

    @property
    def stdout(self) -> str:
        """What it has printed on standard output."""
        return (self._folder / "stdout").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What it has printed on standard error."""
        return (self._folder / "stderr").read_text(encoding="utf-8", errors="replace")

    def start(self) -> None:
        """Start it, and do not wait."""
        with (self._folder / "stdout").open("ab") as out, (self._folder / "stderr").open("ab") as err:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment,
                start_new_session=True,
            )

    def wait(self) -> int:
        """Wait for its end; the exit code, or the negative number of a signal."""
        assert self._popen is not None
        return self._popen.wait(PATIENCE_S)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the router alone."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """End it, kindly at first, and reap all of its session."""
        if self._popen is None:
            return
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(PATIENCE_S)
        for process in self._session():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._popen.kill()
        self._popen.wait()
        eventually(lambda: not self._session(), what="the end of the router's session")

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> Answer:
        """Ask the router, or whoever listens on `port`; a body that is not text is sent as JSON."""
        text = body if body is None or isinstance(body, str) else json.dumps(body)
        key = {"Authorization": f"Bearer {self._key}"} if self._key and headers is None else {}
        connection = HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body=text, headers={**key, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read().decode())
        finally:
            connection.close()

    def chat(self, name: str, *, query: str = "", **more: object) -> Answer:
        """Ask a model for an answer."""
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}], **more}
        return self.call("POST", f"/v1/chat/completions{query}", body)

    def models(self, *, reload: bool = False) -> dict[str, dict[str, object]]:
        """GET /models, by name."""
        answer = self.call("GET", "/models?reload=1" if reload else "/models")
        assert answer.status == 200, answer
        return {model["id"]: model for model in answer.json["data"]}

    def status(self, name: str) -> str:
        """The status of one model."""
        return self.models()[name]["status"]["value"]

    def load(self, name: str) -> ModelProcess:
        """Load a model, wait until it is loaded, and find its process."""
        answer = self.call("POST", "/models/load", {"model": name})
        assert answer.status == 200, answer
        eventually(lambda: self.status(name) == "loaded", what=f"{name} loaded")
        return self.process_of(name)

    def unload(self, name: str) -> None:
        """Unload a model and wait until it is gone."""
        answer = self.call("POST", "/models/unload", {"model": name})
        assert answer.status == 200, answer
        eventually(lambda: self.status(name) == "unloaded", what=f"{name} unloaded")

    def processes(self) -> list[ModelProcess]:
        """The processes of models below the router, found by their command lines, as llamavisor does."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = process.cmdline()
                    if "--alias" in words and "--port" in words:
                        name, port = words[words.index("--alias") + 1], words[words.index("--port") + 1]
                        found.append(ModelProcess(process.pid, name, int(port)))
        return found

    def process_of(self, name: str) -> ModelProcess:
        """The process of one model, which must run."""
        return next(process for process in self.processes() if process.name == name)

    @contextlib.contextmanager
    def events(self) -> Iterator[Events]:
        """Follow the event stream; entered once it is open, so that nothing after that is missed."""
        events = Events()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connection.request("GET", "/models/sse", headers=key)
        line = connection.sock
        response = connection.getresponse()
        assert response.status == 200, response.read()

        def read() -> None:
            with contextlib.suppress(OSError, ValueError, HTTPException):
                for line in response:
                    if line.startswith(b"data: "):
                        events.add(json.loads(line[6:]))
            events.add(None)

        thread = threading.Thread(target=read, name="bare-router-events")
        thread.start()
        try:
            yield events
        finally:
            with contextlib.suppress(OSError):  # the router has closed it before us
                line.shutdown(socket.SHUT_RDWR)
            thread.join()
            response.close()
            connection.close()

    def _is_ready(self) -> bool:
        assert self._popen is not None
        if self._popen.poll() is not None:
            raise RuntimeError(f"the router ended with {self._popen.returncode}: {self.stderr}")
        try:
            return self.call("GET", "/health").status == 200
        except (OSError, HTTPException):
            return False

    def _session(self) -> list[psutil.Process]:
        """What is left of the router's session; what was handed to us and has ended is reaped on the way."""
        left = []
        for process in psutil.process_iter():
            try:
                is_ours = os.getsid(process.pid) == self.pid and process.pid != self.pid
                if is_ours and process.ppid() == os.getpid() and process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, 0)
                elif is_ours:
                    left.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return left
