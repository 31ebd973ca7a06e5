"""Why something ended or could not start: one table from what is seen to a cause, and one to what follows from it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from llamavisor.process import ExitStatus


class Cause(Enum):
    """Why a router is started again, or is not, and why a model was lost."""

    # what people and we ourselves have decided
    REQUESTED = "requested"
    """A person or a new configuration wanted it."""
    DEVICE = "device"
    """A device that the configuration names appeared late, or one that was there has gone."""
    UPGRADE = "upgrade"
    """The program llama-server was replaced on disk."""
    UNSOUND = "unsound"
    """It went on, but could not be brought up to date, lost sight of a process, or refused a load."""
    # what stands in the way of a start
    SPAWN = "spawn"
    """It could not be started for want of something that may come back."""
    PORT_TAKEN = "port_taken"
    """Somebody else listens on its port."""
    MODELS_DIR = "models_dir"
    """The models folder is missing, not a folder, or not readable."""
    STATE_DIR = "state_dir"
    """Our own files cannot be written: a full disk is emptied some day."""
    START_TIMEOUT = "start_timeout"
    """It did not become ready in time."""
    STALLED = "stalled"
    """Its load made no progress for too long."""
    # what its last words say
    BAD_OPTION = "bad_option"
    """It was told an option that it does not take."""
    BAD_BINARY = "bad_binary"
    """It is missing, not executable, without a library, or no llama-server with router mode."""
    BAD_FILE = "bad_file"
    """The file is one that llama.cpp cannot make a model of."""
    NO_MEMORY = "no_memory"
    """It asked for memory and did not get it."""
    # what the kernel says
    OOM = "oom"
    """The kernel killed it for want of memory."""
    FILE_CHANGED = "file_changed"
    """Its file was overwritten or cut off while it was in use."""
    KILLED = "killed"
    """Somebody has ended it by a signal that is for that."""
    SIGNAL = "signal"
    """A signal ended it: it crashed."""
    EXIT = "exit"
    """It ended by itself, with whatever exit code."""
    HUNG = "hung"
    """It lived, did not answer and did nothing."""
    UNKNOWN = "unknown"
    """It ended, and nothing says why."""


class Consequence(Enum):
    """What follows from a cause."""

    RETRY = "retry"  # a router is started again after its backoff, a model is loaded again
    EVICT = "evict"  # the model is loaded again once there is more room, or less is reckoned with
    QUARANTINE = "quarantine"  # the model is left alone for a while, and its router goes on
    LATCH = "latch"  # the router waits for a change, or for a person


class Subject(Enum):
    """What has ended."""

    ROUTER = 0
    LOADING = 1  # a model before it could answer
    SERVING = 2  # a model that could


_R, _E, _Q, _L = Consequence.RETRY, Consequence.EVICT, Consequence.QUARANTINE, Consequence.LATCH

# For each cause, what it means for a router, for a model that was loading, and for one that was serving. A serving
# model that ends is no failed load and is loaded again (DESIGN.md, 11), unless that would end the same way at once.
_CONSEQUENCES: Mapping[Cause, tuple[Consequence, Consequence, Consequence]] = {
    Cause.REQUESTED: (_R, _R, _R),
    Cause.DEVICE: (_R, _R, _R),
    Cause.UPGRADE: (_R, _R, _R),
    Cause.UNSOUND: (_R, _Q, _R),
    Cause.SPAWN: (_R, _Q, _R),
    Cause.PORT_TAKEN: (_R, _Q, _R),
    Cause.MODELS_DIR: (_R, _Q, _R),
    Cause.STATE_DIR: (_R, _Q, _R),
    Cause.START_TIMEOUT: (_R, _Q, _R),
    Cause.STALLED: (_R, _Q, _R),
    Cause.BAD_OPTION: (_L, _Q, _R),
    Cause.BAD_BINARY: (_L, _Q, _R),
    Cause.BAD_FILE: (_R, _Q, _R),
    Cause.NO_MEMORY: (_R, _E, _Q),
    Cause.OOM: (_R, _E, _Q),
    Cause.FILE_CHANGED: (_R, _Q, _R),
    Cause.KILLED: (_R, _R, _R),
    Cause.SIGNAL: (_R, _R, _R),
    Cause.EXIT: (_R, _Q, _R),
    Cause.HUNG: (_R, _Q, _R),
    Cause.UNKNOWN: (_R, _R, _R),
}


def consequence(cause: Cause, subject: Subject) -> Consequence:
    """What follows for `subject` when it has ended for `cause`."""
    return _CONSEQUENCES[cause][subject.value]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the end of a router means, or what keeps one from being started.

    Attributes:
        cause: the class of it.
        reason: one line for a person.
        hint: what to do next, may be empty.
        is_obstacle: we saw it ourselves before a start, and can see for ourselves when it has gone.
    """

    cause: Cause
    reason: str
    hint: str = ""
    is_obstacle: bool = False

    @property
    def is_permanent(self) -> bool:
        """Whether starting again unchanged is pointless: the router waits for a change instead."""
        return self.is_obstacle or consequence(self.cause, Subject.ROUTER) is Consequence.LATCH


