"""What happens about memory: who waited for it, who was refused it, and what did not come back."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from llamavisor.events.base import Event

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandMet(Event):
    """Somebody has a model that was asked for; `wait_s` is how long that took, 0 for a model that was loaded."""

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False

    router: str
    model: str
    wait_s: float

    def message(self) -> str:
        return f"model {self.model}: had on {self.router} after {self.wait_s:.2f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandRefused(Event):
    """Somebody does not get a model; `reason` is a word of `Why`, `retry_after_s` None if coming again is in vain.

    `is_repeated`: the same was refused for the same reason a moment ago; it is counted, and no news.
    """

    level: ClassVar[int] = logging.WARNING

    model: str
    reason: str
    detail: str
    wait_s: float
    retry_after_s: float | None
    is_repeated: bool = False

    @property
    def log_level(self) -> int:
        """Clients come again and again: only the first refusal is a warning."""
        return logging.DEBUG if self.is_repeated else self.level

    @property
    def is_news(self) -> bool:
        """Repetitions would bury what happens."""
        return not self.is_repeated

    def message(self) -> str:
        again = "" if self.retry_after_s is None else f"; try again in {self.retry_after_s:.0f} s"
        return f"model {self.model}: refused after {self.wait_s:.1f} s: {self.detail}{again}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQuarantined(Event):
    """A model is not loaded on a router for `for_s` seconds, because it has failed `failures` times in a row."""

    level: ClassVar[int] = logging.WARNING

    router: str
    model: str
    for_s: float
    failures: int
    reason: str

    def message(self) -> str:
        return f"model {self.model}: not loaded on {self.router} for {self.for_s:.0f} s: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPinned(Event):
    """Somebody wants a model to stay in memory once it is there (`is_pinned`), or does not any more."""

    model: str
    is_pinned: bool

    def message(self) -> str:
        return f"model {self.model}: {'pinned' if self.is_pinned else 'not pinned any more'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShrunk(Event):
    """A model has less context than it was to have: llama.cpp makes it shorter where memory is short."""

    level: ClassVar[int] = logging.WARNING

    router: str
    model: str
    asked: int
    got: int

    def message(self) -> str:
        return f"model {self.model}: has {self.got} tokens of context on {self.router}, {self.asked} were asked for"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUnreclaimed(Event):
    """A model's process has gone, and so many bytes of a device had not come back when that was given up."""

    level: ClassVar[int] = logging.WARNING

    router: str
    model: str
    device: str
    bytes: int

    def message(self) -> str:
        return f"model {self.model}: {self.bytes / _MIB:.0f} MiB of {self.device} have not come back after it had gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShort(Event):
    """Memory is short: idle models leave, and with `is_refusing` no model is loaded until it is better."""

    level: ClassVar[int] = logging.WARNING

    is_refusing: bool
    detail: str

    def message(self) -> str:
        then = "no model is loaded for now" if self.is_refusing else "idle models are unloaded"
        return f"memory is short: {self.detail}; {then}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEased(Event):
    """Memory is not short any more."""

    def message(self) -> str:
        return "memory is not short any more"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryKill(Event):
    """The kernel has killed processes of ours for want of memory; models may take less RAM for a while."""

    level: ClassVar[int] = logging.WARNING

    kills: int

    def message(self) -> str:
        count = "a process" if self.kills == 1 else f"{self.kills} processes"
        return f"the kernel has killed {count} of this cgroup for want of memory; models may take less RAM for a while"


@dataclass(frozen=True, slots=True, kw_only=True)
class GaugeFailed(Event):
    """How much memory a device has cannot be told for now; it is reckoned with what models are expected to take."""

    level: ClassVar[int] = logging.WARNING

    device: str
    reason: str

    def message(self) -> str:
        return f"memory of {self.device} is unknown: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GaugeBack(Event):
    """How much memory a device has is known again."""

    device: str

    def message(self) -> str:
        return f"memory of {self.device} is known again"
