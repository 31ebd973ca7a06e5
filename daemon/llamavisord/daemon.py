"""The running daemon as its faces see it: the fleet, the configuration in force, and how to change it."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from llamavisor.catalog import EntryState
from llamavisor.downloads import Downloads
from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus, ConfigRejected, ConfigReloaded, Warned
from llamavisor.fleet import Applied, Fleet
from llamavisor.settings import FleetSettings, base_url
from llamavisor.states import RouterState
from llamavisor.threads import run_in_thread
from llamavisord import __version__
from llamavisord.config import Config, gateway_changes
from llamavisord.inventory import Inventory
from llamavisord.memory_view import memory_warnings
from llamavisord.notify import Notifier
from llamavisord.problems import ConfigError, Problem
from llamavisord.traffic import Traffic
from llamavisord.unmatched import unmatched
from llamavisord.variables import Variable

RELOAD_LOOK_S = 10.0
"""How long a reload waits for the look at the models folders, and for the routers to hear of what is new there."""
DOOR_S = 1.0
"""How long who has asked for a model waits for the gateway to listen, where it can be used."""
FIXED: Mapping[str, str] = {
    "serve": "serve",
    "socket": "socket",
    "state_dir": "state_dir",
    Variable.LOGS_DIRECTORY: "log_dir",
    "log_size": "log_size_bytes",
    "log_level": "log_level",
    "metrics": "metrics",
}
"""What a running daemon cannot change: keys of a file, and what they are called in a `Config`."""
FIXED_DOOR = ("host", "port")
"""Likewise of the gateway."""


class Daemon:
    """What is supervised, and by which configuration.

    Args:
        config: the configuration that is in force.
        load_config: reads the configuration again; raises ConfigError.
        fleet: the routers.
        bus: where the events go.
        notifier: hears of reloads.
    """

    def __init__(
        self,
        config: Config,
        *,
        load_config: Callable[[], Config],
        fleet: Fleet,
        bus: Bus,
        notifier: Notifier | None = None,
    ) -> None:
        self.config = config
        self.config_error: str | None = None
        self.config_loaded_at = time.time()
        self.fleet = fleet
        self.bus = bus
        self.traffic: Traffic | None = None  # of the gateway, if there is one
        self.metrics_error: str | None = None
        self.loop_lag_s = 0.0
        self.started_at = time.time()
        self._started_mono = anyio.current_time()
        self._load_config = load_config
        self._notifier = Notifier({}) if notifier is None else notifier
        self._router_key = secrets.token_urlsafe(32)  # lives as long as we do: a reload restarts no router for it
        self._reloading = anyio.Lock()  # two reloads at once would apply half of each

    def __repr__(self) -> str:
        return f"<Daemon {self.fleet!r}>"

    @property
    def downloads(self) -> Downloads:
        """What comes from the Hub, and how it is asked."""
        return self.fleet.downloads

    def fleet_settings(self) -> FleetSettings:
        """What the routers and their models are told to be."""
        return self.config.fleet_settings(router_key=self._router_key)

    async def reload(self) -> tuple[tuple[str, ...], Applied]:
        """Read the configuration again and go over to it, all or nothing; then look at the models folders.

        What is whole in them can be served when this returns, unless they take longer than `RELOAD_LOOK_S`.

        Returns:
            What has changed of the gateway, and what of routers and models.

        Raises:
            ConfigError: it is not valid, or changes what a running daemon cannot change; the old one stays in force.
        """
        async with self._reloading:
            with self._notifier.reloading():
                return await self._reload()

    async def _reload(self) -> tuple[tuple[str, ...], Applied]:
        try:
            config = await run_in_thread(self._load_config, abandon_on_cancel=True)
            self._refuse_fixed(config)
            settings = config.fleet_settings(router_key=self._router_key)
            if problems := await self.fleet.check(settings):
                raise ConfigError(problems)  # noqa: TRY301 (refused like any other)
        except ConfigError as error:
            self.config_error = str(error)
            self.bus.publish(ConfigRejected(error="; ".join(map(str, error.problems))))
            raise
        gateway = gateway_changes(self.config.gateway, config.gateway)
        for warning in config.warnings:
            if warning not in self.config.warnings:
                self.bus.publish(Warned(subject="configuration", text=warning))
        self.config, self.config_error, self.config_loaded_at = config, None, time.time()
        applied = await self.fleet.apply(settings)
        self.bus.publish(ConfigReloaded(changed=applied.routers, models=applied.models, gateway=gateway))
        return gateway, replace(applied, problems=await self.fleet.look(within_s=RELOAD_LOOK_S))

    def _refuse_fixed(self, config: Config) -> None:
        """Sockets and folders are taken when the daemon starts; a new value needs a new daemon."""
        changed = [key for key, name in FIXED.items() if getattr(config, name) != getattr(self.config, name)]
        if config.gateway is not None and self.config.gateway is not None:
            doors = config.gateway, self.config.gateway
            changed += [key for key in FIXED_DOOR if len({getattr(door, key) for door in doors}) > 1]
        if changed:
            text = "cannot be changed by a reload: end the daemon and start it again"
            raise ConfigError([Problem(text, key=key) for key in changed])

    async def try_reload(self) -> None:
        """Reload for SIGHUP: the error is in the log, in `status` and in the metrics, and work goes on."""
        with suppress(LlamavisorError):
            await self.reload()

    async def wait_for_models(self) -> None:
        """Wait until it is known what is in the models folders, as the fleet waits for it, and clients are let in.

        Only who comes right after the start waits.
        """
        await self.fleet.wait_for_models()
        if self.traffic is not None and not self.traffic.has_tried.is_set():
            with anyio.move_on_after(DOOR_S):
                await self.traffic.has_tried.wait()

    @property
    def models_dirs(self) -> tuple[Path, ...]:
        """The models folders, that of the first router first."""
        return tuple(dict.fromkeys(router.models_dir for router in self.config.routers))

    @property
    def is_ready(self) -> bool:
        """Whether a client who comes now is served: a router is, and the gateway, if there is one, lets clients in."""
        return self.fleet.is_ready and (self.traffic is None or self.traffic.state == "open")

    def warnings(self) -> list[str]:
        """What a person should know although it works."""
        found = list(self.config.warnings)
        if self.metrics_error:
            found.append(self.metrics_error)
        if self.traffic is not None:
            found += self.traffic.warnings()
        found += self._default_model_warnings()
        for folder in self.fleet.folders:
            catalog = folder.catalog
            if catalog.stale:
                found.append(f"folder {folder.path}: {catalog.stale}; what was known of it stays")
            elif catalog.mode == "polling":
                found.append(f"folder {folder.path}: watched by polling: {catalog.mode_reason}")
        for router in self.fleet:
            if router.state is RouterState.READY and not len(router.table):
                found.append(self._why_empty(router.settings.models_dir))
            if router.launch is not None:
                found += router.launch.warnings
                unseen = self.fleet.memory.capacity.unseen(router.settings)
                found += [f"router {router.name}: memory names {name}, which it does not see" for name in unseen]
        found += memory_warnings(self.fleet.memory.occupancy())
        found += [text for _, text in unmatched(self.config.rules, self.config.routers, self._names_in)]
        return list(dict.fromkeys(found))

    def _default_model_warnings(self) -> list[str]:
        """Whether the model that serves who names none is there; not known before any folder was looked at."""
        name = self.config.gateway.default_model if self.config.gateway is not None else None
        if name is None or not any(folder.catalog.has_looked for folder in self.fleet.folders):
            return []
        known = self.fleet.memory.scheduler.where.name_of(name)
        if any(known in router.shelf.wanted for router in self.fleet):
            return []
        return [f"default_model {name}: no such model; requests that name none are refused"]

    def _names_in(self, models_dir: Path) -> Collection[str] | None:
        """The models of a folder, None while it cannot be said what is there."""
        for folder in self.fleet.folders:
            if folder.path == models_dir and folder.catalog.has_looked and not folder.catalog.stale:
                return folder.catalog.entries
        return None

    def _why_empty(self, models_dir: Path) -> str:
        """Why a router on that folder has no models."""
        entries = [entry for folder in self.fleet.folders if folder.path == models_dir for entry in folder.catalog]
        if any(entry.state is not EntryState.GONE for entry in entries):
            return f"no model in {models_dir} can be served: see `llamavisor models`"
        return f"no models: put GGUF files into {models_dir}, or `llamavisor pull USER/REPO`"

    def inventory(self) -> Inventory:
        """All models as they are now."""
        return Inventory(self.fleet, on_overwrite=self.config.on_overwrite)

    def view(self) -> dict[str, Any]:
        """The daemon itself as `status` shows it."""
        metrics = self.config.metrics
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": anyio.current_time() - self._started_mono,
            "started_unix": self.started_at,
            "serve": self.config.serve,
            "config_path": str(self.config.path) if self.config.path else None,
            "config_error": self.config_error,
            "config_loaded_unix": self.config_loaded_at,
            "socket": str(self.config.socket),
            "metrics_url": f"{base_url(metrics.host, metrics.port)}/metrics" if metrics.enabled else None,
            "gateway": self.traffic.view() if self.traffic is not None else None,
            "warnings": self.warnings(),
        }
