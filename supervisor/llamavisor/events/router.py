"""What happens to routers and their processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from llamavisor.cause import Cause
from llamavisor.events.base import Event
from llamavisor.states import RouterState


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStateChanged(Event):
    """A router went from one state to another; the events of the reason stand beside it."""

    level: ClassVar[int] = logging.DEBUG

    router: str
    old: RouterState
    new: RouterState

    def message(self) -> str:
        return f"router {self.router}: {self.old.value} -> {self.new.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpawned(Event):
    """A llama-server process was started for a router; `cause` is why it replaces another, None if it does not."""

    router: str
    pid: int
    cause: Cause | None = None

    def message(self) -> str:
        return f"router {self.router}: started, pid {self.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReady(Event):
    """A router answers. `start_s` is the time since its process was started, in seconds."""

    router: str
    pid: int
    url: str
    start_s: float

    def message(self) -> str:
        return f"router {self.router}: ready at {self.url} after {self.start_s:.2f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterProbed(Event):
    """A router was asked whether it answers; `error` says why it did not."""

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False

    router: str
    duration_s: float
    error: str | None = None

    def message(self) -> str:
        answer = f"probe failed: {self.error}" if self.error else "answers"
        return f"router {self.router}: {answer} ({self.duration_s * 1000:.0f} ms)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterDegraded(Event):
    """A router serves, but keeps less than it promised."""

    level: ClassVar[int] = logging.WARNING

    router: str
    reason: str

    def message(self) -> str:
        return f"router {self.router}: degraded: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterHung(Event):
    """A router has not answered for `silent_s` seconds and does nothing; it makes way for a fresh process."""

    level: ClassVar[int] = logging.ERROR

    router: str
    silent_s: float
    reason: str

    def message(self) -> str:
        return f"router {self.router}: hangs: {self.reason}; restarting it"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterExited(Event):
    """The process of a router ended. `is_requested` tells whether we asked it to."""

    router: str
    pid: int
    status: str
    cause: Cause
    is_requested: bool
    detail: str = ""

    def message(self) -> str:
        if self.is_requested:
            return f"router {self.router}: ended as asked ({self.status})"
        return f"router {self.router}: pid {self.pid} ended unasked: {self.detail or self.status}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterGone(Event):
    """Nothing is left of a router's process and of what it had started."""

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False

    router: str

    def message(self) -> str:
        return f"router {self.router}: nothing is left of its process"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRestartScheduled(Event):
    """A router that ended unasked, or never came up, is started again after `delay_s` seconds."""

    level: ClassVar[int] = logging.WARNING

    router: str
    cause: Cause
    delay_s: float
    failures: int

    def message(self) -> str:
        if self.delay_s <= 0:
            return f"router {self.router}: starting again now ({self.cause.value})"
        count = f"failure {self.failures} in a row"
        return f"router {self.router}: starting again in {self.delay_s:.1f} s ({self.cause.value}, {count})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCrashLoop(Event):
    """A router has failed so often in a row that a person should look; it is still tried."""

    level: ClassVar[int] = logging.ERROR

    router: str
    failures: int

    def message(self) -> str:
        return f"router {self.router}: crash loop, {self.failures} failures in a row; see `llamavisor logs`"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFailed(Event):
    """A router was given up until the cause changes or a person starts it."""

    level: ClassVar[int] = logging.ERROR

    router: str
    cause: Cause
    reason: str
    hint: str

    def message(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"router {self.router}: failed: {self.reason}{hint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRecovered(Event):
    """A restarted router holds again what was resident; `seconds` counts from the end of the old process."""

    router: str
    models: tuple[str, ...]
    missing: tuple[str, ...]
    seconds: float

    def message(self) -> str:
        models = ", ".join(self.models) or "no model"
        missing = f"; not loaded again: {', '.join(self.missing)}" if self.missing else ""
        return f"router {self.router}: recovered after {self.seconds:.2f} s with {models}{missing}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StraysKilled(Event):
    """Processes that outlived the one that started them were killed."""

    level: ClassVar[int] = logging.WARNING

    router: str | None
    pids: tuple[int, ...]
    survivors: tuple[int, ...] = ()

    def message(self) -> str:
        whose = f"of router {self.router}" if self.router else "of an earlier daemon"
        text = f"killed {len(self.pids)} left-over processes {whose}: {', '.join(map(str, self.pids))}"
        return f"{text}; could not kill {', '.join(map(str, self.survivors))}" if self.survivors else text


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRotated(Event):
    """A router's log file reached its cap."""

    level: ClassVar[int] = logging.DEBUG

    router: str
    size_bytes: int

    def message(self) -> str:
        return f"router {self.router}: log rotated at {self.size_bytes} bytes"