# What llama-server, the loader and drivers print before they give up, b11434. The first that is found counts.
_LAST_WORDS: Sequence[tuple[re.Pattern[str], Cause, str]] = (
    (re.compile(r"couldn't bind HTTP server socket.*"), Cause.PORT_TAKEN, "choose another port, or end its holder"),
    (re.compile(r"error: invalid argument: .*"), Cause.BAD_OPTION, "correct `args` in the configuration"),
    (re.compile(r"error while handling argument .*"), Cause.BAD_OPTION, "correct the option in the configuration"),
    (re.compile(r"option '.*' not recognized in preset .*"), Cause.BAD_OPTION, "correct the option"),
    (re.compile(r"failed to parse server config file.*"), Cause.BAD_OPTION, "correct the option"),
    (re.compile(r"'.*' does not exist or is not a directory"), Cause.MODELS_DIR, "create it, or correct models_dir"),
    (re.compile(r"alias '.*' for model '.*' conflicts .*"), Cause.BAD_OPTION, "give each model an alias of its own"),
    (re.compile(r"failed to initialize router models: .*"), Cause.MODELS_DIR, "see that all of models_dir can be read"),
    (re.compile(r"error while loading shared libraries: .*"), Cause.BAD_BINARY, "install the library or llama-server"),
    (
        re.compile(
            r"(?i:.*(?:(?:out of|insufficient) memory|(?:failed|unable) to allocate|cannot allocate memory|bad_alloc"
            r"|cudaMalloc failed|OutOf(?:Device|Host)Memory).*)"
        ),
        Cause.NO_MEMORY,
        "",
    ),
    (
        re.compile(
            r".*(?:invalid magic|failed to read (?:magic|tensor|key)|not within the file bounds|file is too short"
            r"|unknown model architecture|missing tensor|wrong shape|invalid (?:vocab|ggml type|split)"
            r"|error loading model|failed to load model).*"
        ),
        Cause.BAD_FILE,
        "",
    ),
)


def _in_words(line: str) -> tuple[Cause, str, str] | None:
    """The cause that a line of output names, the part of it that does, and what to do about it."""
    for pattern, cause, hint in _LAST_WORDS:
        if found := pattern.search(line):
            return cause, found[0], hint
    return None


_KILLS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})


def was_killed(status: ExitStatus | None) -> bool:
    """Whether a process was ended from outside, and did not crash by itself."""
    return status is not None and status.signal in _KILLS


def classify_refusal(text: str) -> Cause:
    """Why a router would not load a model, by what it answered."""
    found = _in_words(text)
    return Cause.UNSOUND if found is None else found[0]


def classify(status: ExitStatus, *, was_ready: bool, last_lines: Sequence[str]) -> Verdict:
    """What the end of a router's process means.

    Args:
        status: how the process ended.
        was_ready: whether this process had ever been ready; if so its options cannot be the cause.
        last_lines: the end of what it printed.
    """
    if not was_ready and status.code not in (0, None):
        for line in reversed(last_lines):
            if (found := _in_words(line)) is not None:
                cause, reason, hint = found
                return Verdict(cause, reason, hint)
    if status.signal is not None:
        oom = ", possibly out of memory" if status.signal == signal.SIGKILL else ""
        return Verdict(Cause.SIGNAL, f"ended by {status}{oom}")
    return Verdict(Cause.EXIT, f"ended with {status}")


@dataclass(frozen=True, slots=True)
class Traces:
    """What is known of the end of a model's process.

    Attributes:
        status: how it ended, None if nobody can say.
        words: the errors that it has printed, the first of which is the reason.
        was_overwritten: whether its file is not what it was when it was loaded.
        was_oom: whether the kernel has just killed a process of ours for want of memory.
    """

    status: ExitStatus | None = None
    words: Sequence[str] = ()
    was_overwritten: bool = False
    was_oom: bool = False


