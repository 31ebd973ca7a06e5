"""The configuration in force: complete, checked, and frozen; `llamavisord.loading` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llamavisor.settings import RouterSettings
from llamavisord.problems import ConfigError, Origin

__all__ = ["Config", "ConfigError", "Metrics", "Setting"]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where Prometheus reads, and whether it can."""

    enabled: bool
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value, for people: its key, what it is, and where it is from. A secret is "(set)"."""

    key: str
    value: object
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration that holds together.

    Attributes:
        path: the file that was read, None without one.
        serve: "router".
        routers: what each router is told to be, in the order of the file.
        metrics: the Prometheus endpoint.
        socket: the control socket.
        state_dir: the folder for generated files and for what survives a restart.
        log_dir: the folder for the routers' output.
        log_level: "debug", "info", "warning" or "error".
        log_size_bytes: size at which a router's log file is rotated.
        warnings: what a person should know although it works.
        settings: every effective value and its origin.
    """

    path: Path | None
    serve: str
    routers: tuple[RouterSettings, ...]
    metrics: Metrics
    socket: Path
    state_dir: Path
    log_dir: Path
    log_level: str
    log_size_bytes: int
    warnings: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = field(default=(), repr=False, compare=False)

    @property
    def runtime_dir(self) -> Path:
        """The folder of the control socket."""
        return self.socket.parent

    def router_settings(self) -> tuple[RouterSettings, ...]:
        """What each router is told to be."""
        return self.routers
