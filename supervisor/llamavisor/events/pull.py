"""What happens to models on their way from the Hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from llamavisor.events.base import Event

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStarted(Event):
    """A model is being fetched from the Hub, or fetched on: `here_bytes` of it are on the disk already."""

    pull: str
    model: str
    repository: str
    commit: str
    file_count: int
    total_bytes: int
    here_bytes: int

    def message(self) -> str:
        here = f", {self.here_bytes // _MIB} MiB of them here already" if self.here_bytes else ""
        return f"pull {self.model}: {self.total_bytes // _MIB} MiB from {self.repository}{here}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress(Event):
    """So much of a model has come; once a second."""

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False
    is_frequent: ClassVar[bool] = True

    pull: str
    model: str
    done_bytes: int
    total_bytes: int
    speed_bytes_per_s: float
    left_s: float | None

    def message(self) -> str:
        speed = f"{self.speed_bytes_per_s / _MIB:.1f} MiB/s"
        return f"pull {self.model}: {self.done_bytes // _MIB} of {self.total_bytes // _MIB} MiB, {speed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullEnded(Event):
    """A model from the Hub is in the models folder, whole and verified."""

    pull: str
    model: str
    path: str
    total_bytes: int
    duration_s: float

    def message(self) -> str:
        return f"pull {self.model}: done in {self.duration_s:.1f} s, it is {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullCancelled(Event):
    """A person has ended a pull; what came is kept to be gone on with, or dropped."""

    pull: str
    model: str
    is_dropped: bool

    def message(self) -> str:
        return f"pull {self.model}: cancelled, and what came is {'dropped' if self.is_dropped else 'kept'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullFailed(Event):
    """A model does not come; what came is kept to be gone on with."""

    level: ClassVar[int] = logging.WARNING

    pull: str
    model: str
    why: str
    reason: str

    def message(self) -> str:
        return f"pull {self.model}: {self.reason}"
