"""The configuration in force: complete, checked, and frozen; `llamavisord.loading` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from llamavisor.demands import MAX_WAITING, MAX_WAITING_PER_MODEL
from llamavisor.eviction import MIN_RESIDENCY_S
from llamavisor.rules import ModelRule
from llamavisor.settings import FleetSettings, OnOverwrite, Oversize, RouterSettings, Serve
from llamavisord.gateway.keys import Keys
from llamavisord.problems import ConfigError, Origin

__all__ = ["Config", "ConfigError", "GatewaySettings", "Metrics", "Setting"]

ANY = "*"
"""Alone in a list of hosts or origins it stands for all."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where Prometheus reads, and whether it can."""

    enabled: bool
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What the gateway is told to be.

    Attributes:
        host: address that it listens on; a loopback one stands for both, 127.0.0.1 and ::1.
        port: TCP port, 1 to 65535.
        keys: what clients must send; empty for nothing.
        default_model: the model that serves requests which name none; None for no such model.
        allow_origins: web pages that may use it besides those of this machine, as browsers write origins; `ANY`.
        allow_hosts: names that a Host header may carry besides those of the address it listens on, in lower case
            without a port; `ANY`.
        max_body_bytes: what the body of one request may take.
        max_held_bytes: what the bodies of all requests may take together; never less than `max_body_bytes`.
        max_connections: how many clients may be connected at once.
        max_waiting: how many requests may wait for models at once.
        max_waiting_per_model: how many of them for one model.
        wait_s: how long one request waits for its model at most.
        drain_s: how long answers may go on when the daemon is told to end.
        retries: how often a request is sent again after its model has died before it said anything.
        public_without_key: whether a person has said that everybody on the network may use it.
        log_requests: whether each request is logged.
        log_bodies: whether with its body.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: Keys = field(default_factory=Keys)
    default_model: str | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 256 * 1024**2
    max_held_bytes: int = 1024**3
    max_connections: int = 1024
    max_waiting: int = MAX_WAITING
    max_waiting_per_model: int = MAX_WAITING_PER_MODEL
    wait_s: float = 600.0
    drain_s: float = 30.0
    retries: int = 2
    public_without_key: bool = False
    log_requests: bool = False
    log_bodies: bool = False


def gateway_changes(old: GatewaySettings | None, new: GatewaySettings | None) -> tuple[str, ...]:
    """What a reload changes of the gateway, for a person; no key is told but by its name."""
    if old is None or new is None:
        return ()
    changed = [
        each.name
        for each in fields(GatewaySettings)
        if each.name != "keys" and getattr(old, each.name) != getattr(new, each.name)
    ]
    before, after = ({key.name: key for key in settings.keys.keys} for settings in (old, new))
    told = [f"+{name}" for name in after if name not in before]
    told += [f"-{name}" for name in before if name not in after]
    told += [name for name in after if name in before and after[name] != before[name]]
    if told:
        open_now = "; everybody may use it now" if not after else ""
        changed.append(f"keys ({', '.join(told)}{open_now})")
    return tuple(changed)


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
        serve: "gateway" or "router".
        gateway: what the gateway is told to be, None with serve = "router".
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
    gateway: GatewaySettings | None = None
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

    def fleet_settings(self, *, router_key: str) -> FleetSettings:
        """What the routers and their models are told to be.

        Args:
            router_key: what routers ask for that only the gateway talks to.
        """
        settings = FleetSettings(
            routers=self.routers,
            rules=self.rules,
            link_dirs=self.link_dirs,
            on_overwrite=self.on_overwrite,
            serve=self.serve,
            min_residency_s=self.min_residency_s,
            oversize=self.oversize,
            max_waiting=self.gateway.max_waiting if self.gateway else MAX_WAITING,
            max_waiting_per_model=self.gateway.max_waiting_per_model if self.gateway else MAX_WAITING_PER_MODEL,
        )
        return settings.for_leases(router_key) if self.gateway is not None else settings
