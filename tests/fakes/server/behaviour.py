"""What a test can make the stand-in do: the keys of its JSON document."""

from __future__ import annotations

import os
import resource
import signal


class _Script:
    """Keys with defaults; whoever sets one that is not there hears of it."""

    def __init__(self, **keys: object) -> None:
        for key, value in keys.items():
            if key.startswith("_") or not hasattr(type(self), key):
                raise TypeError(f"the fake llama-server has no behaviour {key!r}")
            setattr(self, key, value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {vars(self)}>"


class ModelBehaviour(_Script):
    """How the process of a model behaves. Everything holds from its own start.

    Attributes:
        load_s: how long loading takes; progress is reported every 0.2 s of it.
        load_stalls: stay at half of the load for ever, without another sign of progress.
        load_failures: how many loads fail, -1 = all of them.
        load_exit: how a failing load ends: an exit code, or the name of a signal.
        token_s: time between two words of an answer.
        exit_after_s: end by itself this long after it was loaded.
        exit_after_requests: end by itself when this many requests have come in; the last one is not answered.
        exit_with: how it ends then: an exit code, or the name of a signal.
        hang_after_s: answer nothing any more this long after it was loaded; connections are still accepted.
        hang_after_requests: likewise, after this many answered requests.
        grow_mib: memory that it takes with every request, and does not give back.
        ignore_exit: take no notice of the router's order to end, nor of the router's death.
        grandchild: start a process that stays: "group" in the same process group, "setsid" in a session of its own.
        grandchild_holds_output: that process keeps the output open, so that the router never sees the end.
    """

    load_s: float = 0.0
    load_stalls: bool = False
    load_failures: int = 0
    load_exit: int | str = 1
    token_s: float = 0.0
    exit_after_s: float | None = None
    exit_after_requests: int | None = None
    exit_with: int | str = "SIGKILL"
    hang_after_s: float | None = None
    hang_after_requests: int | None = None
    grow_mib: int = 0
    ignore_exit: bool = False
    grandchild: str | None = None
    grandchild_holds_output: bool = False


class Behaviour(_Script):
    """How the router behaves, and under `model` and `models` its models.

    Attributes:
        version: what --version prints, the line with the version.
        help: what --help prints and which options there are: a file in tests/data.
        missing_options: spellings of options that this build does not know all the same.
        devices: what --list-devices prints, one line each.
        devices_after_calls: how many calls of --list-devices show none before that (a driver that loads late).
        sse: whether GET /models/sse exists.
        role: what GET /props says it is; "" = says nothing, as a server of one model does.
        start_s: time between the start and listening.
        start_failures: how many starts fail before listening, -1 = all of them.
        start_exit: how a failing start ends: an exit code, or the name of a signal.
        start_line: what a failing start prints before that.
        unready_s: how long after listening everything is answered with 503.
        exit_after_s: end by itself this long after listening.
        exit_after_requests: end by itself when this many requests for a model have come in.
        exit_with: how it ends then: an exit code, or the name of a signal.
        hang_after_s: answer nothing any more this long after listening; connections are still accepted.
        hang_paths: the paths that hang then, none = all.
        ignore_sigterm: take no notice of SIGTERM and SIGINT.
        grandchild: start a process that stays: "group" in the same process group, "setsid" in a session of its own.
        zombies: how many ended processes of its own it does not wait for.
        answers: by path, what is answered instead: `status`, `type`, `body`, `repeat` (how often the body is sent) and
            `delay_s` (before it; without `body` the true answer follows late).
        log_lines_per_s: how many lines it prints all the time.
        log_giant_line_bytes: length of one line without an end, printed once it listens.
        model: keys of `ModelBehaviour` for every model.
        models: by name, keys of `ModelBehaviour` for one model, over those.
    """

    version: str = "version: 0.6.0-dev (build 0, commit unknown)"
    help: str = "help-b11434.txt"
    missing_options: list[str] = []  # noqa: RUF012 (never changed, only replaced)
    devices: list[str] = []  # noqa: RUF012
    devices_after_calls: int = 0
    sse: bool = True
    role: str = "router"
    start_s: float = 0.0
    start_failures: int = 0
    start_exit: int | str = 1
    start_line: str = ""
    unready_s: float = 0.0
    exit_after_s: float | None = None
    exit_after_requests: int | None = None
    exit_with: int | str = "SIGKILL"
    hang_after_s: float | None = None
    hang_paths: list[str] = []  # noqa: RUF012
    ignore_sigterm: bool = False
    grandchild: str | None = None
    zombies: int = 0
    answers: dict[str, dict[str, object]] = {}  # noqa: RUF012
    log_lines_per_s: float = 0.0
    log_giant_line_bytes: int = 0
    model: dict[str, object] = {}  # noqa: RUF012
    models: dict[str, dict[str, object]] = {}  # noqa: RUF012

    def of_model(self, name: str) -> ModelBehaviour:
        """The behaviour of one model's process."""
        return ModelBehaviour(**{**self.model, **self.models.get(name, {})})


class Record:
    """What the stand-in remembers from one start to the next, in a folder beside its behaviour."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        os.makedirs(folder, exist_ok=True)

    def count(self, what: str) -> int:
        """Count one more `what`, over all processes; returns the new count."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(f"{self._folder}/{what}.count", flags, 0o644)
        try:
            os.write(fd, b".")
            return os.lseek(fd, 0, os.SEEK_CUR)
        finally:
            os.close(fd)

    def is_among_first(self, n: int, what: str) -> bool:
        """Count one more `what`, and say whether it is among the first `n`; all are among -1."""
        return n < 0 or (n > 0 and self.count(what) <= n)

    def note(self, what: str, line: str) -> None:
        """Append a line to the list of `what`."""
        with open(f"{self._folder}/{what}.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def end(how: int | str) -> None:
    """End this process at once: with an exit code, or by a signal."""
    if isinstance(how, int):
        os._exit(how)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.Signals[how])
    signal.pause()


def start_grandchild(kind: str, *, holds_output: bool = False) -> None:
    """Start a process that does nothing for ten minutes and that nobody waits for."""
    kept_free = (0,) if holds_output else (0, 1, 2)
    os.posix_spawn(
        "/bin/sleep",
        ["sleep", "600"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in kept_free],
        setsid=kind == "setsid",
        setsigmask=(),
    )


def start_zombie() -> None:
    """Start a process that ends at once and that nobody waits for."""
    os.posix_spawn("/bin/true", ["true"], os.environ, setsigmask=())
