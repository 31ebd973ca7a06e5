"""The router's table of models and the processes behind them: what runs, who must leave, who is told.

One lock guards everything; every change of a model's state is one message to those who listen to the events.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from .child import EXIT, STATE
from .http import AnswerError, dumps
from .log import Log
from .options import Option, OptionTable, PresetError, is_on, render, to_ini
from .sources import RESERVED, Found, Sources

RUNNING = frozenset({"loading", "loaded", "sleeping"})
_STOP_TIMEOUT_S = 10
_REAP_EVERY_S = 0.05
_NOT_SHOWN = ("LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_ALIAS", "LLAMA_ARG_TAGS")
_FORCED = ("LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_ALIAS", "LLAMA_ARG_LOG_COLORS")


class Process:
    """The process of one model, as its router holds it: pid, standard input, and two pipes of output."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        """Start it. Raises OSError when the program is not there."""
        read_in, self.stdin = os.pipe()
        self.stdout, write_out = os.pipe()
        self.stderr, write_err = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, fd, at) for at, fd in enumerate((read_in, write_out, write_err))]
        try:
            self.pid = os.posix_spawn(argv[0], argv, env, file_actions=actions, setsigmask=())
        finally:
            for fd in (read_in, write_out, write_err):
                os.close(fd)

    def order_exit(self) -> None:
        """Ask it to end."""
        Log(self.stdin).raw(f"{EXIT}\n".encode())

    def kill(self) -> None:
        """End it at once; it is not reaped before its output has ended, so the pid is its own."""
        os.kill(self.pid, signal.SIGKILL)


class Model:
    """One entry of the table."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.options: dict[Option, str] = {}
        self.aliases: list[str] = []
        self.state = "unloaded"
        self.is_stopping = False
        self.port = 0
        self.exit_code = 0
        self.info: dict[str, object] = {}
        self.args: list[str] = []
        self.last_used = 0.0
        self.requests = 0
        self.stop_timeout_s = _STOP_TIMEOUT_S
        self.process: Process | None = None

    def __repr__(self) -> str:
        return f"<Model {self.name} {self.state} port={self.port}>"

    @property
    def is_running(self) -> bool:
        """Whether it has a process; one that is being stopped still has."""
        return self.state in RUNNING


