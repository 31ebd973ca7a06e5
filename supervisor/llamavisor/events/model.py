"""What happens to models on routers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from llamavisor.cause import Cause
from llamavisor.events.base import Event
from llamavisor.states import Change


class UnloadReason(Enum):
    """Why a model left memory."""

    REQUESTED = "requested"
    """Somebody asked for that."""
    REFRESHED = "refreshed"
    """Its file or its options had changed, and it was idle."""
    EVICTED = "evicted"
    """Room was made for another model, by us or by the router; or a client asked the router."""
    EXPIRED = "expired"
    """Nobody had used it for as long as its ttl says."""
    PRESSURE = "pressure"
    """Memory was short."""
    CANCELLED = "cancelled"
    """Nobody waited for its load any more."""
    STALLED = "stalled"
    """Its load made no progress for too long."""
    CRASHED = "crashed"
    """Its process ended unasked."""
    UNRESPONSIVE = "unresponsive"
    """Its process lived and did not answer."""
    RECYCLED = "recycled"
    """Its process had grown beyond the bound that is set for it (`recycle_above`)."""
    OOM = "oom"
    """The kernel killed its process for want of memory."""
    FILE_CHANGED = "file_changed"
    """Its process ended unasked after its file was overwritten or cut off."""
    ROUTER = "router"
    """Its router ended."""


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
    """A model can answer. `load_s` is None when its loading began before we looked.

    `is_again`: it was in memory before its router, or the daemon, had ended.
    """

    router: str
    model: str
    load_s: float | None
    is_again: bool = False

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
    cause: Cause = Cause.UNKNOWN

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
    """A model left memory. If nobody had asked for that, `cause` and `detail` tell why its process has ended."""

    router: str
    model: str
    reason: UnloadReason
    cause: Cause | None = None
    detail: str = ""

    @property
    def log_level(self) -> int:
        """A model that crashed is a warning, one that was unloaded is not."""
        return logging.WARNING if self.reason in _CRASHES else self.level

    def message(self) -> str:
        if self.reason in _CRASHES:
            detail = f": {self.detail}" if self.detail else ""
            return f"model {self.model}: {_CRASHES[self.reason].format(router=self.router)}{detail}"
        return f"model {self.model}: unloaded from {self.router} ({self.reason.value})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChildExited(Event):
    """The child process of a model ended, with `status` if that is known; why follows when the router has said it."""

    level: ClassVar[int] = logging.DEBUG

    router: str
    model: str
    pid: int
    status: str = ""

    def message(self) -> str:
        how = f" ({self.status})" if self.status else ""
        return f"model {self.model}: its process {self.pid} on {self.router} ended{how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHung(Event):
    """The process of a model has not answered for `silent_s` seconds and does nothing, or fails at all; it is ended."""

    level: ClassVar[int] = logging.ERROR

    router: str
    model: str
    pid: int
    silent_s: float
    reason: str

    def message(self) -> str:
        return f"model {self.model}: its process {self.pid} on {self.router} hangs: {self.reason}; ending it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGrown(Event):
    """The process of a model has grown beyond the bound that is set for it; it is loaded anew when it is idle."""

    level: ClassVar[int] = logging.WARNING

    router: str
    model: str
    bytes: int
    limit_bytes: int

    def message(self) -> str:
        size, limit = (f"{each / 1024**2:.0f} MiB" for each in (self.bytes, self.limit_bytes))
        return f"model {self.model}: its process on {self.router} has grown to {size} of {limit}; it is loaded anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAdded(Event):
    """A router can serve a model that it could not before.

    `wait_s` is the time since the model's files were last changed, None if that was before the daemon began.
    """

    router: str
    model: str
    path: str
    wait_s: float | None = None

    def message(self) -> str:
        after = "" if self.wait_s is None else f", {self.wait_s:.2f} s after its file was complete"
        return f"model {self.model}: can be served by {self.router}{after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChanged(Event):
    """A router is told something else of a model than before: of its files, or of its options."""

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False

    router: str
    model: str

    def message(self) -> str:
        return f"model {self.model}: {self.router} was told of its change"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRemoved(Event):
    """A router cannot serve a model any more."""

    router: str
    model: str

    def message(self) -> str:
        return f"model {self.model}: not served by {self.router} any more"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsChanged(Event):
    """So many models at once that only the first are told one by one."""

    router: str
    added: int
    removed: int

    def message(self) -> str:
        return f"router {self.router}: {self.added} models more, {self.removed} fewer; see `llamavisor models`"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWithheld(Event):
    """A router is not told of a model, because it would not take it."""

    level: ClassVar[int] = logging.WARNING

    router: str
    model: str
    reason: str

    def message(self) -> str:
        return f"model {self.model}: withheld from {self.router}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStale(Event):
    """A model in memory is no longer what its file and its options say; `change` is what has happened to it."""

    level: ClassVar[int] = logging.WARNING

    router: str
    model: str
    change: Change
    then: str

    def message(self) -> str:
        return f"model {self.model}: on {self.router} {CHANGES[self.change]}; {self.then}"


_CRASHES = {
    UnloadReason.CRASHED: "crashed on {router}",
    UnloadReason.OOM: "crashed on {router}",
    UnloadReason.FILE_CHANGED: "crashed on {router}",
}
CHANGES = {
    Change.OPTIONS: "its options have changed",
    Change.REPLACED: "its file was replaced",
    Change.OVERWRITTEN: "its file was overwritten in place while it is in use, and it may answer nonsense or crash",
    Change.MOVED: "it is not for this router any more",
    Change.GONE: "its files have gone, or are not fit to be served now",
}