def classify_model(traces: Traces, subject: Subject) -> tuple[Cause, str]:
    """Why a model was lost, and that in one line for a person. The first of these that holds counts.

    1. Its file was overwritten while it served, or the kernel could not read a page of it (SIGBUS).
    2. The kernel killed it for want of memory.
    3. It has said why.
    4. It was ended by a signal, or ended by itself.
    """
    status, words = traces.status, traces.words
    number = None if status is None else status.signal
    if number == signal.SIGBUS or (traces.was_overwritten and subject is Subject.SERVING):
        how = "" if status is None else f" ({status})"
        if traces.was_overwritten:
            return Cause.FILE_CHANGED, f"its file was overwritten or cut off while it was in use{how}"
        return Cause.FILE_CHANGED, f"its file cannot be read any more: it was cut off, or its disk fails{how}"
    if traces.was_oom and number in {None, signal.SIGKILL}:
        return Cause.OOM, "the kernel killed its process for want of memory"
    if words:
        named = (found[0] for line in words if (found := _in_words(line)) is not None)
        return next(named, Cause.EXIT), words[0]
    when = " while it was loading" if subject is Subject.LOADING else ""
    if was_killed(status):
        return Cause.KILLED, f"its process was killed by {status}{when}"
    if number is not None:
        return Cause.SIGNAL, f"its process was ended by {status}{when}"
    if subject is Subject.LOADING:
        return Cause.UNKNOWN, "its process ended while it was loading, and has not said why"
    return Cause.EXIT, "its process ended unasked" if status is None else f"its process ended unasked with {status}"


_SPAWNING = re.compile(r"spawning server instance with name=(?P<name>.+) on port (?P<port>\d+)$")
_STOPPING = re.compile(r"(?:stopping|force-killing) model instance name=(?P<name>.+?)(?: after timeout)?$")
_ERROR = re.compile(
    r"^(?:(?:[\d.]+ )?E "
    r"|.*(?=GGML_ASSERT\(|error while loading shared libraries)"
    r"|(?=error while handling argument|(?:CUDA|ROCm|MUSA) error: |terminate called after throwing))(?P<text>.*)$"
)
_LAST = 30
"""So many lines before the end of a process that served are about that end."""


def load_failure(model: str, lines: Sequence[str]) -> tuple[str, ...]:
    """Why a model could not be loaded: the errors that its child printed.

    llama-server's API only says that a load failed; the reason is in the lines `[port] time E text` of the router's
    output, or in that of a failed assertion. The first error is the cause, the later ones are its consequences.

    Args:
        model: its name.
        lines: what the router has printed since the load began.
    """
    return tuple(_errors(model, lines))


def last_errors(model: str, lines: Sequence[str]) -> tuple[str, ...]:
    """What a model that served has printed of its end: the errors among its last lines.

    Args:
        model: its name.
        lines: what the router has printed, at least since the process of the model was started.
    """
    spawned = max((at for at, line in enumerate(lines) if _is_of(_SPAWNING, model, line)), default=None)
    if spawned is None:
        return ()
    return tuple(_errors(model, [lines[spawned], *lines[spawned + 1 :][-_LAST:]]))


def last_words(model: str, lines: Sequence[str], count: int) -> tuple[str, ...]:
    """The last lines that the last process of a model has printed, as it printed them."""
    return tuple(_printed(model, lines)[-count:])


def _printed(model: str, lines: Sequence[str]) -> list[str]:
    last = max((at for at, line in enumerate(lines) if _is_of(_SPAWNING, model, line)), default=None)
    spawning = None if last is None else _SPAWNING.search(lines[last])
    if last is None or spawning is None:
        return []
    mark = f"[{spawning['port']}] "
    return [line.removeprefix(mark) for line in lines[last + 1 :] if line.startswith(mark)]


def _errors(model: str, lines: Sequence[str]) -> Iterator[str]:
    """The errors that the last process of a model has printed."""
    for line in _printed(model, lines):
        if error := _ERROR.match(line):
            yield error["text"].strip()


def _is_of(pattern: re.Pattern[str], model: str, line: str) -> bool:
    return (found := pattern.search(line)) is not None and found["name"] == model


def was_told_to_stop(model: str, lines: Sequence[str]) -> bool:
    """Whether the router itself ended the process of a model, for a client or to make room, says its output.

    Args:
        model: its name.
        lines: the end of what the router has printed.
    """
    for line in reversed(lines):
        if _is_of(_STOPPING, model, line):
            return True
        if _is_of(_SPAWNING, model, line):
            return False
    return False
