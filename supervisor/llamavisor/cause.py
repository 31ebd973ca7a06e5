"""Why a router ended or could not start: one table from what is seen to a cause and its consequence."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from llamavisor.process import ExitStatus


class Cause(Enum):
    """Why a router is started again, or is not; the `reason` label of the restart metric."""

    REQUESTED = "requested"  # a person or a new configuration
    EXIT = "exit"  # it ended by itself, with whatever exit code
    SIGNAL = "signal"  # a signal ended it
    START_TIMEOUT = "start_timeout"  # it did not become ready in time
    SPAWN = "spawn"  # it could not be started for want of something that may come back
    PORT_TAKEN = "port_taken"
    BAD_OPTION = "bad_option"
    BAD_BINARY = "bad_binary"  # missing, not executable, not a llama-server with router mode
    MODELS_DIR = "models_dir"  # missing, not a folder, or not readable
    STATE_DIR = "state_dir"  # our own files cannot be written: a full disk is emptied some day
    DEVICE = "device"  # a device that the configuration names appeared late
    UPGRADE = "upgrade"  # llama-server was replaced on disk
    UNSOUND = "unsound"  # it went on, but could not be brought up to date, or lost sight of a model's process


_PERMANENT = frozenset({Cause.BAD_OPTION, Cause.BAD_BINARY})
"""Causes that stay until somebody changes something."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an end means.

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
        return self.is_obstacle or self.cause in _PERMANENT


# What llama-server and the loader print before they give up, b11434; looked for only in a router that never was ready.
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
)


def classify(status: ExitStatus, *, was_ready: bool, last_lines: Sequence[str]) -> Verdict:
    """What the end of a router's process means.

    Args:
        status: how the process ended.
        was_ready: whether this process had ever been ready; if so its options cannot be the cause.
        last_lines: the end of what it printed.
    """
    if not was_ready and status.code not in (0, None):
        for line in reversed(last_lines):
            for pattern, cause, hint in _LAST_WORDS:
                if found := pattern.search(line):
                    return Verdict(cause, found[0], hint)
    if status.signal is not None:
        oom = ", possibly out of memory" if status.signal == signal.SIGKILL else ""
        return Verdict(Cause.SIGNAL, f"ended by {status}{oom}")
    return Verdict(Cause.EXIT, f"ended with {status}")


_SPAWNING = re.compile(r"spawning server instance with name=(?P<name>.+) on port (?P<port>\d+)$")
_STOPPING = re.compile(r"(?:stopping|force-killing) model instance name=(?P<name>.+?)(?: after timeout)?$")
_CHILD_LINE = re.compile(
    r"^\[(?P<port>\d+)\] (?:(?:[\d.]+ )?E |.*(?=GGML_ASSERT\()|(?=error while handling argument))(?P<text>.*)$"
)


def load_failure(model: str, lines: Sequence[str]) -> str | None:
    """Why a model could not be loaded: the first error that its child printed, None if it printed none.

    llama-server's API only says that a load failed; the reason is in the lines `[port] time E text` of the router's
    output, or in that of a failed assertion. The first error is the cause, the later ones are its consequences.

    Args:
        model: its name.
        lines: what the router has printed since the load began.
    """
    port: str | None = None
    reason: str | None = None
    for line in lines:
        if (spawning := _SPAWNING.search(line)) and spawning["name"] == model:
            port, reason = spawning["port"], None
        elif reason is None and (error := _CHILD_LINE.match(line)) and error["port"] == port:
            reason = error["text"].strip()
    return reason


_NO_MEMORY = re.compile(
    r"out of memory|(?:failed|unable) to allocate|cannot allocate memory|bad_alloc|OutOf(?:Device|Host)Memory"
    r"|cudaMalloc failed",
    re.IGNORECASE,
)


def is_for_memory(reason: str) -> bool:
    """Whether a load failed for want of memory, by what llama-server or a driver has printed."""
    return _NO_MEMORY.search(reason) is not None


def was_told_to_stop(model: str, lines: Sequence[str]) -> bool:
    """Whether the router itself ended the process of a model, for a client or to make room, says its output.

    Args:
        model: its name.
        lines: the end of what the router has printed.
    """
    for line in reversed(lines):
        if (stopping := _STOPPING.search(line)) and stopping["name"] == model:
            return True
        if (spawning := _SPAWNING.search(line)) and spawning["name"] == model:
            return False
    return False