class Registry:
    """All models of one router.

    Args:
        table: the options of this build.
        arguments: the router's own options, which go over every preset.
        program: path under which the children are started.
        log: the router's standard error.
        env: environment of the children.

    Raises:
        PresetError: folder or preset cannot be used.
    """

    def __init__(
        self, table: OptionTable, arguments: dict[Option, str], *, program: str, log: Log, env: dict[str, str]
    ) -> None:
        self._table = table
        self._sources = Sources(table, arguments)
        own = {option.env: value for option, value in arguments.items()}
        self.models_max = int(own.get("LLAMA_ARG_MODELS_MAX", "4"))
        self._program = program
        self._log = log
        self._env = env
        self._models: dict[str, Model] = {}
        self._changed = threading.Condition()
        self._listeners: list[deque[bytes]] = []
        self._is_reloading = False
        self._is_ending = False
        self._queue: list[_Waiting] = []
        self.reload()
        wants = table.of("load-on-startup")
        self._on_startup = [model for model in self._models.values() if is_on(model.options.get(wants, ""))]
        if len(self._on_startup) > self.models_max:
            reason = f"({len(self._on_startup)}) exceeds models_max ({self.models_max})"
            raise PresetError(f"number of models to load on startup {reason}")

    # What is there

    def find(self, name: object) -> Model | None:
        """The model with this name or alias."""
        with self._changed:
            for model in self._models.values():
                if name == model.name or name in model.aliases:
                    return model
        return None

    def listed(self) -> list[dict[str, object]]:
        """The entries of GET /models."""
        with self._changed:
            return [self._entry(model) for _, model in sorted(self._models.items())]

    def _entry(self, model: Model) -> dict[str, object]:
        shown = {option: value for option, value in model.options.items() if option.env not in _NOT_SHOWN}
        status = {"value": model.state, "args": model.args, "preset": to_ini(model.name, shown)}
        if model.state == "unloaded" and model.exit_code:
            status |= {"exit_code": model.exit_code, "failed": True}
        entry: dict[str, object] = {
            "id": model.name,
            "aliases": model.aliases,
            "tags": [],
            "object": "model",
            "owned_by": "llamacpp",
            "created": int(time.time()),
            "status": status,
            "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
            "source": model.source,
            "can_remove": False,
        }
        return {**model.info, **entry} if model.is_running else entry

    def reload(self) -> None:
        """Read folder and preset again; what has changed or gone is stopped first, however long that takes.

        Raises:
            PresetError: they cannot be read, or two models claim one name. In the second case nothing can be loaded
                any more until a reload succeeds, as with the true llama-server.
        """
        found = self._sources.read()
        with self._changed:
            is_first = not self._models
            self._is_reloading = True
            for model in [model for model in self._models.values() if model.is_running]:
                now = found.get(model.name)
                if now is None or _comparable(now.options) != _comparable(model.options):
                    reason = "(source updated or removed)"
                    self._log("operator()", f"(reload) unloading model name={model.name} {reason}")
                    self._stop(model)
                    self._changed.wait_for(lambda model=model: not model.is_running)
            self._models = {name: model for name, model in self._models.items() if name in found}
            for name, now in found.items():
                known = self._models.get(name)
                if known is None or not known.is_running:
                    self._update(known or Model(name, now.source), now, is_new=known is None)
            self._is_reloading = False
            self._changed.notify_all()
            self._log_models()
            if not is_first:
                self._announce("models_reload", "*")

    def _log_models(self) -> None:
        self._log("operator()", f"Available models ({len(self._models)}):")
        for name, model in sorted(self._models.items()):
            self._log("operator()", f"  [{model.source:>10}] {name}")
        if not self._models:
            hint = "(visit https://llama.app/models for suggestions)"
            self._log("operator()", f"  no models found on the system {hint}")

    def _update(self, model: Model, found: Found, *, is_new: bool) -> None:
        others = [other for other in self._models.values() if other is not model]
        taken = {alias: f"alias of model '{other.name}'" for other in others for alias in other.aliases}
        if model.name in taken:
            raise PresetError(f"model name '{model.name}' conflicts with {taken[model.name]}")
        taken |= {other.name: "existing model name" for other in others}
        wanted = found.options.get(self._table.of("LLAMA_ARG_ALIAS"), "")
        aliases = sorted({alias.strip() for alias in wanted.split(",")} - {""})
        for alias in aliases:
            if alias in taken and is_new:
                raise PresetError(f"alias '{alias}' for model '{model.name}' conflicts with {taken[alias]}")
        model.aliases = [alias for alias in aliases if alias not in taken]
        model.exit_code = 0
        model.options = found.options
        timeout = found.options.get(self._table.of("stop-timeout"), "")
        model.stop_timeout_s = int(timeout) if timeout.isdigit() else _STOP_TIMEOUT_S
        self._render(model)
        self._models[model.name] = model

    def _render(self, model: Model) -> None:
        forced = dict(zip(_FORCED, ("127.0.0.1", str(model.port), model.name, "off"), strict=True))
        options = {option: value for option, value in model.options.items() if option.env not in RESERVED}
        for env, value in forced.items():
            options[self._table.of(env)] = value
        model.options = options
        model.args = [self._program, *render(options)]

    # What runs

    def load_on_startup(self) -> None:
        """Start loading the models that their presets name."""
        for model in self._on_startup:
            self.load(model)

    def load(self, model: Model) -> None:
        """Start a model's process; returns before it is loaded, but after an idle one has made room for it.

        Raises:
            AnswerError: no place can be made, or the program is gone.
        """
        with self._changed:
            if not self._has_place() and (victim := self._victim()):
                self._log("unload_lru", f"models_max limit reached, removing LRU name={victim.name}")
                self._stop(victim)
                self._changed.wait_for(lambda: not victim.is_running)
            self._changed.wait_for(lambda: not self._is_reloading)
            if model.is_running:
                return
            if not self._has_place():
                raise AnswerError(500, "model limit reached, try again later", "server_error")
            self._spawn(model)

    def _spawn(self, model: Model) -> None:
        model.port = _free_port()
        self._render(model)
        self._log("load", f"spawning server instance with name={model.name} on port {model.port}")
        self._log("load", "spawning server instance with args:")
        for argument in model.args:
            self._log("load", f"  {argument}")
        try:
            process = Process(model.args, self._env)
        except OSError as exc:
            raise AnswerError(500, "failed to spawn server instance", "server_error") from exc
        model.process = process
        model.state = "loading"
        model.info = {}
        model.last_used = time.monotonic()
        self._announce("model_status", model.name, {"status": "loading"})
        self._changed.notify_all()
        threading.Thread(target=self._watch, args=(model, process), daemon=True).start()

    def unload(self, model: Model) -> None:
        """Start ending a model's process; a loading one is killed."""
        with self._changed:
            self._log("unload", f"stopping model instance name={model.name}")
            self._stop(model)

    def _stop(self, model: Model) -> None:
        if model.is_stopping or not model.is_running or model.process is None:
            return
        model.is_stopping = True
        process = model.process
        if model.state == "loading":
            self._log("unload", f"model name={model.name} is still loading, force-killing", "W")
            process.kill()
            return
        process.order_exit()
        timer = threading.Timer(model.stop_timeout_s, self._force, (model, process))
        timer.daemon = True
        timer.start()

    def _force(self, model: Model, process: Process) -> None:
        with self._changed:
            if model.process is process and model.is_running:
                self._log("run", f"force-killing model instance name={model.name} after timeout", "W")
                process.kill()

    def end(self) -> None:
        """End all processes and wait until they have ended."""
        with self._changed:
            self._is_ending = True
            self._listeners.clear()  # the streams end first: nobody hears of the models' ends
            self._changed.notify_all()
            for model in [model for model in self._models.values() if model.is_running]:
                self._log("unload_all", f"stopping model instance name={model.name}")
                self._stop(model)
            self._changed.wait_for(lambda: not any(model.is_running for model in self._models.values()))

    def _watch(self, model: Model, process: Process) -> None:
        """Read what a process prints; it counts as ended when both its pipes have ended and it can be reaped."""
        buffers = {process.stdout: b"", process.stderr: b""}
        while buffers:
            for fd in select.select(list(buffers), [], [])[0]:
                data = os.read(fd, 65536)
                *lines, buffers[fd] = (buffers[fd] + data).split(b"\n")
                for line in lines:
                    self._hear(model, line, is_log=fd == process.stderr)
                if not data:
                    del buffers[fd]
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(_REAP_EVERY_S)
        with self._changed:
            _, status = os.waitpid(process.pid, 0)
            exit_code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
            for fd in (process.stdin, process.stdout, process.stderr):
                os.close(fd)
            model.state = "unloaded"
            model.exit_code = exit_code
            model.is_stopping = False
            self._tick()
            self._announce("status_change", model.name, {"status": "unloaded", "exit_code": exit_code})
            self._log("run", f"instance name={model.name} exited with status {exit_code}")
            self._changed.notify_all()

    def _hear(self, model: Model, line: bytes, *, is_log: bool) -> None:
        if is_log or not line.startswith(STATE.encode()):
            Log(1).raw(f"[{model.port:5}] ".encode() + line + b"\n")
            return
        told = json.loads(line[len(STATE) :])
        payload = told["payload"]
        with self._changed:
            data: dict[str, object] = {"status": "loaded" if told["state"] == "ready" else told["state"]}
            model.state = str(data["status"])
            model.exit_code = 0
            if told["state"] == "loading":
                data["progress"] = payload
            elif told["state"] == "ready" and payload:
                model.info = payload
                data["info"] = payload
            self._tick()
            self._announce("status_change", model.name, data)
            self._changed.notify_all()

    # Who waits for what

    def make_ready(self, model: Model, has_left: Callable[[], bool]) -> None:
        """Wait until a model can take a request, loading it when it is its turn.

        Raises:
            AnswerError: it failed to load, or the client has left.
        """
        with self._changed:
            if model.state in {"loaded", "sleeping"} and not model.is_stopping:
                return
            self._log("ensure_model", f"waiting until model name={model.name} is fully loaded...")
            waiting = self._join(model) if model.state == "unloaded" else None
            saw_load = False
            try:
                while True:
                    if has_left() or self._is_ending:
                        gone = f"request cancelled while waiting for model name={model.name}"
                        raise AnswerError(500, gone, "server_error")
                    if model.is_stopping:
                        waiting = waiting or self._join(model)
                    elif model.state in {"loaded", "sleeping"}:
                        return
                    elif model.state == "loading":
                        saw_load = True
                    elif saw_load:
                        if model.exit_code:
                            failed = f"model name={model.name} failed to load"
                            raise AnswerError(500, failed, "server_error")
                        return
                    elif waiting is None:
                        return
                    elif self._queue[0] is waiting and not waiting.is_loading and self._has_place():
                        self._load_queued(waiting)
                        saw_load = model.is_running
                    self._changed.wait(0.2)  # where a true llama-server that cannot spawn tries again without a pause
            finally:
                if waiting is not None:
                    waiting.n_waiters -= 1
                    if not waiting.n_waiters:
                        self._queue.remove(waiting)
                self._tick()

    def _load_queued(self, waiting: _Waiting) -> None:
        """Called under the lock by the head of the queue."""
        self._log("ensure_model", f"slot available, loading queued model name={waiting.model.name}")
        self._changed.wait_for(lambda: not self._is_reloading)
        try:
            self._spawn(waiting.model)
            waiting.is_loading = True
        except AnswerError as exc:
            name = waiting.model.name
            self._log("ensure_model", f"queued load of name={name} did not go through: {exc}", "W")

    def _join(self, model: Model) -> _Waiting:
        waiting = next((one for one in self._queue if one.model is model), None)
        if waiting is None:
            waiting = _Waiting(model)
            self._queue.append(waiting)
            self._log("join", f"request for name={model.name} queued at position {len(self._queue)}")
        waiting.n_waiters += 1
        self._tick()
        return waiting

    def _tick(self) -> None:
        """Evict idle models while more requests wait than places are free or being freed."""
        running = [model for model in self._models.values() if model.is_running]
        free = self.models_max - len(running) + sum(model.is_stopping for model in running)
        wanted = sum(not waiting.is_loading for waiting in self._queue)
        while self.models_max > 0 and free < wanted and (victim := self._victim()):
            self._log("tick", f"evicting idle LRU name={victim.name} for a queued request")
            self._stop(victim)
            free += 1

    def _has_place(self) -> bool:
        running = sum(model.is_running for model in self._models.values())
        return self.models_max <= 0 or running < self.models_max

    def _victim(self) -> Model | None:
        wanted = [waiting.model for waiting in self._queue]
        idle = [
            model
            for model in self._models.values()
            if model.state in {"loaded", "sleeping"} and not (model.requests or model.is_stopping or model in wanted)
        ]
        return min(idle, key=lambda model: model.last_used, default=None)

    def begin_request(self, model: Model, *, counts_as_use: bool) -> None:
        """A request goes to a model, which keeps it from being evicted."""
        with self._changed:
            model.requests += 1
            if counts_as_use:
                model.last_used = time.monotonic()

    def end_request(self, model: Model) -> None:
        """The request is over."""
        with self._changed:
            model.requests -= 1
            self._tick()

    # Who is told

    def listen(self) -> deque[bytes]:
        """Subscribe to the events; what happens from now on is in the queue."""
        events: deque[bytes] = deque()
        with self._changed:
            self._listeners.append(events)
        return events

    def next_event(self, events: deque[bytes], has_left: Callable[[], bool]) -> bytes | None:
        """The next event of a subscription, None when the router ends or the listener has left."""
        with self._changed:
            while not events:
                self._changed.wait(1.0)
                if not events and (self._is_ending or has_left()):
                    self._listeners = [other for other in self._listeners if other is not events]
                    return None
            return events.popleft()

    def _announce(self, event: str, name: str, data: dict[str, object] | None = None) -> None:
        message = {"model": name, "event": event, **({} if data is None else {"data": data})}
        for events in self._listeners:
            events.append(f"data: {dumps(message)}\n\n".encode())
        self._changed.notify_all()


class _Waiting:
    """Requests for one model that wait for a place; they share one entry of the queue."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.n_waiters = 0
        self.is_loading = False


def _comparable(options: dict[Option, str]) -> dict[Option, str]:
    return {option: value for option, value in options.items() if option.env not in _FORCED}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
