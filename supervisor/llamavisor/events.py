"""What happened: frozen, typed events, and the bus that keeps the last of them and tells whoever listens.

An event is the truth; the log line, the metric and the `events` stream are three renderings of it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from enum import Enum
from typing import ClassVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from llamavisor.cause import Cause
from llamavisor.states import RouterState

KEPT = 1000
"""How many events can be replayed."""


class UnloadReason(Enum):
    """Why a model left memory."""

    REQUESTED = "requested"  # somebody asked us
    EVICTED = "evicted"  # the router made room, or a client asked the router itself
    CRASHED = "crashed"  # its child ended unasked
    ROUTER = "router"  # its router ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something notable that happened; every subclass adds what it happened to.

    Class attributes:
        level: the level of its log line.
        is_kept: whether it is worth a place among the events that can be replayed.
    """

    level: ClassVar[int] = logging.INFO
    is_kept: ClassVar[bool] = True

    def message(self) -> str:
        """One line for a person."""
        raise AssertionError(f"{type(self).__name__} does not say what it means")

    def as_dict(self) -> dict[str, object]:
        """Its name, its fields and its message, as JSON knows them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
        return {"event": type(self).__name__, **plain, "message": self.message()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStarted(Event):
    """The daemon answers on its control socket."""

    version: str
    pid: int
    socket: str
    config: str | None

    def message(self) -> str:
        config = self.config or "no configuration file"
        return f"llamavisor {self.version} is up, pid {self.pid}, {config}, commands on {self.socket}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStopping(Event):
    """The daemon was asked to end."""

    reason: str

    def message(self) -> str:
        return f"stopping: {self.reason}"


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
class ModelLoading(Event):
    """A model began to load. `is_requested` tells whether we asked for it, or a client by a request to the router."""

    router: str
    model: str
    is_requested: bool

    def message(self) -> str:
        return f"model {self.model}: loading on {self.router}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProgress(Event):
    """A model has loaded the fraction `progress`, 0 to 1, of `stage`."""

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False

    router: str
    model: str
    stage: str
    progress: float

    def message(self) -> str:
        return f"model {self.model}: {self.stage} {self.progress:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoaded(Event):
    """A model can answer. `load_s` is None when its loading began before we looked."""

    router: str
    model: str
    load_s: float | None

    def message(self) -> str:
        after = "" if self.load_s is None else f" after {self.load_s:.2f} s"
        return f"model {self.model}: loaded on {self.router}{after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoadFailed(Event):
    """A model that was loading did not become loaded."""

    level: ClassVar[int] = logging.ERROR

    router: str
    model: str
    reason: str

    def message(self) -> str:
        return f"model {self.model}: load failed on {self.router}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSleeping(Event):
    """A model gave its memory back but kept its process (--sleep-idle-seconds)."""

    router: str
    model: str

    def message(self) -> str:
        return f"model {self.model}: asleep on {self.router}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUnloaded(Event):
    """A model left memory."""

    router: str
    model: str
    reason: UnloadReason

    def message(self) -> str:
        return f"model {self.model}: unloaded from {self.router} ({self.reason.value})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChildExited(Event):
    """The child process of a model ended; why follows when the router has said it."""

    level: ClassVar[int] = logging.DEBUG

    router: str
    model: str
    pid: int

    def message(self) -> str:
        return f"model {self.model}: its process {self.pid} on {self.router} ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigReloaded(Event):
    """A new configuration is in force; `changed` names the routers that it touched."""

    changed: tuple[str, ...]

    def message(self) -> str:
        return f"configuration reloaded, changed: {', '.join(self.changed) or 'nothing'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRejected(Event):
    """A new configuration was refused; the old one stays in force."""

    level: ClassVar[int] = logging.ERROR

    error: str

    def message(self) -> str:
        return f"configuration not reloaded, the old one stays: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRotated(Event):
    """A router's log file reached its cap."""

    level: ClassVar[int] = logging.DEBUG

    router: str
    size_bytes: int

    def message(self) -> str:
        return f"router {self.router}: log rotated at {self.size_bytes} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRefused(Event):
    """A process without permission spoke to the control socket."""

    level: ClassVar[int] = logging.WARNING

    uid: int
    pid: int
    request: str

    def message(self) -> str:
        return f"refused {self.request} from uid {self.uid}, pid {self.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something is not as it should be, and work goes on."""

    level: ClassVar[int] = logging.WARNING

    subject: str
    text: str

    def message(self) -> str:
        return f"{self.subject}: {self.text}"


@dataclass(frozen=True, slots=True)
class Published:
    """An event with its number (from 1, without gaps) and the wall-clock time in Unix seconds."""

    id: int
    time: float
    event: Event

    def as_dict(self) -> dict[str, object]:
        """The event as the control API shows it."""
        return {"id": self.id, "time": self.time, **self.event.as_dict()}


class Bus:
    """Numbers events, keeps the last `KEPT`, and passes them on. Used from one event loop.

    Args:
        wall: clock for what a person reads; policy never looks at it.
    """

    def __init__(self, *, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._last_id = 0
        self._kept: deque[Published] = deque(maxlen=KEPT)
        self._listeners: list[Callable[[Published], None]] = []
        self._subscribers: set[MemoryObjectSendStream[Published]] = set()

    def __repr__(self) -> str:
        return f"<Bus last_id={self._last_id} subscribers={len(self._subscribers)}>"

    @property
    def last_id(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self._last_id

    def listen(self, listener: Callable[[Published], None]) -> None:
        """Have `listener` called with every event, at once; it must not block and not raise."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Number the event and pass it on. Never blocks: a subscriber that does not keep up is cut off."""
        self._last_id += 1
        published = Published(self._last_id, self._wall(), event)
        if event.is_kept:
            self._kept.append(published)
        for listener in self._listeners:
            listener(published)
        for subscriber in tuple(self._subscribers):
            try:
                subscriber.send_nowait(published)
            except (anyio.WouldBlock, anyio.BrokenResourceError):
                self._subscribers.discard(subscriber)
                subscriber.close()

    def replay(self, since: int) -> list[Published]:
        """The kept events with a number above `since`; all of them if `since` is of an earlier daemon."""
        if since > self._last_id:
            since = 0
        return [published for published in self._kept if published.id > since]

    @asynccontextmanager
    async def subscribe(
        self, *, since: int | None = None
    ) -> AsyncIterator[tuple[list[Published], MemoryObjectReceiveStream[Published]]]:
        """The kept events after `since` (none for None), and a stream of all that follow, without a gap between them.

        The stream ends when its reader falls `KEPT` events behind; a reader comes back with the last number it saw.
        """
        send, receive = anyio.create_memory_object_stream[Published](KEPT)
        self._subscribers.add(send)
        try:
            with receive:
                yield ([] if since is None else self.replay(since)), receive
        finally:
            self._subscribers.discard(send)
            send.close()
