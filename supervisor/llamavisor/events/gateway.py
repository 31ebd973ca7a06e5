"""What happens to the door that clients come through."""

from __future__ import annotations

from dataclasses import dataclass

from llamavisor.events.base import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayListening(Event):
    """Clients can come in, at any of `urls`."""

    urls: tuple[str, ...]

    def message(self) -> str:
        return f"gateway: listening on {', '.join(self.urls)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayDraining(Event):
    """The gateway takes no new requests; those that are in it are finished.

    `deadline_s` is after how long they are ended, None if they have as long as they need.
    """

    reason: str
    requests: int
    deadline_s: float | None

    def message(self) -> str:
        within = "" if self.deadline_s is None else f", ended after {self.deadline_s:g} s at the latest"
        return f"gateway: no new requests are taken ({self.reason}); {self.requests} in flight{within}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayResumed(Event):
    """The gateway takes requests again."""

    def message(self) -> str:
        return "gateway: requests are taken again"
