"""What happens to the daemon itself, its configuration, and those who speak to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from llamavisor.events.base import Event


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


NAMED_MAX = 10
"""How many models one line names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigReloaded(Event):
    """A new configuration is in force.

    `changed` names the routers that it touched, `models` the models, and `gateway` what of the gateway is another.
    """

    changed: tuple[str, ...]
    models: tuple[str, ...] = ()
    gateway: tuple[str, ...] = ()

    def message(self) -> str:
        told = [*(f"gateway {what}" for what in self.gateway)]
        told += [*(f"router {name}" for name in self.changed), *(f"model {name}" for name in self.models[:NAMED_MAX])]
        if len(self.models) > NAMED_MAX:
            told.append(f"{len(self.models) - NAMED_MAX} more models")
        return f"configuration reloaded, changed: {', '.join(told) or 'nothing'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRejected(Event):
    """A new configuration was refused; the old one stays in force."""

    level: ClassVar[int] = logging.ERROR

    error: str

    def message(self) -> str:
        return f"configuration not reloaded, the old one stays: {self.error}"


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
class ControlSocketRebound(Event):
    """The file of the control socket had gone, or was another's, and commands are taken there again."""

    level: ClassVar[int] = logging.WARNING

    socket: str

    def message(self) -> str:
        return f"the control socket {self.socket} had gone and was bound anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something is not as it should be, and work goes on."""

    level: ClassVar[int] = logging.WARNING

    subject: str
    text: str

    def message(self) -> str:
        return f"{self.subject}: {self.text}"
