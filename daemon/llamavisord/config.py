"""The configuration in force: complete, checked, and frozen; `llamavisord.loading` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llamavisor.eviction import MIN_RESIDENCY_S
from llamavisor.rules import ModelRule
from llamavisor.settings import FleetSettings, OnOverwrite, Oversize, RouterSettings, Serve
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
        rules: what single models are told, in the order of the file.
        link_dirs: folders outside of a models folder that symlinks in it may lead to.
        on_overwrite: what becomes of a loaded model whose file is overwritten: "reload", "unload" or "keep".
        min_residency_s: how long a model that was just loaded is the last to be unloaded to make room.
        oversize: what becomes of a demand for a model that is larger than its budget: "fit" or "refuse".
        warnings: what a person should know although it works.
        settings: every effective value and its origin.
    """

    path: Path | None
    serve: Serve
    routers: tuple[RouterSettings, ...]
    metrics: Metrics
    socket: Path
    state_dir: Path
    log_dir: Path
    log_level: str
    log_size_bytes: int
    rules: tuple[ModelRule, ...] = ()
    link_dirs: tuple[Path, ...] = ()
    on_overwrite: OnOverwrite = "reload"
    min_residency_s: float = MIN_RESIDENCY_S
    oversize: Oversize = "fit"
    warnings: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = field(default=(), repr=False, compare=False)

    @property
    def runtime_dir(self) -> Path:
        """The folder of the control socket."""
        return self.socket.parent

    def fleet_settings(self) -> FleetSettings:
        """What the routers and their models are told to be."""
        return FleetSettings(
            routers=self.routers,
            rules=self.rules,
            link_dirs=self.link_dirs,
            on_overwrite=self.on_overwrite,
            serve=self.serve,
            min_residency_s=self.min_residency_s,
            oversize=self.oversize,
        )
